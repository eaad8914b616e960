//! `bench step`: time of a training step, with the keys of the peer harness.

use std::time::{Duration, Instant};

use patrickstar_actors::Side;
use patrickstar_actors::stats::{Direction, StallCause};
use patrickstar_actors::types::Tier;
use serde_json::{Value, json};

use crate::Error;
use crate::config::Sources;
use crate::data::{TokenBatch, Tokenizer};
use crate::model::gpt2::{self, model_flops};
use crate::model::rng;
use crate::plan::KnownRates;
use crate::train::model::{build, to_batch};
use crate::train::{Batch, Engine, device};

/// The quick start's model and budget.
const QUICKSTART: &str = include_str!("../../../config/quickstart.toml");

pub fn run(
    shape: Option<String>,
    batch: Option<usize>,
    steps: u64,
    with_kernels: bool,
    mut set: Vec<String>,
) -> Result<Value, Error> {
    let started = Instant::now();
    let mut first = Vec::new();
    match &shape {
        Some(name) => {
            let (_, _, _, seq) = gpt2::shape(name).ok_or_else(|| {
                Error::Model(format!(
                    "`{name}` is not a shape: use tiny, 1b, 2b, 4b, 6b, 8b, 10b, 13b, 15b, 18b or 20b"
                ))
            })?;
            first.push(format!("model.preset={name}"));
            first.push(format!("train.seq_len={seq}"));
            first.push(format!("train.batch={}", batch.unwrap_or(8)));
            first.push("train.clip_norm=0".to_owned());
            if let Some(memory) = device::gpu_memory(&Default::default())? {
                // As the peers: 16-bit weights, and the card as large as it is.
                first.push("model.precision=bf16".to_owned());
                first.push(format!("memory.device={}", memory.0));
            }
        }
        None => first.extend(batch.map(|batch| format!("train.batch={batch}"))),
    }
    first.push(format!("train.steps={}", steps + 1));
    first.append(&mut set);
    let mut layers = if shape.is_none() { quickstart_keys()? } else { Vec::new() };
    layers.append(&mut first);
    let mut config = Sources::process(None, layers).load()?.config;
    let (model, blocks) = build(&mut config, &Tokenizer::Bytes)?;
    let train = config.train.clone();
    let mut engine = Engine::new(config, blocks)?;
    let ready = started.elapsed();
    let tokens = train.batch * train.seq_len;
    let data: Vec<u32> = (0..=tokens as u64)
        .map(|i| ((rng::uniform(train.seed, i) * model.vocab as f64) as u32).min(model.vocab as u32 - 1))
        .collect();
    let data = TokenBatch {
        input: data[..tokens].to_vec(),
        target: data[1..].to_vec(),
        sequences: train.batch,
        seq_len: train.seq_len,
    };
    let batch = to_batch(&data, train.micro_batches)?;
    let mut loss = vec![engine.step(&batch)?.loss];
    let first_step = started.elapsed();
    let (before, stashed_before) = (engine.runtime().stats(), engine.stash_moved());
    let (mut seconds, mut host) = (Vec::new(), 0.0);
    for _ in 0..steps {
        let began = Instant::now();
        let report = engine.step(&batch)?;
        seconds.push(began.elapsed().as_secs_f64());
        loss.push(report.loss);
        host += report.host.as_secs_f64();
    }
    engine.drain()?;
    let (stats, stashed) = (engine.runtime().stats().since(&before), engine.stash_moved());
    let kernels = if with_kernels { kernel_times(&mut engine, &batch)? } else { Value::Null };
    let mut sorted = seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
    let total: f64 = seconds.iter().sum();
    let stalls: serde_json::Map<String, Value> = StallCause::ALL
        .into_iter()
        .map(|cause| (cause.name().to_owned(), stats.stalls[cause as usize].as_secs_f64().into()))
        .collect();
    let predicted = engine.plan().predicted_step(engine.config(), &KnownRates::default());
    let a_step = |bytes: u64| bytes as f64 / 1e9 / steps as f64;
    let gigabytes = |direction: Direction| a_step(stats.bytes[direction as usize]);
    Ok(json!({
        "shape": shape,
        "batch": train.batch,
        "params_b": engine.plan().parameters as f64 / 1e9,
        "step_s": seconds,
        "median_s": median,
        "ready_s": ready.as_secs_f64(),
        "first_step_done_s": first_step.as_secs_f64(),
        "tflops": model_flops(&model, tokens as u64, train.seq_len as u64) / median / 1e12,
        "tok_s": tokens as f64 / median,
        "gpu_peak_gb": engine.runtime().device_peak().0 as f64 / 1e9,
        "rss_peak_gb": peak_rss() / 1e9,
        "loss": loss,
        "host_ratio": host / total,
        "kernels": kernels,
        "stall_ratio": stats.stall().as_secs_f64() / total,
        "stall_by_cause": stalls,
        "h2d_gb": gigabytes(Direction::HostToDevice),
        "d2h_gb": gigabytes(Direction::DeviceToHost),
        "activations_out_gb": a_step(stashed.out.0 - stashed_before.out.0),
        "activations_back_gb": a_step(stashed.back.0 - stashed_before.back.0),
        "link_gbps": {
            "h2d": rate(stats.bytes[Direction::HostToDevice as usize], stats.busy[Direction::HostToDevice as usize]),
            "d2h": rate(stats.bytes[Direction::DeviceToHost as usize], stats.busy[Direction::DeviceToHost as usize]),
        },
        "host_updates_gparam_s": rate(stats.stepped_on_host, stats.stepping_on_host),
        "placement": placement(&engine),
        "recompute": {
            "layers": engine.plan().layers,
            "kept": engine.plan().kept_layers,
            "cheap_again": engine.plan().frugal,
            "inputs_in_host_memory": engine.plan().away_layers,
            "host_gb": engine.stash_bytes().0 as f64 / 1e9,
        },
        "predicted_step_s": predicted.map(|step| step.as_secs_f64()),
        "predicted_peaks": predicted_peaks(&engine),
        "measured_peaks": {
            "device_gb": engine.runtime().device_peak().0 as f64 / 1e9,
            "host_gb": (engine.runtime().tier_use(Tier::Host).peak.0 + engine.stash_bytes().0) as f64 / 1e9,
            "disk_gb": engine.runtime().tier_use(Tier::Disk).peak.0 as f64 / 1e9,
        },
        "chunk_moves": stats.chunk_moves(),
        "prefetch": {"useful": stats.prefetch_useful, "late": stats.prefetch_late, "wasted": stats.prefetch_wasted},
        "non_model_peak_gb": engine.runtime().non_model_by_moment().into_iter().max().unwrap_or(0) as f64 / 1e9,
        "non_model_predicted_gb": engine.plan().tiers.first().map_or(0.0, |tier| tier.non_model.0 as f64 / 1e9),
        "device_budget_gb": engine.runtime().device().0 as f64 / 1e9,
        "host_peak_gb": engine.runtime().tier_use(Tier::Host).peak.0 as f64 / 1e9,
        "chunk_bytes": engine.plan().chunk,
    }))
}

