//! What moves bytes between tiers: slabs, streams and events of a device.

#![expect(unsafe_code, reason = "copies by address")]

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use super::{Arena, MemoryError, SlotIndex};
use crate::adam::StepScalars;
use crate::types::{Bytes, Precision, Tier};

/// A point in a stream; complete once everything queued before it is done.
pub trait DeviceEvent: Any + Send + Sync {
    /// Whether the stream has passed it. Never blocks.
    fn is_complete(&self) -> Result<bool, MemoryError>;
    /// Blocks the calling thread until the stream has passed it.
    fn synchronize(&self) -> Result<(), MemoryError>;
    /// The device's time between two events that it has passed; `None` where it keeps none.
    fn elapsed_since(&self, earlier: &Event) -> Result<Option<Duration>, MemoryError>;
}

/// A recorded event, of whichever backend recorded it.
pub type Event = Arc<dyn DeviceEvent>;

/// Work that runs in order, beside the work of other streams.
pub trait Stream: Send {
    /// Queues a copy; the direction follows from the addresses.
    ///
    /// # Safety
    /// Both ranges must be valid and disjoint, and stay untouched by others, until an event recorded later completes.
    unsafe fn copy(&mut self, src: *const u8, dst: *mut u8, bytes: usize) -> Result<(), MemoryError>;
    /// Queues zeroes.
    ///
    /// # Safety
    /// As for [`Stream::copy`].
    unsafe fn zero(&mut self, dst: *mut u8, bytes: usize) -> Result<(), MemoryError>;
    /// Whatever is queued from now on starts after `event`, which a stream of the same backend recorded. Does not block
    /// the calling thread.
    fn wait(&mut self, event: &Event) -> Result<(), MemoryError>;
    /// Marks the end of what is queued so far.
    fn record(&mut self) -> Result<Event, MemoryError>;
    /// Runs `callback` after what is queued so far, possibly on a thread of the driver: it must be brief and must not
    /// call the backend.
    fn on_complete(&mut self, callback: Box<dyn FnOnce() + Send>) -> Result<(), MemoryError>;
}

/// Slots at fixed addresses, in whichever memory.
pub trait Slab: Send + Sync {
    /// Address of a slot; on a device it means something to that device only.
    fn slot(&self, slot: SlotIndex) -> NonNull<u8>;
    /// How many slots there are.
    fn slots(&self) -> u32;
    /// Size of a slot.
    fn slot_bytes(&self) -> Bytes;
    /// The first slots that have memory once the first `slots` have: memory comes in regions.
    fn region_end(&self, slots: u32) -> u32;
    /// Gives memory to the slots below `region_end(slots)` and takes it from those above, which lose their contents and
    /// keep their addresses. Returns how many have memory then: fewer if the device has no more to give.
    ///
    /// # Safety
    /// Nobody may touch a slot above `region_end(slots)` from now until it has memory again, and nothing may be queued that
    /// does.
    unsafe fn back(&self, slots: u32) -> Result<u32, MemoryError>;
    /// Waits until a device copies from and to every slot without staging; the first call tells what it could not register.
    fn registered(&self) -> Result<(), MemoryError> {
        Ok(())
    }
}

/// Memory of a device that this process has or could have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRoom {
    /// Nobody has it.
    pub free: Bytes,
    /// The pool of non-model memory has it.
    pub pool: Bytes,
}

/// A device: its memory and its streams. What a backend leaves out is as on a device in main memory: nothing has to be
/// registered, nobody else takes of it, and the model computes before it returns.
pub trait Backend: Send + Sync + 'static {
    /// A new stream; `name` is for profiles and logs.
    fn new_stream(&self, name: &str) -> Result<Box<dyn Stream>, MemoryError>;
    /// Allocates the device tier.
    fn device_slab(&self, slots: u32, slot_bytes: Bytes) -> Result<Box<dyn Slab>, MemoryError>;
    /// Whether slots and non-model memory are two allocations, neither of which can use what the other leaves.
    fn separates_non_model(&self) -> bool;
    /// Registers the host tier for direct copies, until the slab is dropped. Addresses do not change; `Slab::registered` says
    /// how it went.
    fn host_slab(&self, arena: Arena) -> Result<Box<dyn Slab>, MemoryError> {
        Ok(Box::new(arena))
    }
    /// From now on non-model memory may not exceed `limit`: what asks for more gets an error. Without effect where slots
    /// and non-model memory are one allocation.
    fn cap_non_model(&self, _limit: Bytes) -> Result<(), MemoryError> {
        Ok(())
    }
    /// What the pool of non-model memory has beyond `keep` and nobody uses goes back to the device. Without effect where
    /// slots and non-model memory are one allocation.
    fn trim_non_model(&self, _keep: Bytes) -> Result<(), MemoryError> {
        Ok(())
    }
    /// Memory that is left on the device; `None` where nobody else takes of it.
    fn room(&self) -> Result<Option<DeviceRoom>, MemoryError> {
        Ok(None)
    }
    /// The end of what the model has queued so far; `None` where the model computes before it returns.
    fn compute_event(&self) -> Result<Option<Event>, MemoryError> {
        Ok(None)
    }
    /// What the model queues from now on starts after `event`. Does not block the calling thread.
    fn hold_compute(&self, _event: &Event) -> Result<(), MemoryError> {
        Ok(())
    }
    /// Arithmetic on chunks in the device tier; `None` where the host can do it there.
    fn math(&self) -> Result<Option<Box<dyn DeviceMath>>, MemoryError> {
        Ok(None)
    }
}

