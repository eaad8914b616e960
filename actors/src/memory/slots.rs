//! Which slots of a tier are taken.

use super::MemoryError;
use crate::types::Tier;

/// A chunk-sized place in a tier's arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotIndex(pub u32);

/// Hands out the slots of one tier; the last freed goes first, since it is the likeliest to be in a cache.
#[derive(Debug)]
pub struct SlotAllocator {
    tier: Tier,
    free: Vec<SlotIndex>,
    taken: Vec<bool>,
    peak: u32,
}

impl SlotAllocator {
    /// An allocator with every slot free.
    pub fn new(tier: Tier, capacity: u32) -> Self {
        let free = (0..capacity).rev().map(SlotIndex).collect();
        SlotAllocator { tier, free, taken: vec![false; capacity as usize], peak: 0 }
    }

    /// Takes a free slot.
    pub fn alloc(&mut self) -> Result<SlotIndex, MemoryError> {
        let slot = self.free.pop().ok_or(MemoryError::OutOfSlots { tier: self.tier, need: 1, have: 0 })?;
        self.taken[slot.0 as usize] = true;
        self.peak = self.peak.max(self.used());
        Ok(slot)
    }

    /// Gives a slot back.
    pub fn free(&mut self, slot: SlotIndex) -> Result<(), MemoryError> {
        match self.taken.get_mut(slot.0 as usize) {
            Some(taken) if *taken => *taken = false,
            _ => return Err(MemoryError::NotAllocated { tier: self.tier, slot }),
        }
        self.free.push(slot);
        Ok(())
    }

    /// Slots taken now.
    pub fn used(&self) -> u32 {
        self.capacity() - self.free.len() as u32
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
}
