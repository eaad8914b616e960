//! Small uploads (token ids, targets, orders of sums), and rows of tables in host memory, through pinned memory.
//!
//! A copy from ordinary memory makes the driver wait, on a spinning core, until the device gets to it. From pinned memory
//! it is queued like a kernel; the bytes must then stay where they are until the copy is over, which is what the ring
//! below keeps track of.

#![expect(unsafe_code, reason = "keeps pinned memory")]

use std::collections::VecDeque;
use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, result, sys};

use super::ops::message;

/// Holds the uploads of many steps; a larger one gets memory of its own size.
const RING: usize = 8 << 20;
const ALIGNMENT: usize = 256;

/// Pinned memory in which uploads wait for their copy.
pub(super) struct Staging {
    stream: Arc<CudaStream>,
    base: *mut u8,
    capacity: usize,
    /// Where the next upload goes.
    head: usize,
    /// Uploads that may not be over: where each lies, and the event after it. Oldest first.
    pending: VecDeque<(std::ops::Range<usize>, CudaEvent)>,
}

// SAFETY: the memory belongs to the ring, and is only touched under the lock of `CudaOps`.
unsafe impl Send for Staging {}

impl Staging {
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        Ok(Staging {
            base: allocate(RING)?,
            capacity: RING,
            head: 0,
            pending: VecDeque::new(),
            stream: Arc::clone(stream),
        })
    }

    /// Queues a copy of what `fill` writes, all of `bytes`, to `target`.
    ///
    /// # Safety
    /// `target` must have room for so many bytes in device memory until the stream has passed the copy.
    pub unsafe fn upload(
        &mut self,
        bytes: usize,
        target: u64,
        fill: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let range = self.reserve(bytes)?;
        // SAFETY: `reserve` gives a range of the ring that no pending copy reads; the memory was cleared when it was made.
        let staged = unsafe { std::slice::from_raw_parts_mut(self.base.add(range.start), bytes) };
        fill(staged)?;
        // SAFETY: the caller vouches for the target; the source stays until the event below.
        unsafe { result::memcpy_htod_async(target, staged, self.stream.cu_stream()) }.map_err(message)?;
        let event = self.stream.record_event(Some(CU_EVENT_BLOCKING_SYNC)).map_err(message)?;
        self.pending.push_back((range, event));
        Ok(())
    }

    /// Copies `bytes` from `source`, waits until they are there, and passes them to `read`.
    ///
    /// # Safety
    /// So many bytes must be in device memory at `source` when the stream gets to the copy.
    pub unsafe fn download(&mut self, source: u64, bytes: usize, read: impl FnOnce(&[u8]) -> Result<()>) -> Result<()> {
        let range = self.reserve(bytes)?;
        // SAFETY: as in `upload`.
        let staged = unsafe { std::slice::from_raw_parts_mut(self.base.add(range.start), bytes) };
        // SAFETY: the caller vouches for the source; nobody else gets the range before the copy is over.
        unsafe { result::memcpy_dtoh_async(staged, source, self.stream.cu_stream()) }.map_err(message)?;
        let event = self.stream.record_event(Some(CU_EVENT_BLOCKING_SYNC)).map_err(message)?;
        event.synchronize().map_err(message)?;
        read(staged)
    }

    fn reserve(&mut self, bytes: usize) -> Result<std::ops::Range<usize>> {
        let length = bytes.next_multiple_of(ALIGNMENT);
        if length > self.capacity {
            self.grow(length)?;
        }
        if self.head + length > self.capacity {
            self.head = 0;
        }
        let range = self.head..self.head + length;
        // Ranges are handed out in order, so what is in the way is the oldest.
        while let Some((oldest, event)) = self.pending.front() {
            let in_the_way = oldest.start < range.end && range.start < oldest.end;
            if !in_the_way && !event.is_complete() {
                break;
            }
            event.synchronize().map_err(message)?;
            self.pending.pop_front();
        }
        self.head = range.end;
        Ok(range)
    }

    fn grow(&mut self, capacity: usize) -> Result<()> {
        for (_, event) in self.pending.drain(..) {
            event.synchronize().map_err(message)?;
        }
        let base = allocate(capacity)?;
        // SAFETY: allocated by `allocate`, and no copy is pending.
        unsafe { result::free_host(self.base.cast()) }.map_err(message)?;
        (self.base, self.capacity, self.head) = (base, capacity, 0);
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for (_, event) in self.pending.drain(..) {
            let _ = event.synchronize();
        }
        // SAFETY: as in `grow`.
        let _ = unsafe { result::free_host(self.base.cast()) };
    }
}

fn allocate(bytes: usize) -> Result<*mut u8> {
    // SAFETY: plain pinned memory, freed by whoever holds the address.
    let address: *mut u8 =
        unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE) }.map_err(message)?.cast();
    // SAFETY: just made, so many bytes.
    unsafe { address.write_bytes(0, bytes) };
    Ok(address)
}
