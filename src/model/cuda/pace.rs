//! How far the host queues ahead of the GPU. A driver's queue has an end, and a call that finds no room there spins on a core
//! until there is some: so the thread sleeps before that, while there is still enough in the queue. The runtime's limit on
//! blocks does not see how many kernels are in one, and this does not see what candle queues.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};

use super::ops::message;

/// Kernels and products from one mark to the next.
const PER_MARK: u64 = 128;
/// Marks that the GPU may not have reached yet: with what comes after the last, at most so many and one times `PER_MARK` of them
/// are queued, and what copies and allocations are between them. They last the GPU a millisecond at least, and waking takes a
/// tenth of that.
const AHEAD: usize = 2;

/// Marks in a stream, which the GPU has not reached when they were last looked at.
#[derive(Default)]
pub(super) struct Pace {
    calls: AtomicU64,
    marks: Mutex<VecDeque<CudaEvent>>,
}

impl Pace {
    /// After each kernel or product that was queued: waits where the GPU is too far behind.
    pub fn queued(&self, stream: &CudaStream) -> Result<()> {
        let calls = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        if !calls.is_multiple_of(PER_MARK) {
            return Ok(());
        }
        let oldest = {
            let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
            marks.push_back(stream.record_event(Some(CU_EVENT_BLOCKING_SYNC)).map_err(message)?);
            if marks.len() > AHEAD { marks.pop_front() } else { None }
        };
        oldest.map_or(Ok(()), |mark| mark.synchronize().map_err(message))
    }
}
