//! What the kernel says of this process: the standard `process_` metrics, from `/proc`. Where there is none, they are absent.

use std::fs;

use super::names::{Counter, Gauge};
use super::registry::Registry;

/// Reads `/proc/self` into gauges.
pub(super) struct ProcessSampler {
    resident: metrics::Gauge,
    open_fds: metrics::Gauge,
    threads: metrics::Gauge,
    cpu: metrics::Counter,
}

impl ProcessSampler {
    pub fn new(registry: &Registry) -> Self {
        if let Some(start) = start_time() {
            registry.gauge(Gauge::ProcessStart, &[]).set(start);
        }
        let sampler = ProcessSampler {
            resident: registry.gauge(Gauge::ProcessResidentBytes, &[]),
            open_fds: registry.gauge(Gauge::ProcessOpenFds, &[]),
            threads: registry.gauge(Gauge::ProcessThreads, &[]),
            cpu: registry.counter(Counter::ProcessCpuSeconds, &[]),
        };
        sampler.sample();
        sampler
    }

    pub fn sample(&self) {
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            self.open_fds.set(entries.count() as f64);
        }
        let Some(stat) = stat() else { return };
        let field = |number: usize| stat.get(number - FIRST_FIELD).copied().unwrap_or(0);
        self.threads.set(field(20) as f64);
        self.resident.set(field(24) as f64 * rustix::param::page_size() as f64);
        self.cpu.absolute((field(14) + field(15)) / rustix::param::clock_ticks_per_second());
    }
}

/// The fields of `/proc/self/stat` are numbered from 1; the second is a name that may hold anything, in parentheses, and
/// the third a letter.
const FIRST_FIELD: usize = 4;

fn stat() -> Option<Vec<u64>> {
    let text = fs::read_to_string("/proc/self/stat").ok()?;
    let (_, fields) = text.rsplit_once(") ")?;
    // Fields that may be negative are none of ours.
    Some(fields.split_whitespace().skip(1).map(|field| field.parse().unwrap_or(0)).collect())
}

fn start_time() -> Option<f64> {
    let boot = fs::read_to_string("/proc/stat").ok()?;
    let boot: u64 = boot.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    let ticks = *stat()?.get(22 - FIRST_FIELD)?;
    Some(boot as f64 + ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn the_kernel_knows_this_process() {
        let registry = Registry::new(None).unwrap();
        ProcessSampler::new(&registry);
        let text = registry.render();
        let value = |gauge: Gauge| -> f64 {
            let line = text.lines().find(|line| line.starts_with(&format!("{} ", gauge.family().name)));
            line.unwrap_or_else(|| panic!("{gauge:?}: {text}")).rsplit(' ').next().unwrap().parse().unwrap()
        };
        assert!((1e5..1e12).contains(&value(Gauge::ProcessResidentBytes)));
        assert!(value(Gauge::ProcessThreads) >= 2.0 && value(Gauge::ProcessOpenFds) >= 3.0);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((now - value(Gauge::ProcessStart)).abs() < 86_400.0, "{text}");
    }
}
