//! A thread beside a training on a GPU: looks who else takes its memory, and how it is.
//!
//! The questions take milliseconds, so they are asked here and seldom; everybody else reads what was found last.

use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use patrickstar_actors::cuda::Gpu;
use patrickstar_actors::neighbours::DeviceReading;
use patrickstar_actors::types::Bytes;

use crate::error::Error;
use crate::telemetry::metrics;

const INTERVAL: Duration = Duration::from_secs(5);
/// Neighbours that grew by less since they were last spoken of are not worth a line.
const WORTH_A_LINE: u64 = 256 << 20;

/// Ends its thread when it is dropped.
pub(crate) struct Watch {
    alive: Option<flume::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub fn start(gpu: Arc<Gpu>) -> Result<Self, Error> {
        let (alive, ended) = flume::bounded(0);
        let watch = move || {
            let mut known = Bytes(0);
            while look(&gpu, &mut known) {
                if ended.recv_timeout(INTERVAL) == Err(flume::RecvTimeoutError::Disconnected) {
                    return;
                }
            }
        };
        let thread = Builder::new()
            .name("ps-gpu-watch".into())
            .spawn(watch)
            .map_err(|error| Error::Failed(format!("there is no thread to watch the GPU: {error}")))?;
        Ok(Watch { alive: Some(alive), thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.alive = None;
        if let Some(thread) = self.thread.take() {
            // It ends at once; what it would say if it panicked, the panic has said.
            let _ = thread.join();
        }
    }
}

/// Looks once; whether there will be more to see.
fn look(gpu: &Gpu, known: &mut Bytes) -> bool {
    match gpu.inspect() {
        Ok(reading) => {
            if let Some(registry) = metrics::installed() {
                metrics::show_device(registry, &reading);
            }
            speak(&reading, known);
            true
        }
        Err(error) => {
            tracing::warn!("the GPU is not watched any more: {error}");
            false
        }
    }
}

/// Says who took memory, or that it came back.
fn speak(reading: &DeviceReading, known: &mut Bytes) {
    let Some(now) = reading.neighbours.bytes() else { return };
    if now.0.abs_diff(known.0) >= WORTH_A_LINE {
        let DeviceReading { neighbours, free, total, .. } = reading;
        tracing::info!("neighbours on the GPU hold {now} (before: {known}): {neighbours}; {free} are free of {total}");
        *known = now;
    }
}
