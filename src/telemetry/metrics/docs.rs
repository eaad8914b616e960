//! The page that lists all metrics, written from their declarations.

use super::names::{Counter, Family, Gauge, Histogram};

const HEAD: &str = "# Metrics

Written from `src/telemetry/metrics/names.rs` by `UPDATE_DOCS=1 cargo test --test dashboards`: do not edit it here.

`patrickstar serve` answers these at `/metrics`, its own and those of all running jobs, and
`patrickstar train --metrics 127.0.0.1:9464` those of its job while it trains. Every series of a job carries `job_id` (of a
command-line run: the name of its run directory) and is gone when the job's process has ended; those named
`patrickstar_service_` are the service's own. Those of a GPU that its driver has to tell (neighbours, temperature, power) are
absent where there is none, or no libnvidia-ml. Seconds are
sums of histograms, one sample a step: `rate(X_sum) / rate(patrickstar_train_step_duration_seconds_sum)` is the share of the
time that X took. What to look at first, and what to do about it, is in `dashboards/README.md`.
";

/// The text of `docs/METRICS.md`.
pub fn markdown() -> String {
    let mut page = HEAD.to_owned();
    section(&mut page, "Counters", Counter::ALL.iter().map(|metric| (metric.family(), String::new())));
    section(&mut page, "Gauges", Gauge::ALL.iter().map(|metric| (metric.family(), String::new())));
    let buckets = |metric: &Histogram| {
        let bounds: Vec<String> = metric.buckets().iter().map(f64::to_string).collect();
        format!(" Buckets: {}.", bounds.join(", "))
    };
    section(&mut page, "Histograms", Histogram::ALL.iter().map(|metric| (metric.family(), buckets(metric))));
    page
}

fn section(page: &mut String, title: &str, families: impl Iterator<Item = (Family, String)>) {
    page.push_str(&format!("\n## {title}\n| name | labels | unit | meaning |\n|---|---|---|---|\n"));
    for (family, more) in families {
        let labels: Vec<String> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        let Family { name, unit, help, .. } = family;
        page.push_str(&format!("| `{name}` | {} | {} | {help}{more} |\n", labels.join(", "), unit.name()));
    }
}
