//! `patrickstar doctor`: what this machine offers, and what would stop a run.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use patrickstar_actors::memory::numa::{self, Spread};
use patrickstar_actors::types::Bytes;
use serde::Serialize;

use super::args::DoctorArgs;
use super::{CliError, output};
use crate::config::Sources;
use crate::telemetry::build;

/// Below this a checkpoint of even the quickstart model may not be written whole.
const LEAST_DISK: u64 = 1 << 30;

#[derive(Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    detail: String,
}

pub(super) fn run(args: &DoctorArgs) -> Result<ExitCode, CliError> {
    let output_dir = Sources::process(None, Vec::new()).merge()?.config.train.output;
    let checks = [
        info("version", format!("{}, revision {}, CUDA {}", build::VERSION, build::REVISION, build::cuda())),
        cores(),
        isa(),
        memory(),
        cgroup(),
        device(),
        neighbours(),
        disk(output_dir),
        huge_pages(),
        nodes(),
        limits(),
    ];
    let ok = checks.iter().all(|check| check.ok);
    if args.json {
        output::json(&serde_json::json!({ "ok": ok, "checks": checks }))?;
    } else {
        for check in &checks {
            let mark = if check.ok { "ok  " } else { "FAIL" };
            output::line(&format!("{mark} {:<11} {}", check.name, check.detail))?;
        }
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::from(super::ERROR) })
}

fn info(name: &'static str, detail: impl Into<String>) -> Check {
    Check { name, ok: true, detail: detail.into() }
}

fn cores() -> Check {
    match std::thread::available_parallelism() {
        Ok(count) => info("cores", count.to_string()),
        Err(error) => Check { name: "cores", ok: false, detail: error.to_string() },
    }
}

fn isa() -> Check {
    #[cfg(target_arch = "x86_64")]
    let found = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let found = [(std::env::consts::ARCH, true)];
    let names: Vec<&str> = found.iter().filter(|(_, has)| *has).map(|(name, _)| *name).collect();
    info("isa", if names.is_empty() { "baseline only".to_owned() } else { names.join(" ") })
}

/// A field of /proc/meminfo, which counts in KiB.
fn meminfo(field: &str) -> Option<u64> {
    let text = read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

fn memory() -> Check {
    match (meminfo("MemTotal"), meminfo("MemAvailable")) {
        (Some(total), Some(free)) => {
            info("memory", format!("{} available of {}", Bytes(free * 1024), Bytes(total * 1024)))
        }
        _ => Check { name: "memory", ok: false, detail: "/proc/meminfo cannot be read: mount /proc".into() },
    }
}

fn cgroup() -> Check {
    let limit = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit = limit.iter().find_map(|path| read_to_string(path).ok()?.trim().parse::<u64>().ok());
    // The first version of control groups writes a number near 2^63 where there is no limit.
    let limit = limit.filter(|limit| meminfo("MemTotal").is_none_or(|total| *limit < total * 1024));
    info("cgroup", limit.map_or("no memory limit".to_owned(), |limit| format!("memory limit {}", Bytes(limit))))
}

#[cfg(not(feature = "cuda"))]
fn device() -> Check {
    info("device", "built without cuda: the device tier is a share of host memory")
}

/// The first GPU, with everything a run would set up on it.
#[cfg(feature = "cuda")]
fn device() -> Check {
    match crate::train::device::describe_gpu(0) {
        Ok(detail) => info("device", detail),
        Err(error) => Check { name: "device", ok: false, detail: error.to_string() },
    }
}

#[cfg(not(feature = "cuda"))]
fn neighbours() -> Check {
    info("neighbours", "built without cuda: other processes take host memory only")
}

/// Who else is on the first GPU, and how it is. A run does without knowing.
#[cfg(feature = "cuda")]
fn neighbours() -> Check {
    let reading = match crate::train::device::inspect_gpu(0) {
        Ok(reading) => reading,
        Err(error) => return info("neighbours", format!("not known: {error}")),
    };
    let mut words = vec![reading.neighbours.to_string()];
    words.extend(reading.celsius.map(|celsius| format!("{celsius} °C")));
    words.extend(reading.watts.map(|watts| format!("{watts:.0} W")));
    words.extend(reading.busy.map(|busy| format!("{:.0} % busy", busy * 100.0)));
    let throttles = reading.throttles.unwrap_or_default();
    words.extend(throttles.iter().map(|throttle| format!("held back by {}", throttle.name())));
    info("neighbours", words.join("; "))
}

fn disk(dir: PathBuf) -> Check {
    // The run directory may not exist yet: its nearest existing parent is on the same disk.
    let existing = dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
    match rustix::fs::statvfs(existing) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let detail = format!("{} free for {}", Bytes(free), dir.display());
            Check { name: "disk", ok: free >= LEAST_DISK, detail }
        }
        Err(error) => Check { name: "disk", ok: false, detail: format!("{}: {error}", dir.display()) },
    }
}

fn huge_pages() -> Check {
    let mode = read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_else(|_| "unknown".into());
    let reserved = meminfo("HugePages_Total").unwrap_or(0);
    info("huge pages", format!("transparent: {}; reserved: {reserved}", mode.trim()))
}

fn nodes() -> Check {
    let detail = match numa::probe() {
        Ok(Spread::OneNode) => "host memory lies on one node".to_owned(),
        Ok(Spread::Over(nodes)) => format!("host memory is spread over nodes {nodes:?}"),
        Ok(Spread::AsChosen) => "host memory lies where the policy of this process says (numactl)".to_owned(),
        Ok(Spread::FirstTouch(reason)) => format!(
            "host memory lies where it is touched first, not spread over the nodes: {reason} (a container needs CAP_SYS_NICE)"
        ),
        Err(error) => return Check { name: "numa", ok: false, detail: error.to_string() },
    };
    info("numa", detail)
}

fn limits() -> Check {
    let Ok(text) = read_to_string("/proc/self/limits") else {
        return Check { name: "limits", ok: false, detail: "/proc/self/limits cannot be read: mount /proc".into() };
    };
    let soft = |name: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(name));
        rest.and_then(|rest| rest.split_whitespace().next()).unwrap_or("unknown").to_owned()
    };
    info("limits", format!("open files {}; locked memory {}", soft("Max open files"), soft("Max locked memory")))
}