/// Billions a second; null where nothing took any time.
fn rate(count: u64, time: Duration) -> Value {
    if time.is_zero() { Value::Null } else { (count as f64 / 1e9 / time.as_secs_f64()).into() }
}

/// Groups by side.
fn placement(engine: &Engine) -> Value {
    let count = |side: Side| engine.runtime().sides().iter().filter(|&&other| other == side).count();
    json!({"resident": count(Side::Resident), "streamed": count(Side::Streamed), "host": count(Side::Host)})
}

fn predicted_peaks(engine: &Engine) -> Value {
    let peak = |tier: Tier| {
        let plan = engine.plan().tiers.iter().find(|plan| plan.tier == tier);
        plan.map_or(0.0, |plan| (plan.chunk_peak.0 + plan.non_model.0) as f64 / 1e9)
    };
    json!({"device_gb": peak(Tier::Device), "host_gb": peak(Tier::Host), "disk_gb": peak(Tier::Disk)})
}

/// Calls and seconds of each class of kernels in one more step, which timing slows a little; empty on the host.
fn kernel_times(engine: &mut Engine, batch: &Batch) -> Result<Value, Error> {
    engine.compute().set_profiling(true);
    engine.step(batch)?;
    engine.drain()?;
    engine.compute().set_profiling(false);
    let times = engine.compute().take_profile()?;
    Ok(times
        .into_iter()
        .map(|(class, time)| {
            let value = json!({"calls": time.calls, "s": time.device.as_secs_f64(), "host_s": time.host.as_secs_f64()});
            (class.to_owned(), value)
        })
        .collect::<serde_json::Map<_, _>>()
        .into())
}

/// The quick start's file as `key=value` pairs, so that later ones may change it.
fn quickstart_keys() -> Result<Vec<String>, Error> {
    let table: toml::Table =
        QUICKSTART.parse().map_err(|error| Error::Failed(format!("config/quickstart.toml: {error}")))?;
    let mut pairs = Vec::new();
    flatten("", &toml::Value::Table(table), &mut pairs);
    Ok(pairs)
}

fn flatten(prefix: &str, value: &toml::Value, pairs: &mut Vec<String>) {
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&name, value, pairs);
            }
        }
        toml::Value::String(text) => pairs.push(format!("{prefix}={text}")),
        other => pairs.push(format!("{prefix}={other}")),
    }
}

/// Highest resident memory of this process, as the system counts it.
fn peak_rss() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).map_or(f64::NAN, |kib| kib * 1024.0)
}
