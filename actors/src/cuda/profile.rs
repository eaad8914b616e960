//! Where the GPU's time goes: events around every kernel, while somebody asks for them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{CudaEvent, CudaStream};

use super::context::device_error;
use crate::memory::MemoryError;

/// Calls and time of one class of kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassTime {
    /// Kernels.
    pub calls: u64,
    /// From the start of each to its end on the device.
    pub time: Duration,
    /// What queuing them took the host.
    pub host: Duration,
}

struct Span {
    class: &'static str,
    start: CudaEvent,
    end: CudaEvent,
    host: Duration,
}

/// Times kernels by class. Events cost a microsecond a kernel, so it is off unless asked for.
#[derive(Default)]
pub struct Profile {
    enabled: AtomicBool,
    spans: Mutex<Vec<Span>>,
}

impl Profile {
    /// Starts or stops recording.
    pub fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::Relaxed);
    }

    /// Queues `work`, between two events while recording.
    pub fn span<E>(
        &self,
        class: &'static str,
        stream: &CudaStream,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E>
    where
        E: From<MemoryError>,
    {
        if !self.enabled.load(Ordering::Relaxed) {
            return work();
        }
        let record =
            || stream.record_event(Some(CU_EVENT_DEFAULT)).map_err(|error| device_error("time a kernel", error));
        let start = record()?;
        let began = Instant::now();
        work()?;
        let host = began.elapsed();
        let end = record()?;
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).push(Span { class, start, end, host });
        Ok(())
    }

    /// Waits for everything recorded and returns it by class.
    pub fn take(&self) -> Result<BTreeMap<&'static str, ClassTime>, MemoryError> {
        let spans = std::mem::take(&mut *self.spans.lock().unwrap_or_else(PoisonError::into_inner));
        let mut classes: BTreeMap<&'static str, ClassTime> = BTreeMap::new();
        for Span { class, start, end, host } in spans {
            // Waits for both.
            let milliseconds = start.elapsed_ms(&end).map_err(|error| device_error("time a kernel", error))?;
            let entry = classes.entry(class).or_default();
            entry.calls += 1;
            entry.host += host;
            entry.time += Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3);
        }
        Ok(classes)
    }
}
