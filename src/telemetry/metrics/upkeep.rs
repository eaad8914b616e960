//! What a registry needs from time to time: its histograms' samples counted, and the kernel asked about the process.

use std::io;
use std::ops::ControlFlow;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;

use super::process::ProcessSampler;
use crate::telemetry::periodic::Periodic;

/// Samples of histograms pile up until somebody counts them: the exporter's own interval.
const INTERVAL: Duration = Duration::from_secs(5);

/// Starts the thread that does it.
pub(super) fn start(handle: PrometheusHandle, sampler: Option<ProcessSampler>) -> io::Result<Periodic> {
    Periodic::start("ps-metrics", INTERVAL, move || {
        handle.run_upkeep();
        if let Some(sampler) = &sampler {
            sampler.sample();
        }
        ControlFlow::Continue(())
    })
}
