//! A set of series that lives and dies together, and the one of this process.
//!
//! The exporter cannot take the series of one job away, only all that are idle, and a quiet counter of errors is idle. So
//! every job has a registry of its own: all its series carry `job_id`, and go when the registry is dropped. A worker process
//! has one registry, of its job; a service has its own without `job_id`, and joins what its workers say by
//! [`super::merge`].

use std::sync::{Arc, OnceLock};

use metrics::{Key, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use super::names::{Counter, Family, Gauge, Histogram};
use super::process::ProcessSampler;
use super::upkeep;
use crate::error::Error;
use crate::telemetry::build;
use crate::telemetry::periodic::Periodic;

static PROCESS: OnceLock<Arc<Registry>> = OnceLock::new();

/// The series of one job, or of the process itself.
pub struct Registry {
    recorder: Arc<PrometheusRecorder>,
    handle: PrometheusHandle,
    upkeep: Option<Periodic>,
}

impl Registry {
    /// An empty registry; with a job's id, all its series carry it as `job_id`.
    pub fn new(job_id: Option<&str>) -> Result<Self, Error> {
        Registry::of(builder(job_id)?.build_recorder(), false)
    }

    /// Around a recorder that was built here; with the numbers of this process, or without.
    pub(super) fn of(recorder: PrometheusRecorder, with_process: bool) -> Result<Self, Error> {
        let mut registry = Registry { handle: recorder.handle(), recorder: Arc::new(recorder), upkeep: None };
        registry.describe();
        let sampler = with_process.then(|| ProcessSampler::new(&registry));
        let upkeep = upkeep::start(registry.handle.clone(), sampler)
            .map_err(|error| failed(format!("there is no thread for their upkeep: {error}")))?;
        registry.upkeep = Some(upkeep);
        Ok(registry)
    }

    /// Meanings of all metrics, those that others set included: a metric without one is refused by `promtool`.
    fn describe(&self) {
        // The unit is in the name; given here, the exporter could only append it once more.
        for family in Counter::ALL.iter().map(|metric| metric.family()) {
            self.recorder.describe_counter(family.name.into(), None, family.help.into());
        }
        for family in Gauge::ALL.iter().map(|metric| metric.family()) {
            self.recorder.describe_gauge(family.name.into(), None, family.help.into());
        }
        for family in Histogram::ALL.iter().map(|metric| metric.family()) {
            self.recorder.describe_histogram(family.name.into(), None, family.help.into());
        }
    }

    /// A series of a counter; `values` are those of its labels. Keep it: finding it again costs a look-up.
    pub fn counter(&self, metric: Counter, values: &[&str]) -> metrics::Counter {
        self.recorder.register_counter(&key(metric.family(), values), &METADATA)
    }

    /// A series of a gauge.
    pub fn gauge(&self, metric: Gauge, values: &[&str]) -> metrics::Gauge {
        self.recorder.register_gauge(&key(metric.family(), values), &METADATA)
    }

    /// A series of a histogram.
    pub fn histogram(&self, metric: Histogram, values: &[&str]) -> metrics::Histogram {
        self.recorder.register_histogram(&key(metric.family(), values), &METADATA)
    }

    /// All series in the text form that Prometheus reads.
    pub fn render(&self) -> String {
        self.handle.render()
    }
}

const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

fn key(family: Family, values: &[&str]) -> Key {
    debug_assert_eq!(family.labels.len(), values.len(), "labels of {}", family.name);
    let labels: Vec<Label> =
        family.labels.iter().zip(values).map(|(&name, &value)| Label::new(name, value.to_owned())).collect();
    Key::from_parts(family.name, labels)
}

pub(super) fn builder(job_id: Option<&str>) -> Result<PrometheusBuilder, Error> {
    let mut builder = PrometheusBuilder::new();
    for metric in Histogram::ALL {
        let name = Matcher::Full(metric.family().name.to_owned());
        builder = builder.set_buckets_for_metric(name, metric.buckets()).map_err(|error| refused(&error))?;
    }
    Ok(match job_id {
        Some(job_id) => builder.add_global_label("job_id", job_id),
        None => builder,
    })
}

pub(super) fn refused(error: &BuildError) -> Error {
    failed(error.to_string())
}

fn failed(why: String) -> Error {
    Error::Failed(format!("metrics cannot be kept: {why}"))
}

/// Makes a registry that of this process: the actors' gauges and the process's own numbers go there too.
pub fn install(job_id: Option<&str>) -> Result<Arc<Registry>, Error> {
    adopt(Registry::of(builder(job_id)?.build_recorder(), true)?)
}

pub(super) fn adopt(registry: Registry) -> Result<Arc<Registry>, Error> {
    let registry = Arc::new(registry);
    metrics::set_global_recorder(Arc::clone(&registry.recorder))
        .map_err(|_| failed("this process has a recorder already: install one only".into()))?;
    registry.gauge(Gauge::BuildInfo, &[build::VERSION, build::REVISION, &build::cuda()]).set(1.0);
    // A counter begins at 0 and not at its first increment, which `rate` would not see.
    for level in ["error", "warn", "info", "debug", "trace"] {
        registry.counter(Counter::LogMessages, &[level]).increment(0);
    }
    // Nobody else could have set it: there was no recorder before.
    Ok(Arc::clone(PROCESS.get_or_init(|| registry)))
}

/// The registry of this process, if one was installed.
pub fn installed() -> Option<&'static Arc<Registry>> {
    PROCESS.get()
}

