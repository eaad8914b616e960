//! Host memory that is registered for a device's copies part by part, while its first slots are in use already.
//!
//! Pinning pages takes seconds for a large arena, and one core; drawing weights takes seconds of all others. A slot's address
//! is not given before its part is registered, so whoever fills slots from the first one on follows the registration.

#![expect(unsafe_code, reason = "registers memory by address")]

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::{Arena, MemoryError, Slab, SlotIndex};
use crate::types::{Bytes, Tier};

/// What a part of a tier has at least: long enough for all cores to fault its pages in together.
pub(super) const PART: Bytes = Bytes(1 << 30);

/// A device that copies without staging from memory that it knows.
pub(super) trait Registrar: Send + Sync + 'static {
    /// Makes the range known.
    ///
    /// # Safety
    /// It must be whole pages of a mapping that stays until `unregister`, its last page excepted.
    unsafe fn register(&self, start: NonNull<u8>, bytes: usize) -> Result<(), MemoryError>;
    /// Forgets the range that begins at `start`.
    ///
    /// # Safety
    /// `register` made it known, and nothing is copied from or to it any more.
    unsafe fn unregister(&self, start: NonNull<u8>);
}

/// An arena on its way to a device's knowledge.
pub(super) struct RegisteredArena {
    work: Arc<Work>,
    worker: Option<JoinHandle<()>>,
}

struct Work {
    registrar: Box<dyn Registrar>,
    arena: Arena,
    /// Slots whose address may be given; all of them once the work has ended, well or not.
    ready: AtomicU32,
    given_up: AtomicBool,
    state: Mutex<State>,
    progress: Condvar,
}

#[derive(Default)]
struct State {
    /// First slots of the parts that are registered.
    parts: Vec<u32>,
    failed: Option<MemoryError>,
    ended: bool,
}

impl RegisteredArena {
    /// Begins to register `arena`. One part is registered when this returns, several go on in a thread of their own.
    /// Parts have `least` bytes or more.
    pub fn new(registrar: impl Registrar, arena: Arena, least: Bytes) -> Result<Self, MemoryError> {
        let parts = parts(arena.slots(), arena.slot_bytes(), least);
        let work = Arc::new(Work {
            registrar: Box::new(registrar),
            arena,
            ready: AtomicU32::new(0),
            given_up: AtomicBool::new(false),
            state: Mutex::default(),
            progress: Condvar::new(),
        });
        let mut registered = RegisteredArena { work: Arc::clone(&work), worker: None };
        if parts.len() == 1 {
            work.run(&parts);
            registered.registered()?;
        } else {
            let thread = std::thread::Builder::new().name("ps-register".into()).spawn(move || work.run(&parts));
            registered.worker = Some(thread.map_err(|source| MemoryError::Allocation {
                tier: Tier::Host,
                need: Bytes(registered.work.arena.bytes() as u64),
                source,
            })?);
        }
        Ok(registered)
    }
}

/// Slots of which a part is made: a copy must not cross the border of two, and borders are those of pages.
fn parts(slots: u32, slot_bytes: Bytes, least: Bytes) -> Vec<Range<u32>> {
    let page = Arena::PAGE as u64;
    // The fewest slots that are whole pages: a power of two, as a page is one.
    let whole = 1 << (page.trailing_zeros() - slot_bytes.0.trailing_zeros().min(page.trailing_zeros()));
    let each = least.0.div_ceil(slot_bytes.0).next_multiple_of(whole).min(u64::from(slots.max(1))) as u32;
    (0..slots).step_by(each as usize).map(|first| first..slots.min(first.saturating_add(each))).collect()
}

impl Work {
    fn run(&self, parts: &[Range<u32>]) {
        let _end = End(self);
        for part in parts {
            if self.given_up.load(Ordering::Relaxed) {
                return;
            }
            let bytes = (part.end - part.start) as usize * self.arena.slot_bytes().0 as usize;
            let start = self.arena.slot(SlotIndex(part.start));
            // Registering faults pages in one by one; touching them first from all cores is many times faster.
            // SAFETY: nobody has the address of a slot from `ready` on; the mapping stays until `drop` has unregistered it.
            let outcome = unsafe {
                self.arena.prefault(part.clone());
                self.registrar.register(start, bytes)
            };
            let mut state = self.lock();
            match outcome {
                Ok(()) => state.parts.push(part.start),
                Err(error) => {
                    state.failed = Some(error);
                    return;
                }
            }
            self.ready.store(part.end, Ordering::Release);
            self.progress.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nobody waits for work that has ended, however it has: `registered` tells.
struct End<'a>(&'a Work);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.ended = true;
        if std::thread::panicking() {
            let source = std::io::Error::other("the thread that registers it panicked");
            let need = Bytes(self.0.arena.bytes() as u64);
            state.failed = Some(MemoryError::Allocation { tier: Tier::Host, need, source });
        }
        // Under the lock: whoever looked before it waits by now, and is woken.
        self.0.ready.store(u32::MAX, Ordering::Release);
        self.0.progress.notify_all();
    }
}

