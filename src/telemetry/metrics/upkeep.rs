//! The thread beside a registry: counts the samples of its histograms, and asks the kernel about the process.

use std::io;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;

use super::process::ProcessSampler;

/// Samples of histograms pile up until somebody counts them: the exporter's own interval.
const INTERVAL: Duration = Duration::from_secs(5);

/// Ends its thread when it is dropped.
pub(super) struct Upkeep {
    alive: Option<flume::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Upkeep {
    pub fn start(handle: PrometheusHandle, sampler: Option<ProcessSampler>) -> io::Result<Self> {
        let (alive, ended) = flume::bounded(0);
        let thread = Builder::new().name("ps-metrics".into()).spawn(move || {
            loop {
                handle.run_upkeep();
                if let Some(sampler) = &sampler {
                    sampler.sample();
                }
                if ended.recv_timeout(INTERVAL) == Err(flume::RecvTimeoutError::Disconnected) {
                    return;
                }
            }
        })?;
        Ok(Upkeep { alive: Some(alive), thread: Some(thread) })
    }
}

impl Drop for Upkeep {
    fn drop(&mut self) {
        self.alive = None;
        if let Some(thread) = self.thread.take() {
            // It ends at once; what it would say if it panicked, the panic has said.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn the_thread_ends_with_its_registry() {
        let handle = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder().handle();
        let upkeep = Upkeep::start(handle, None).unwrap();
        let start = Instant::now();
        // Waits for the thread.
        drop(upkeep);
        assert!(start.elapsed() < INTERVAL / 2);
    }
}
