//! One context for all streams of a GPU, and its pool of non-model memory.

use std::sync::Arc;

use cudarc::driver::sys::CUmemPool_attribute::{
    CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, CU_MEMPOOL_ATTR_USED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_HIGH,
};
use cudarc::driver::{CudaContext, DriverError, result, sys};

use super::launch::Kernels;
use super::profile::Profile;
use crate::memory::MemoryError;
use crate::types::Bytes;

/// A GPU: its context, its pool, and the kernels of chunk work.
pub struct Gpu {
    context: Arc<CudaContext>,
    pool: sys::CUmemoryPool,
    profile: Arc<Profile>,
    pub(crate) kernels: Kernels,
}

// SAFETY: a pool is a handle of the driver, which locks it itself.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// Use of the pool from which everything that is not a chunk comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUse {
    /// Allocated now.
    pub live: Bytes,
    /// Allocated at most since the peak was last reset.
    pub peak: Bytes,
}

/// What a failed call of the driver becomes.
pub(crate) fn device_error(action: &'static str, error: DriverError) -> MemoryError {
    MemoryError::Device { action, reason: error.to_string() }
}

impl Gpu {
    /// Takes over `context`: memory given back to the pool stays there, since asking the system for it again costs half a
    /// millisecond.
    pub fn new(context: Arc<CudaContext>) -> Result<Self, MemoryError> {
        context.bind_to_thread().map_err(|error| device_error("use the GPU from this thread", error))?;
        let profile = Arc::new(Profile::default());
        let kernels = Kernels::load(&context, &profile, "adam", super::CHUNK_KERNELS)?;
        // SAFETY: the context keeps the device alive.
        let pool = unsafe { result::device::get_default_mem_pool(context.cu_device()) }
            .map_err(|error| device_error("find its memory pool", error))?;
        let gpu = Gpu { context, pool, profile, kernels };
        gpu.set(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)?;
        Ok(gpu)
    }

    /// The context.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Times of kernels, while somebody asks for them.
    pub fn profile(&self) -> &Arc<Profile> {
        &self.profile
    }

    /// Use of the pool.
    pub fn pool_use(&self) -> Result<PoolUse, MemoryError> {
        Ok(PoolUse {
            live: Bytes(self.get(CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?),
            peak: Bytes(self.get(CU_MEMPOOL_ATTR_USED_MEM_HIGH)?),
        })
    }

    /// Starts the peak over.
    pub fn reset_pool_peak(&self) -> Result<(), MemoryError> {
        self.set(CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)
    }

    fn set(&self, attribute: sys::CUmemPool_attribute, mut value: u64) -> Result<(), MemoryError> {
        // SAFETY: the attributes used here are 64-bit numbers.
        unsafe { result::mem_pool::set_attribute(self.pool, attribute, (&raw mut value).cast()) }
            .map_err(|error| device_error("set up its memory pool", error))
    }

    fn get(&self, attribute: sys::CUmemPool_attribute) -> Result<u64, MemoryError> {
        let mut value = 0u64;
        // SAFETY: as in `set`.
        unsafe { result::mem_pool::get_attribute(self.pool, attribute, (&raw mut value).cast()) }
            .map_err(|error| device_error("ask its memory pool", error))?;
        Ok(value)
    }
}