/// Where the states of a run of elements lie. `low` is null where the precision has none.
#[derive(Clone, Copy, Debug)]
pub struct StateAddresses {
    /// Weights, or their high halves.
    pub weight: *mut u8,
    /// Low halves.
    pub low: *mut u8,
    /// fp32 weights, where `weight` is not their high half; null elsewhere.
    pub master: *mut u8,
    /// First moments.
    pub momentum: *mut u8,
    /// Second moments.
    pub variance: *mut u8,
    /// Gradients.
    pub gradient: *mut u8,
}

/// A gradient of `rows * columns` elements, row by row.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Where it begins.
    pub gradient: *const u8,
    /// Its rows.
    pub rows: usize,
    /// Elements of a row.
    pub columns: usize,
}

/// The optimizer's and reduction's arithmetic on a device, with the bits of the host's. Work is queued in order.
pub trait DeviceMath: Send + Sync {
    /// Queues one step of Adam over `elements` elements.
    ///
    /// # Safety
    /// The addresses must be those of leased chunks on this device, with room for `elements` elements of `precision`.
    unsafe fn step(
        &self,
        precision: Precision,
        scalars: &StepScalars,
        decay: bool,
        states: StateAddresses,
        elements: usize,
    ) -> Result<(), MemoryError>;
    /// The sums of squares of the rows of each gradient, after what is queued. Waits once, however many there are.
    ///
    /// # Safety
    /// The addresses must be those of leased chunks on this device, with room for `rows * columns` elements.
    unsafe fn row_sums(&self, precision: Precision, gradients: &[Rows]) -> Result<Vec<Vec<f64>>, MemoryError>;
    /// Waits for everything queued.
    fn finish(&self) -> Result<(), MemoryError>;
}

impl Slab for Arena {
    fn slot(&self, slot: SlotIndex) -> NonNull<u8> {
        Arena::slot(self, slot)
    }

    fn slots(&self) -> u32 {
        Arena::slots(self)
    }

    fn slot_bytes(&self) -> Bytes {
        Arena::slot_bytes(self)
    }

    fn region_end(&self, slots: u32) -> u32 {
        slots.min(Arena::slots(self))
    }

    unsafe fn back(&self, slots: u32) -> Result<u32, MemoryError> {
        // SAFETY: the caller vouches for the slots above.
        unsafe { Arena::back(self, slots) }
    }
}

/// The backend without a device: the device tier lies in main memory, and a stream works on the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuBackend;

/// A stream whose work is done when the call returns.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuStream;

/// An event that was complete when it was recorded.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuEvent;

impl DeviceEvent for CpuEvent {
    fn is_complete(&self) -> Result<bool, MemoryError> {
        Ok(true)
    }

    fn synchronize(&self) -> Result<(), MemoryError> {
        Ok(())
    }

    fn elapsed_since(&self, _earlier: &Event) -> Result<Option<Duration>, MemoryError> {
        Ok(None)
    }
}

impl Stream for CpuStream {
    unsafe fn copy(&mut self, src: *const u8, dst: *mut u8, bytes: usize) -> Result<(), MemoryError> {
        // SAFETY: the caller vouches for both ranges.
        unsafe { std::ptr::copy_nonoverlapping(src, dst, bytes) };
        Ok(())
    }

    unsafe fn zero(&mut self, dst: *mut u8, bytes: usize) -> Result<(), MemoryError> {
        // SAFETY: the caller vouches for the range.
        unsafe { std::ptr::write_bytes(dst, 0, bytes) };
        Ok(())
    }

    fn wait(&mut self, _event: &Event) -> Result<(), MemoryError> {
        Ok(())
    }

    fn record(&mut self) -> Result<Event, MemoryError> {
        Ok(Arc::new(CpuEvent))
    }

    fn on_complete(&mut self, callback: Box<dyn FnOnce() + Send>) -> Result<(), MemoryError> {
        callback();
        Ok(())
    }
}

impl Backend for CpuBackend {
    fn new_stream(&self, _name: &str) -> Result<Box<dyn Stream>, MemoryError> {
        Ok(Box::new(CpuStream))
    }

    fn device_slab(&self, slots: u32, slot_bytes: Bytes) -> Result<Box<dyn Slab>, MemoryError> {
        Ok(Box::new(Arena::new(Tier::Device, slots, slot_bytes)?))
    }

    fn separates_non_model(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_copies_zeroes_and_calls_back() {
        let slab = CpuBackend.device_slab(2, Bytes(4096)).unwrap();
        let mut stream = CpuBackend.new_stream("test").unwrap();
        let (sender, receiver) = flume::bounded(1);
        let (first, second) = (slab.slot(SlotIndex(0)).as_ptr(), slab.slot(SlotIndex(1)).as_ptr());
        let pattern = [7u8; 4096];
        // SAFETY: two slots of a slab that nobody else has.
        let seen = unsafe {
            stream.copy(pattern.as_ptr(), first, 4096).unwrap();
            stream.copy(first, second, 4096).unwrap();
            stream.zero(first, 4096).unwrap();
            (first.add(4095).read(), second.add(4095).read())
        };
        let event = stream.record().unwrap();
        stream.wait(&event).unwrap();
        stream.on_complete(Box::new(move || sender.send(()).unwrap())).unwrap();
        event.synchronize().unwrap();
        assert!(event.is_complete().unwrap() && receiver.try_recv().is_ok());
        assert_eq!(seen, (0, 7));
    }
}
