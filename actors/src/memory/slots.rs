//! Which slots of a tier are taken.

use std::collections::BTreeSet;

use super::MemoryError;
use crate::types::Tier;

/// A chunk-sized place in a tier's arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotIndex(pub u32);

/// Hands out the slots of one tier, the lowest first, so that the high end empties when fewer are used.
#[derive(Debug)]
pub struct SlotAllocator {
    tier: Tier,
    /// Below `limit` and not taken.
    free: BTreeSet<SlotIndex>,
    taken: Vec<bool>,
    used: u32,
    limit: u32,
    peak: u32,
}

impl SlotAllocator {
    /// An allocator with every slot free.
    pub fn new(tier: Tier, capacity: u32) -> Self {
        let free = (0..capacity).map(SlotIndex).collect();
        SlotAllocator { tier, free, taken: vec![false; capacity as usize], used: 0, limit: capacity, peak: 0 }
    }

    /// Takes a free slot.
    pub fn alloc(&mut self) -> Result<SlotIndex, MemoryError> {
        let slot = self.free.pop_first().ok_or(MemoryError::OutOfSlots { tier: self.tier, need: 1, have: 0 })?;
        self.taken[slot.0 as usize] = true;
        self.used += 1;
        self.peak = self.peak.max(self.used);
        Ok(slot)
    }

    /// Gives a slot back.
    pub fn free(&mut self, slot: SlotIndex) -> Result<(), MemoryError> {
        match self.taken.get_mut(slot.0 as usize) {
            Some(taken) if *taken => *taken = false,
            _ => return Err(MemoryError::NotAllocated { tier: self.tier, slot }),
        }
        self.used -= 1;
        if slot.0 < self.limit {
            self.free.insert(slot);
        }
        Ok(())
    }

    /// From now on only slots below `limit` are handed out; those above it that are taken stay so until they are freed.
    pub fn set_limit(&mut self, limit: u32) {
        let limit = limit.min(self.capacity());
        drop(self.free.split_off(&SlotIndex(limit)));
        let taken = &self.taken;
        self.free.extend((self.limit..limit).filter(|&slot| !taken[slot as usize]).map(SlotIndex));
        self.limit = limit;
    }

    /// Slots below this one are handed out.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Slots that can be taken now.
    pub fn available(&self) -> u32 {
        self.free.len() as u32
    }

    /// One past the highest slot that is taken.
    pub fn end(&self) -> u32 {
        self.taken.iter().rposition(|&taken| taken).map_or(0, |last| last as u32 + 1)
    }

    /// Slots taken now.
    pub fn used(&self) -> u32 {
        self.used
    }

    /// The most slots that were ever taken at once.
    pub fn peak(&self) -> u32 {
        self.peak
    }

    /// All slots.
    pub fn capacity(&self) -> u32 {
        self.taken.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_distinct_counted_and_freed_once() {
        let mut slots = SlotAllocator::new(Tier::Host, 3);
        let taken: Vec<_> = (0..3).map(|_| slots.alloc().unwrap()).collect();
        assert_eq!(taken, [SlotIndex(0), SlotIndex(1), SlotIndex(2)]);
        let error = slots.alloc().unwrap_err();
        assert!(matches!(error, MemoryError::OutOfSlots { tier: Tier::Host, need: 1, have: 0 }), "{error}");
        slots.free(SlotIndex(1)).unwrap();
        for slot in [SlotIndex(1), SlotIndex(3)] {
            assert!(matches!(slots.free(slot), Err(MemoryError::NotAllocated { .. })));
        }
        assert_eq!((slots.used(), slots.peak(), slots.capacity()), (2, 3, 3));
        assert_eq!(slots.alloc().unwrap(), SlotIndex(1));
    }

    #[test]
    fn the_lowest_goes_first_and_none_above_the_limit() {
        let mut slots = SlotAllocator::new(Tier::Device, 6);
        for expected in 0..5 {
            assert_eq!(slots.alloc().unwrap().0, expected);
        }
        slots.set_limit(3);
        assert_eq!((slots.available(), slots.used(), slots.end()), (0, 5, 5));
        for slot in [4, 2, 0] {
            slots.free(SlotIndex(slot)).unwrap();
        }
        assert_eq!((slots.available(), slots.end()), (2, 4));
        assert_eq!(slots.alloc().unwrap(), SlotIndex(0));
        slots.set_limit(6);
        assert_eq!((slots.available(), slots.limit()), (3, 6));
        let order: Vec<_> = (0..3).map(|_| slots.alloc().unwrap().0).collect();
        assert_eq!(order, [2, 4, 5]);
    }
}
