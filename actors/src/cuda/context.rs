//! One context for all streams of a GPU, and its pool of non-model memory.

#![expect(unsafe_code, reason = "calls the driver")]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::CUmemPool_attribute::{
    CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
    CU_MEMPOOL_ATTR_USED_MEM_HIGH,
};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::launch::Kernels;
use super::nvml::Inspector;
use super::profile::Profile;
use crate::memory::MemoryError;
use crate::neighbours::DeviceReading;
use crate::types::{Bytes, Tier};

/// A GPU: its context, its pool, and the kernels of chunk work.
pub struct Gpu {
    context: Arc<CudaContext>,
    pool: Mutex<Pool>,
    inspector: Inspector,
    profile: Arc<Profile>,
    pub(crate) kernels: Kernels,
}

/// The pool from which candle takes memory.
struct Pool {
    handle: sys::CUmemoryPool,
    /// What it may hold, where it was made by `cap_pool`; the driver's own has no limit.
    limit: Option<Bytes>,
    /// Those of before, until nothing is allocated from them. They give back what becomes free.
    retired: Vec<sys::CUmemoryPool>,
}

// SAFETY: handles of the driver, which any thread may use; `Gpu` keeps them under a lock, so that none is used once it was
// destroyed.
unsafe impl Send for Pool {}

/// Pools grow in steps of this size.
const POOL_MULTIPLE: usize = 2 << 20;

/// Use of the pool from which everything that is not a chunk comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUse {
    /// Allocated now.
    pub live: Bytes,
    /// Allocated at most since the peak was last reset.
    pub peak: Bytes,
    /// Taken from the device, allocated or not.
    pub reserved: Bytes,
}

/// What a failed call of the driver becomes.
pub(crate) fn device_error(action: &'static str, error: DriverError) -> MemoryError {
    MemoryError::Device { action, reason: error.to_string() }
}

impl Gpu {
    /// Takes over `context`.
    pub fn new(context: Arc<CudaContext>) -> Result<Self, MemoryError> {
        context.bind_to_thread().map_err(|error| device_error("use the GPU from this thread", error))?;
        let profile = Arc::new(Profile::default());
        let kernels = Kernels::load(&context, &profile, "adam", super::CHUNK_KERNELS)?;
        // SAFETY: the context keeps the device alive.
        let pool = unsafe { result::device::get_default_mem_pool(context.cu_device()) }
            .map_err(|error| device_error("find its memory pool", error))?;
        keep_memory(pool)?;
        let inspector = Inspector::new(Arc::clone(&context));
        Ok(Gpu {
            context,
            pool: Mutex::new(Pool { handle: pool, limit: None, retired: Vec::new() }),
            inspector,
            profile,
            kernels,
        })
    }

    /// From now on candle's memory comes from a pool of at most `limit` bytes: what does not fit is an error of the
    /// operation that asked, and never takes memory that is meant for chunks.
    pub fn cap_pool(&self, limit: Bytes) -> Result<(), MemoryError> {
        self.context.bind_to_thread().map_err(|error| device_error("use the GPU from this thread", error))?;
        let failed = |error| device_error("cap its memory pool", error);
        // SAFETY: all zeros are a valid description; it is filled in below.
        let mut properties: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
        properties.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        properties.location.id = self.context.ordinal() as i32;
        properties.maxSize = usize::try_from(limit.0).unwrap_or(usize::MAX).next_multiple_of(POOL_MULTIPLE);
        let mut pool = self.pool();
        // Not that of now: another thread may be at an allocation from it.
        pool.destroy_unused()?;
        // SAFETY: a description as the driver wants it, and a pool that was just made.
        let handle = unsafe {
            let handle = result::mem_pool::create(&properties).map_err(failed)?;
            result::device::set_mem_pool(self.context.cu_device(), handle).map_err(failed)?;
            handle
        };
        keep_memory(handle)?;
        let before = std::mem::replace(&mut pool.handle, handle);
        if pool.limit.replace(Bytes(properties.maxSize as u64)).is_some() {
            pool.retired.push(before);
            set(before, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, 0)?;
            // SAFETY: a live pool.
            unsafe { result::mem_pool::trim_to(before, 0) }.map_err(failed)?;
        }
        Ok(())
    }

    /// Held while a handle is used: another engine of this process may cap the pool at any time.
    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The context.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Asks the driver's management library who else uses this GPU, and how it is. Takes milliseconds: never on the way of a
    /// step.
    pub fn inspect(&self) -> Result<DeviceReading, MemoryError> {
        self.inspector.read()
    }

