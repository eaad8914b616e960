//! Slots in main memory: one anonymous mapping of the exact size.

#![expect(unsafe_code, reason = "maps memory and hands out addresses in it")]

use std::ops::Range;
use std::ptr::NonNull;

use rayon::prelude::*;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use super::{MemoryError, SlotIndex, limits, numa};
use crate::types::{Bytes, Tier};

/// Slots start on a cache line, so vector loads never straddle one.
const SLOT_MULTIPLE: u64 = 64;

/// A mapping divided in slots of one size. It hands out addresses, not borrows: who may touch a slot is decided by
/// leases and streams.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    bytes: usize,
    slots: u32,
    slot_bytes: usize,
}

// SAFETY: the arena owns its mapping, which no thread is special to, and only hands out addresses.
unsafe impl Send for Arena {}
// SAFETY: as above; shared access reads plain fields.
unsafe impl Sync for Arena {}

impl Arena {
    const HUGE_PAGE: usize = 2 << 20;
    /// Bytes of a page, as x86-64 has them.
    pub(super) const PAGE: usize = 4096;

    /// Maps `slots * slot_bytes`, page aligned. What does not fit the memory this process may still take is refused
    /// here, before the mapping: the kernel would grant it and kill the process once it is touched.
    pub fn new(tier: Tier, slots: u32, slot_bytes: Bytes) -> Result<Arena, MemoryError> {
        let invalid = || MemoryError::SlotSize { tier, slots, slot_bytes, multiple: SLOT_MULTIPLE };
        if slots == 0 || slot_bytes.0 == 0 || !slot_bytes.0.is_multiple_of(SLOT_MULTIPLE) {
            return Err(invalid());
        }
        let need = slot_bytes.0.checked_mul(slots.into()).filter(|&n| n <= isize::MAX as u64).ok_or_else(invalid)?;
        if let limits::Available::Known(have) = limits::available_host_memory()
            && need > have.0
        {
            return Err(MemoryError::Insufficient { tier, need: Bytes(need), have });
        }
        let bytes = need as usize;
        // SAFETY: a new private mapping at an address of the kernel's choice overlaps nothing.
        let mapped = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        };
        let allocation = |source| MemoryError::Allocation { tier, need: Bytes(need), source };
        let mapped = mapped.map_err(|errno| allocation(errno.into()))?;
        let base =
            NonNull::new(mapped.cast::<u8>()).ok_or_else(|| allocation(std::io::ErrorKind::OutOfMemory.into()))?;
        numa::spread(base, bytes);
        #[cfg(target_os = "linux")]
        if slot_bytes.0 >= Self::HUGE_PAGE as u64 {
            // SAFETY: the range is the mapping just made. Only a hint, so a kernel without huge pages may refuse it.
            let hint = unsafe { rustix::mm::madvise(mapped, bytes, rustix::mm::Advice::LinuxHugepage) };
            if let Err(errno) = hint {
                tracing::debug!(%tier, %errno, "no huge pages for this arena");
            }
        }
        Ok(Arena { base, bytes, slots, slot_bytes: slot_bytes.0 as usize })
    }

    /// Writes to every page of these slots from all threads, so that no step pays for the first touch.
    ///
    /// # Safety
    /// Nobody may use one of them meanwhile, and what they hold is lost.
    pub unsafe fn prefault(&self, slots: Range<u32>) {
        let [from, to] = [slots.start, slots.end].map(|slot| slot.min(self.slots) as usize * self.slot_bytes);
        let base = self.base.as_ptr() as usize;
        (from / Self::HUGE_PAGE..to.div_ceil(Self::HUGE_PAGE)).into_par_iter().for_each(|piece| {
            let start = (piece * Self::HUGE_PAGE).max(from);
            let end = ((piece + 1) * Self::HUGE_PAGE).min(to);
            for offset in (start..end).step_by(Self::PAGE) {
                // SAFETY: `offset` lies in the mapping, pieces are disjoint, and the caller vouches for the slots. Volatile,
                // or the write of a zero over a zero could be left out.
                unsafe { ((base + offset) as *mut u8).write_volatile(0) };
            }
        });
    }

    /// Address of a slot, good for `slot_bytes` bytes while the arena lives.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn slot(&self, slot: SlotIndex) -> NonNull<u8> {
        assert!(slot.0 < self.slots, "slot {} of an arena of {}", slot.0, self.slots);
        // SAFETY: the slot lies inside the mapping.
        unsafe { self.base.add(slot.0 as usize * self.slot_bytes) }
    }

    /// Keeps memory for the first `slots` slots, up to the end of a page; an access to one above them is a fault of the
    /// process. What had none comes back as zeros.
    ///
    /// # Safety
    /// Nobody may touch a slot from `slots` on until it has memory again.
    pub unsafe fn back(&self, slots: u32) -> Result<u32, MemoryError> {
        let slots = slots.min(self.slots);
        let kept = (slots as usize * self.slot_bytes)
            .next_multiple_of(Self::PAGE)
            .min(self.bytes.next_multiple_of(Self::PAGE));
        let rest = self.bytes.next_multiple_of(Self::PAGE) - kept;
        let failed = |errno: rustix::io::Errno| MemoryError::Allocation {
            tier: Tier::Device,
            need: Bytes(kept as u64),
            source: errno.into(),
        };
        let start = self.base.as_ptr().cast::<std::ffi::c_void>();
        // SAFETY: both ranges are whole pages of our mapping, and the caller vouches that nobody uses the second.
        unsafe {
            if kept > 0 {
                mprotect(start, kept, MprotectFlags::READ | MprotectFlags::WRITE).map_err(failed)?;
            }
            if rest > 0 {
                let above = start.byte_add(kept);
                mprotect(above, rest, MprotectFlags::empty()).map_err(failed)?;
                #[cfg(target_os = "linux")]
                rustix::mm::madvise(above, rest, rustix::mm::Advice::LinuxDontNeed).map_err(failed)?;
            }
        }
        Ok(slots)
    }

    /// Bytes of the mapping.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many slots there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Size of a slot.
    pub fn slot_bytes(&self) -> Bytes {
        Bytes(self.slot_bytes as u64)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and addresses from it are only good while the arena lives.
        if let Err(errno) = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) } {
            tracing::error!(%errno, "an arena could not be unmapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_disjoint_aligned_zeroed_and_writable() {
        let arena = Arena::new(Tier::Host, 3, Bytes(3 << 20)).unwrap();
        // SAFETY: a fresh arena that nobody else has.
        unsafe { arena.prefault(0..3) };
        assert_eq!(arena.slot(SlotIndex(0)).as_ptr() as usize % Arena::PAGE, 0);
        for slot in 0..3 {
            let start = arena.slot(SlotIndex(slot));
            // SAFETY: a slot of an arena nobody else has.
            let slot_bytes = unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), 3 << 20) };
            assert!(slot_bytes.iter().all(|&b| b == 0));
            slot_bytes.fill(slot as u8 + 1);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_before_it_is_mapped() {
        let error = Arena::new(Tier::Host, 1 << 20, Bytes(1 << 30)).unwrap_err();
        assert!(matches!(error, MemoryError::Insufficient { .. } | MemoryError::Allocation { .. }), "{error}");
        for (slots, bytes) in [(0, 64), (1, 0), (1, 65), (u32::MAX, u64::MAX - 63)] {
            assert!(matches!(Arena::new(Tier::Host, slots, Bytes(bytes)), Err(MemoryError::SlotSize { .. })));
        }
    }
}