/// One more, where this process has a registry.
pub fn count(metric: Counter) {
    count_with(metric, &[]);
}

/// As [`count`], of a series with labels.
pub fn count_with(metric: Counter, values: &[&str]) {
    if let Some(registry) = installed() {
        registry.counter(metric, values).increment(1);
    }
}

/// What `/metrics` answers: all series of this process; nothing where no registry was installed.
pub fn render() -> String {
    installed().map(|registry| registry.render()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One series of every metric.
    fn touch_all(registry: &Registry) {
        let values = |family: Family| vec!["x"; family.labels.len()];
        for &metric in Counter::ALL {
            registry.counter(metric, &values(metric.family())).increment(1);
        }
        for &metric in Gauge::ALL {
            registry.gauge(metric, &values(metric.family())).set(1.0);
        }
        for &metric in Histogram::ALL {
            registry.histogram(metric, &values(metric.family())).record(0.2);
        }
    }

    #[test]
    fn every_series_has_a_meaning_a_job_and_no_summary() {
        let registry = Registry::new(Some("ftjob-1")).unwrap();
        touch_all(&registry);
        let text = registry.render();
        for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            assert!(line.contains("job_id=\"ftjob-1\""), "{line}");
        }
        let families = Counter::ALL.len() + Gauge::ALL.len() + Histogram::ALL.len();
        assert_eq!(text.matches("# HELP ").count(), families);
        assert_eq!(text.matches("# TYPE ").count(), families);
        assert_eq!(text.matches(" histogram\n").count(), Histogram::ALL.len());
        assert!(!text.contains(" summary\n"));
    }

    #[test]
    fn series_of_a_job_go_with_its_registry() {
        let service = Registry::new(None).unwrap();
        let first = Registry::new(Some("ftjob-1")).unwrap();
        let second = Registry::new(Some("ftjob-2")).unwrap();
        // A handle may be used on any thread, and outlive its registry without keeping its series in the text.
        let loss = first.gauge(Gauge::TrainLoss, &[]);
        std::thread::scope(|scope| scope.spawn(|| loss.set(2.5)).join()).unwrap();
        second.gauge(Gauge::TrainLoss, &[]).set(1.5);
        service.counter(Counter::Checkpoints, &[]).increment(1);
        let all = |registries: &[&Registry]| {
            super::super::merge(&registries.iter().map(|registry| registry.render()).collect::<Vec<_>>())
        };
        let both = all(&[&service, &first, &second]);
        assert!(both.contains("{job_id=\"ftjob-1\"} 2.5") && both.contains("{job_id=\"ftjob-2\"} 1.5"), "{both}");
        drop(first);
        loss.set(9.0);
        let left = all(&[&service, &second]);
        assert!(!left.contains("ftjob-1") && left.contains("ftjob-2"), "{left}");
    }
}