    /// What [`Gpu::inspect`] found last, on whichever thread.
    pub fn last_inspected(&self) -> Option<DeviceReading> {
        self.inspector.latest()
    }

    /// Who has the memory that this process does not get, for an error message.
    pub fn neighbours(&self) -> String {
        self.inspect().map_or_else(|error| error.to_string(), |reading| reading.neighbours.to_string())
    }

    /// What it means that only `have` of `need` bytes can be had.
    pub(crate) fn insufficient(&self, need: Bytes, have: Bytes) -> MemoryError {
        MemoryError::Taken { tier: Tier::Device, need, have, neighbours: self.neighbours() }
    }

    /// Times of kernels, while somebody asks for them.
    pub fn profile(&self) -> &Arc<Profile> {
        &self.profile
    }

    /// Use of the pool.
    pub fn pool_use(&self) -> Result<PoolUse, MemoryError> {
        self.pool().usage()
    }

    /// Whether the pool may take so many bytes more from the device, should the device have them.
    pub fn pool_may_take(&self, bytes: Bytes) -> Result<bool, MemoryError> {
        let pool = self.pool();
        let reserved = pool.usage()?.reserved;
        Ok(pool.limit.is_none_or(|limit| reserved.0 + bytes.0 <= limit.0))
    }

    /// Gives memory that is not allocated back to the system, so that it can be taken in other pieces, or by others; the
    /// pool keeps `keep` bytes.
    pub fn trim_pool(&self, keep: Bytes) -> Result<(), MemoryError> {
        self.context.bind_to_thread().map_err(|error| device_error("use the GPU from this thread", error))?;
        let mut pool = self.pool();
        pool.destroy_unused()?;
        let keep = usize::try_from(keep.0).unwrap_or(usize::MAX);
        // SAFETY: a live pool.
        unsafe { result::mem_pool::trim_to(pool.handle, keep) }
            .map_err(|error| device_error("trim its memory pool", error))
    }

    /// Starts the peak over.
    pub fn reset_pool_peak(&self) -> Result<(), MemoryError> {
        set(self.pool().handle, CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)
    }
}

impl Pool {
    fn usage(&self) -> Result<PoolUse, MemoryError> {
        Ok(PoolUse {
            live: Bytes(get(self.handle, CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?),
            peak: Bytes(get(self.handle, CU_MEMPOOL_ATTR_USED_MEM_HIGH)?),
            reserved: Bytes(get(self.handle, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?),
        })
    }

    /// A pool under allocations stays: one that was destroyed there has been seen to break the driver's heap.
    fn destroy_unused(&mut self) -> Result<(), MemoryError> {
        let mut index = 0;
        while let Some(&pool) = self.retired.get(index) {
            if get(pool, CU_MEMPOOL_ATTR_USED_MEM_CURRENT)? > 0 {
                index += 1;
                continue;
            }
            self.retired.swap_remove(index);
            // SAFETY: made by `cap_pool`, not the device's any more, and taken out of the only list that had it.
            unsafe { result::mem_pool::destroy(pool) }.map_err(|error| device_error("end a memory pool", error))?;
        }
        Ok(())
    }
}

/// Waits for everything queued on `stream`. The driver's own way to wait keeps a core busy, and cores are for the
/// optimizer: this thread sleeps.
pub fn sleep_until_done(stream: &CudaStream) -> Result<(), DriverError> {
    stream.record_event(Some(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC))?.synchronize()
}

/// Memory given back to a pool stays there: asking the system for it again costs half a millisecond.
fn keep_memory(pool: sys::CUmemoryPool) -> Result<(), MemoryError> {
    set(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)
}

fn set(pool: sys::CUmemoryPool, attribute: sys::CUmemPool_attribute, mut value: u64) -> Result<(), MemoryError> {
    // SAFETY: callers pass a live pool; the attributes used here are 64-bit numbers.
    unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut value).cast()) }
        .map_err(|error| device_error("set up its memory pool", error))
}

fn get(pool: sys::CUmemoryPool, attribute: sys::CUmemPool_attribute) -> Result<u64, MemoryError> {
    let mut value = 0u64;
    // SAFETY: as in `set`.
    unsafe { result::mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()) }
        .map_err(|error| device_error("ask its memory pool", error))?;
    Ok(value)
}