impl Slab for RegisteredArena {
    fn slot(&self, index: SlotIndex) -> NonNull<u8> {
        let work = &self.work;
        if work.ready.load(Ordering::Acquire) <= index.0 {
            let mut state = work.lock();
            while work.ready.load(Ordering::Acquire) <= index.0 {
                state = work.progress.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        work.arena.slot(index)
    }

    fn slots(&self) -> u32 {
        self.work.arena.slots()
    }

    fn slot_bytes(&self) -> Bytes {
        self.work.arena.slot_bytes()
    }

    fn region_end(&self, _slots: u32) -> u32 {
        self.work.arena.slots()
    }

    /// Registered memory stays.
    unsafe fn back(&self, _slots: u32) -> Result<u32, MemoryError> {
        Ok(self.work.arena.slots())
    }

    fn registered(&self) -> Result<(), MemoryError> {
        let work = &self.work;
        let mut state = work.lock();
        while !state.ended {
            state = work.progress.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.failed.take().map_or(Ok(()), Err)
    }
}

impl Drop for RegisteredArena {
    fn drop(&mut self) {
        self.work.given_up.store(true, Ordering::Relaxed);
        if self.worker.take().is_some_and(|worker| worker.join().is_err()) {
            tracing::error!("the thread that registers host memory panicked");
        }
        for &first in &self.work.lock().parts {
            // SAFETY: `run` registered it; whoever copies holds the slab.
            unsafe { self.work.registrar.unregister(self.work.arena.slot(SlotIndex(first))) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Notes what is registered, each part once somebody allows it.
    struct Notes {
        ranges: Arc<Mutex<Vec<(usize, usize)>>>,
        allowed: flume::Receiver<bool>,
    }

    impl Registrar for Notes {
        unsafe fn register(&self, start: NonNull<u8>, bytes: usize) -> Result<(), MemoryError> {
            if !self.allowed.recv().unwrap_or(false) {
                return Err(MemoryError::OutOfSlots { tier: Tier::Host, need: 1, have: 0 });
            }
            self.ranges.lock().unwrap().push((start.as_ptr() as usize, bytes));
            Ok(())
        }

        unsafe fn unregister(&self, start: NonNull<u8>) {
            self.ranges.lock().unwrap().retain(|&(other, _)| other != start.as_ptr() as usize);
        }
    }

    #[test]
    fn parts_are_whole_pages_and_whole_slots() {
        let part = PART.0;
        for (slots, slot) in [(1, 64), (200, part / 2 + 64), (9, part), (1000, 300 << 20), (7, (128 << 20) + 2048)] {
            let parts = parts(slots, Bytes(slot), PART);
            let ends: Vec<u32> = parts.iter().map(|part| part.end).collect();
            assert!(parts.iter().map(|part| part.start).eq(std::iter::once(0).chain(ends.clone()).take(parts.len())));
            assert_eq!(ends.last(), Some(&slots));
            for part in &parts {
                assert!((u64::from(part.start) * slot).is_multiple_of(Arena::PAGE as u64), "{part:?} of {slot}");
                assert!(part.end == slots || u64::from(part.end - part.start) * slot >= PART.0, "{part:?} of {slot}");
            }
        }
    }

    #[test]
    fn a_slot_is_given_once_its_part_is_registered_and_a_failure_is_told() {
        let (allow, allowed) = flume::unbounded();
        let ranges = Arc::new(Mutex::new(Vec::new()));
        let slot = Bytes(Arena::PAGE as u64);
        let arena = Arena::new(Tier::Host, 3, slot).unwrap();
        let arena = RegisteredArena::new(Notes { ranges: Arc::clone(&ranges), allowed }, arena, slot).unwrap();
        // Dropped before the arena, whose thread then does not wait for it: a failed assertion ends the test.
        let allow = allow;
        allow.send(true).unwrap();
        let first = arena.slot(SlotIndex(0));
        assert_eq!(*ranges.lock().unwrap(), [(first.as_ptr() as usize, Arena::PAGE)]);
        std::thread::scope(|scope| {
            let (begin, begun) = flume::bounded(1);
            let second = scope.spawn({
                let arena = &arena;
                move || {
                    begin.send(()).unwrap();
                    arena.slot(SlotIndex(1));
                }
            });
            begun.recv().unwrap();
            std::thread::sleep(Duration::from_millis(20));
            assert!(!second.is_finished(), "the address of a slot that is not registered");
            allow.send(true).unwrap();
            second.join().unwrap();
        });
        assert_eq!(ranges.lock().unwrap().len(), 2);
        allow.send(false).unwrap();
        // Nobody waits for ever.
        arena.slot(SlotIndex(2));
        assert!(matches!(arena.registered(), Err(MemoryError::OutOfSlots { .. })));
        drop(arena);
        assert!(ranges.lock().unwrap().is_empty(), "what was registered is forgotten");
    }
}
