//! Copies of chunks between host and device, both ways at once, for as long as something else is measured.

#![expect(unsafe_code, reason = "queues copies by address")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use patrickstar_actors::error::RuntimeError;
use patrickstar_actors::memory::{Arena, Backend, MemoryError, Slab, SlotIndex};
use patrickstar_actors::types::{Bytes, Tier};

use crate::Error;

const SLOT: Bytes = Bytes(128 << 20);
/// Slots that a direction goes round, in each of the two memories: the next copy is queued while one runs.
const ROUND: u32 = 2;

/// Memory to copy between.
pub struct Traffic {
    backend: Arc<dyn Backend>,
    device: Box<dyn Slab>,
    host: Box<dyn Slab>,
}

/// Bytes a second.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    pub to_device: f64,
    pub to_host: f64,
}

fn failed(error: MemoryError) -> Error {
    RuntimeError::from(error).into()
}

impl Traffic {
    pub fn new(backend: Arc<dyn Backend>) -> Result<Self, Error> {
        let device = backend.device_slab(2 * ROUND, SLOT).map_err(failed)?;
        let arena = Arena::new(Tier::Host, 2 * ROUND, SLOT).map_err(failed)?;
        let host = backend.host_slab(arena).map_err(failed)?;
        Ok(Traffic { backend, device, host })
    }

    /// Copies while `work` runs.
    pub fn beside<T>(&self, work: impl FnOnce() -> Result<T, Error>) -> Result<(T, Rates), Error> {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let to_device = scope.spawn(|| self.copy(&*self.host, &*self.device, 0, &stop));
            let to_host = scope.spawn(|| self.copy(&*self.device, &*self.host, ROUND, &stop));
            let outcome = work();
            stop.store(true, Ordering::Relaxed);
            let rate = |copying: std::thread::ScopedJoinHandle<'_, Result<f64, MemoryError>>| {
                let ended = copying.join().map_err(|_| Error::Failed("a thread that copies panicked".into()))?;
                ended.map_err(failed)
            };
            let rates = Rates { to_device: rate(to_device)?, to_host: rate(to_host)? };
            Ok((outcome?, rates))
        })
    }

    /// Bytes a second from slots of `from` to those of `to`, until `stop`.
    fn copy(&self, from: &dyn Slab, to: &dyn Slab, first: u32, stop: &AtomicBool) -> Result<f64, MemoryError> {
        let mut stream = self.backend.new_stream("traffic")?;
        let began = Instant::now();
        let (mut copies, mut before) = (0u32, None);
        while !stop.load(Ordering::Relaxed) {
            let slot = SlotIndex(first + copies % ROUND);
            let (source, target) = (from.slot(slot).as_ptr(), to.slot(slot).as_ptr());
            // SAFETY: slots of this direction alone, which outlive the thread; it waits for its last copy below.
            unsafe { stream.copy(source, target, SLOT.0 as usize)? };
            let done = stream.record()?;
            copies += 1;
            // One copy runs while the next one waits.
            if let Some(event) = before.replace(done) {
                event.synchronize()?;
            }
        }
        if let Some(event) = before {
            event.synchronize()?;
        }
        Ok(f64::from(copies) * SLOT.0 as f64 / began.elapsed().as_secs_f64())
    }
}
