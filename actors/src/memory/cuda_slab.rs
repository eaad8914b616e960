//! Slots in memory of a GPU that comes and goes in regions, at addresses that stay.

#![expect(unsafe_code, reason = "calls the driver")]

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, DriverError, sys};

use super::{MemoryError, Slab, SlotIndex};
use crate::cuda::device_error;
use crate::types::Bytes;

/// Few enough calls for a whole device, and little enough to give back at a time.
const REGION: u64 = 256 << 20;

/// A range of addresses for all slots, of which the first regions have memory.
pub(super) struct RegionSlab {
    context: Arc<CudaContext>,
    base: sys::CUdeviceptr,
    slots: u32,
    slot_bytes: Bytes,
    region: u64,
    /// Bytes of the range: whole regions.
    reserved: u64,
    /// Memory of the first regions.
    regions: Mutex<Vec<sys::CUmemGenericAllocationHandle>>,
}

/// Memory of one GPU, for work on it alone.
fn description(ordinal: usize) -> sys::CUmemAllocationProp {
    // SAFETY: all zeros are a valid description; it is filled in below.
    let mut description: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    description.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    description.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    description.location.id = ordinal as i32;
    description
}

impl RegionSlab {
    /// A slab with memory for all of its slots.
    pub fn new(context: Arc<CudaContext>, slots: u32, slot_bytes: Bytes) -> Result<Self, MemoryError> {
        let failed = |error| device_error("lay out the device tier", error);
        let mut granularity = 0;
        let flag = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
        // SAFETY: a description as the driver wants it, and a number to write to.
        unsafe { sys::cuMemGetAllocationGranularity(&raw mut granularity, &description(context.ordinal()), flag) }
            .result()
            .map_err(failed)?;
        let need = u64::from(slots) * slot_bytes.0;
        let region = REGION.min(need.max(1)).next_multiple_of(granularity.max(1) as u64);
        let reserved = need.next_multiple_of(region).max(region);
        let mut base = 0;
        // SAFETY: only addresses are taken, given back when the slab is dropped.
        unsafe { sys::cuMemAddressReserve(&raw mut base, reserved as usize, 0, 0, 0) }.result().map_err(failed)?;
        let slab = RegionSlab { context, base, slots, slot_bytes, region, reserved, regions: Mutex::new(Vec::new()) };
        let wanted = slab.regions_for(slots);
        slab.grow(&mut slab.regions.lock().unwrap_or_else(PoisonError::into_inner), wanted)
            .map_err(|error| device_error("allocate the device tier", error))?;
        Ok(slab)
    }

    fn regions_for(&self, slots: u32) -> usize {
        (u64::from(slots.min(self.slots)) * self.slot_bytes.0).div_ceil(self.region) as usize
    }

    fn slots_in(&self, regions: usize) -> u32 {
        let slots = regions as u64 * self.region / self.slot_bytes.0.max(1);
        slots.min(u64::from(self.slots)) as u32
    }

    fn address(&self, region: usize) -> sys::CUdeviceptr {
        self.base + region as u64 * self.region
    }

    fn grow(&self, regions: &mut Vec<sys::CUmemGenericAllocationHandle>, wanted: usize) -> Result<(), DriverError> {
        while regions.len() < wanted {
            regions.push(self.map(self.address(regions.len()))?);
        }
        Ok(())
    }

    /// Memory for the region at `address`; nothing is left behind if that fails.
    fn map(&self, address: sys::CUdeviceptr) -> Result<sys::CUmemGenericAllocationHandle, DriverError> {
        let (description, bytes) = (description(self.context.ordinal()), self.region as usize);
        let mut handle = 0;
        // SAFETY: a description as the driver wants it.
        unsafe { sys::cuMemCreate(&raw mut handle, bytes, &description, 0) }.result()?;
        // SAFETY: the region lies in the reserved range and has no memory yet.
        let mapped = unsafe { sys::cuMemMap(address, bytes, 0, handle, 0) }.result().and_then(|()| {
            let access = sys::CUmemAccessDesc {
                location: description.location,
                flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
            };
            // SAFETY: the region was just mapped.
            unsafe { sys::cuMemSetAccess(address, bytes, &raw const access, 1) }.result().inspect_err(|_| {
                // SAFETY: mapped above, and nobody has seen it.
                let _ = unsafe { sys::cuMemUnmap(address, bytes) };
            })
        });
        if let Err(error) = mapped {
            // SAFETY: made above and mapped nowhere. The first error counts.
            let _ = unsafe { sys::cuMemRelease(handle) };
            return Err(error);
        }
        Ok(handle)
    }

    /// # Safety
    /// Nobody may use the regions from `kept` on.
    unsafe fn shrink(
        &self,
        regions: &mut Vec<sys::CUmemGenericAllocationHandle>,
        kept: usize,
    ) -> Result<(), DriverError> {
        while regions.len() > kept
            && let Some(&handle) = regions.last()
        {
            let address = self.address(regions.len() - 1);
            // SAFETY: mapped by `map`, and the caller vouches that nobody uses it.
            unsafe { sys::cuMemUnmap(address, self.region as usize) }.result()?;
            regions.pop();
            // SAFETY: made by `map`, mapped nowhere any more.
            unsafe { sys::cuMemRelease(handle) }.result()?;
        }
        Ok(())
    }
}

impl Slab for RegionSlab {
    fn slot(&self, index: SlotIndex) -> NonNull<u8> {
        let address = self.base + u64::from(index.0) * self.slot_bytes.0;
        NonNull::new(address as *mut u8).unwrap_or(NonNull::dangling())
    }

    fn slots(&self) -> u32 {
        self.slots
    }

    fn slot_bytes(&self) -> Bytes {
        self.slot_bytes
    }

    fn region_end(&self, slots: u32) -> u32 {
        self.slots_in(self.regions_for(slots))
    }

    unsafe fn back(&self, slots: u32) -> Result<u32, MemoryError> {
        self.context.bind_to_thread().map_err(|error| device_error("use the GPU from this thread", error))?;
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = self.regions_for(slots);
        // SAFETY: the caller vouches for the slots above.
        unsafe { self.shrink(&mut regions, wanted) }
            .map_err(|error| device_error("give memory of the device tier back", error))?;
        match self.grow(&mut regions, wanted) {
            Ok(()) | Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(self.slots_in(regions.len())),
            Err(error) => Err(device_error("extend the device tier", error)),
        }
    }
}

impl Drop for RegionSlab {
    fn drop(&mut self) {
        // Nobody hears of a failure here: the context goes down with the process.
        let _ = self.context.bind_to_thread();
        let mut regions = std::mem::take(&mut *self.regions.lock().unwrap_or_else(PoisonError::into_inner));
        // SAFETY: all streams are done when the runtime goes down.
        let _ = unsafe { self.shrink(&mut regions, 0) };
        // SAFETY: reserved by `new`; no region has memory any more.
        let _ = unsafe { sys::cuMemAddressFree(self.base, self.reserved as usize) };
    }
}
