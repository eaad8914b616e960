//! Counts what the compute thread allocates: non-model memory of the CPU backend, where activations are plain vectors.
//!
//! The binary installs [`CountingAllocator`]. Only allocations of at least 1 KiB on threads that asked to be tracked are
//! counted, and frees on those threads are subtracted; a block that is allocated on a tracked thread and freed on another
//! would stay counted, so the counters start from zero whenever a thread begins to be tracked. Without the allocator all
//! counters stay at zero.

#![expect(unsafe_code, reason = "is an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicI64, Ordering};

/// Smaller blocks are not activations.
const THRESHOLD: usize = 1 << 10;

static LIVE: AtomicI64 = AtomicI64::new(0);
static PEAK: AtomicI64 = AtomicI64::new(0);

thread_local! {
    static TRACKED: Cell<bool> = const { Cell::new(false) };
}

/// Counts this thread's allocations from now on, or no more.
pub fn track_this_thread(on: bool) {
    let was = TRACKED.with(|tracked| tracked.replace(on));
    if on && !was {
        LIVE.store(0, Ordering::Relaxed);
        PEAK.store(0, Ordering::Relaxed);
    }
}

/// Bytes allocated and not freed on tracked threads.
pub fn live_bytes() -> u64 {
    LIVE.load(Ordering::Relaxed).max(0) as u64
}

/// Highest `live_bytes` since the last reset.
pub fn peak_bytes() -> u64 {
    PEAK.load(Ordering::Relaxed).max(0) as u64
}

/// Lets the peak start again from what lives now.
pub fn reset_peak() {
    PEAK.store(LIVE.load(Ordering::Relaxed), Ordering::Relaxed);
}

fn count(bytes: usize, sign: i64) {
    // Thread-local storage may be gone while a thread ends: then nothing is counted.
    if bytes >= THRESHOLD && TRACKED.try_with(Cell::get).unwrap_or(false) {
        let live = LIVE.fetch_add(sign * bytes as i64, Ordering::Relaxed) + sign * bytes as i64;
        PEAK.fetch_max(live, Ordering::Relaxed);
    }
}

/// The system's allocator, counting.
pub struct CountingAllocator;

// SAFETY: every call goes to `System` unchanged; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: the caller's contract is System's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(layout.size(), -1);
        count(size, 1);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}
