//! A thread beside a training on a GPU: looks who else takes its memory, and how it is.
//!
//! The questions take milliseconds, so they are asked here and seldom; everybody else reads what was found last.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use patrickstar_actors::cuda::Gpu;
use patrickstar_actors::neighbours::DeviceReading;
use patrickstar_actors::types::Bytes;

use crate::error::Error;
use crate::telemetry::metrics;
use crate::telemetry::periodic::Periodic;

const INTERVAL: Duration = Duration::from_secs(5);
/// Neighbours that grew by less since they were last spoken of are not worth a line.
const WORTH_A_LINE: u64 = 256 << 20;

/// Starts the thread.
pub(super) fn start(gpu: Arc<Gpu>) -> Result<Periodic, Error> {
    let mut known = Bytes(0);
    Periodic::start("ps-gpu-watch", INTERVAL, move || look(&gpu, &mut known))
        .map_err(|error| Error::Failed(format!("there is no thread to watch the GPU: {error}")))
}

/// Looks once; goes on as long as there is more to see.
fn look(gpu: &Gpu, known: &mut Bytes) -> ControlFlow<()> {
    match gpu.inspect() {
        Ok(reading) => {
            if let Some(registry) = metrics::installed() {
                metrics::show_device(registry, &reading);
            }
            speak(&reading, known);
            ControlFlow::Continue(())
        }
        Err(error) => {
            tracing::warn!("the GPU is not watched any more: {error}");
            ControlFlow::Break(())
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
