//! How much main memory this process may still take: the limit of its control group first, then the machine.

use std::fs;
use std::path::Path;

use crate::types::Bytes;

/// Memory this process may still take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Available {
    /// This much.
    Known(Bytes),
    /// The system does not say.
    Unknown,
}

/// Memory this process may still take: the least of what every enclosing control group (v2 and v1) and the machine
/// leave. Page cache that the kernel can drop counts as available.
pub fn available_host_memory() -> Available {
    if cfg!(target_os = "linux") { available_under(Path::new("/")) } else { Available::Unknown }
}

fn available_under(root: &Path) -> Available {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let in_groups = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let (mount, names) = if controllers.is_empty() {
            ("sys/fs/cgroup", ["memory.max", "memory.current", "inactive_file"])
        } else if controllers.split(',').any(|name| name == "memory") {
            let names = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"];
            ("sys/fs/cgroup/memory", names)
        } else {
            return None;
        };
        let mount = root.join(mount);
        let own = mount.join(path.trim_start_matches('/'));
        // A parent's limit binds its children. Inside a container the path may not exist, and the mount is the group.
        own.ancestors().take_while(|at| at.starts_with(&mount)).filter_map(|at| left_in_group(at, names)).min()
    });
    match in_groups.chain(machine(root)).min() {
        Some(bytes) => Available::Known(Bytes(bytes)),
        None => Available::Unknown,
    }
}

fn left_in_group(group: &Path, [limit, usage, cache]: [&str; 3]) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    // No limit is the word `max` in v2, which is no number, and a number beyond any machine in v1.
    let (limit, usage) = (number(limit)?, number(usage)?);
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cache = stat.lines().find_map(|line| line.strip_prefix(cache)?.trim().parse::<u64>().ok()).unwrap_or(0);
    Some(limit.saturating_sub(usage.saturating_sub(cache)))
}

fn machine(root: &Path) -> Option<u64> {
    let info = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn available(files: &[(&str, &str)]) -> Available {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        available_under(root.path())
    }

    #[test]
    fn the_tightest_of_group_parents_and_machine_counts() {
        let machine = ("proc/meminfo", "MemTotal: 99 kB\nMemAvailable:   1000 kB\n");
        assert_eq!(available(&[]), Available::Unknown);
        assert_eq!(available(&[machine]), Available::Known(Bytes(1_024_000)));
        let v2 = |max| {
            available(&[
                machine,
                ("proc/self/cgroup", "0::/job/run\n"),
                ("sys/fs/cgroup/job/memory.max", max),
                ("sys/fs/cgroup/job/memory.current", "400000\n"),
                ("sys/fs/cgroup/job/memory.stat", "anon 5\ninactive_file 100000\n"),
                ("sys/fs/cgroup/job/run/memory.max", "max\n"),
                ("sys/fs/cgroup/job/run/memory.current", "1\n"),
            ])
        };
        assert_eq!(v2("500000\n"), Available::Known(Bytes(200_000)));
        assert_eq!(v2("max\n"), Available::Known(Bytes(1_024_000)));
        let v1 = available(&[
            machine,
            ("proc/self/cgroup", "4:cpu,memory:/elsewhere\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1500\n"),
        ]);
        assert_eq!(v1, Available::Known(Bytes(0)));
    }
}
