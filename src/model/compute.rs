//! Where the operations of a model are computed.

use std::collections::BTreeMap;
use std::time::Duration;

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};
use patrickstar_actors::types::{Bytes, Precision};

/// What one class of kernels took.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelTime {
    /// Kernels.
    pub calls: u64,
    /// On the device, from the start of each to its end.
    pub device: Duration,
    /// What queuing them took the host.
    pub host: Duration,
}

/// By class.
pub type KernelTimes = BTreeMap<&'static str, KernelTime>;

/// The backend of a model's operations.
#[derive(Clone)]
pub enum Compute {
    /// All cores of the host, activations in fp32.
    Cpu,
    /// An NVIDIA GPU, activations in the type of the weights.
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<super::cuda::CudaOps>),
}

impl Compute {
    /// Element type of activations beside weights in `precision`.
    pub fn activation_dtype(&self, _precision: Precision) -> DType {
        match self {
            Compute::Cpu => DType::F32,
            #[cfg(feature = "cuda")]
            Compute::Cuda(_) => super::cuda::dtype_of(_precision),
        }
    }

    /// Waits for everything queued.
    pub fn synchronize(&self) -> Result<()> {
        self.device().synchronize()
    }

    /// From now on up to `limit` bytes of device memory of activations that are gone are kept for the next ones of their
    /// size; the host's allocator does so by itself.
    pub fn keep_buffers(&self, _limit: Bytes) -> Result<()> {
        match self {
            Compute::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            Compute::Cuda(ops) => ops.keep_buffers(_limit),
        }
    }

    /// What its driver calls the GPU; `None` on the host.
    pub fn device_name(&self) -> Option<String> {
        match self {
            Compute::Cpu => None,
            #[cfg(feature = "cuda")]
            Compute::Cuda(ops) => ops.gpu().context().name().ok(),
        }
    }

    /// Waits for everything queued without keeping a core busy.
    pub fn sleep_until_done(&self) -> Result<()> {
        match self {
            Compute::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            Compute::Cuda(ops) => {
                patrickstar_actors::cuda::sleep_until_done(ops.stream()).map_err(candle_core::Error::wrap)
            }
        }
    }

    /// What the first block reads: numbers as activations beside weights in `precision`, token ids where they are, for lookups
    /// in host memory.
    pub fn input(&self, given: &Tensor, precision: Precision) -> Result<Tensor> {
        if !given.dtype().is_float() {
            return Ok(given.clone());
        }
        // Narrowed before it crosses the link.
        given.to_dtype(self.activation_dtype(precision))?.to_device(&self.device())
    }

    /// Address of a contiguous tensor's elements, good while the tensor lives.
    pub fn address(&self, tensor: &Tensor) -> Result<*const u8> {
        match self {
            Compute::Cpu => {
                let (storage, layout) = tensor.storage_and_layout();
                match &*storage {
                    Storage::Cpu(CpuStorage::F32(values)) if layout.is_contiguous() => {
                        Ok(values[layout.start_offset()..].as_ptr().cast())
                    }
                    _ => bail!("only contiguous fp32 tensors in host memory have an address on the host"),
                }
            }
            #[cfg(feature = "cuda")]
            Compute::Cuda(ops) => Ok(ops.address(tensor)? as *const u8),
        }
    }

    /// Starts or stops timing kernels; the host has none to time.
    pub fn set_profiling(&self, _enabled: bool) {
        #[cfg(feature = "cuda")]
        if let Compute::Cuda(ops) = self {
            ops.gpu().profile().set_enabled(_enabled);
        }
    }

    /// What was timed, after waiting for it.
    pub fn take_profile(&self) -> Result<KernelTimes> {
        match self {
            Compute::Cpu => Ok(KernelTimes::new()),
            #[cfg(feature = "cuda")]
            Compute::Cuda(ops) => {
                let times = ops.gpu().profile().take().map_err(candle_core::Error::wrap)?;
                let convert = |time: patrickstar_actors::cuda::ClassTime| KernelTime {
                    calls: time.calls,
                    device: time.time,
                    host: time.host,
                };
                Ok(times.into_iter().map(|(class, time)| (class, convert(time))).collect())
            }
        }
    }

    /// candle's device for activations.
    pub fn device(&self) -> Device {
        match self {
            Compute::Cpu => Device::Cpu,
            #[cfg(feature = "cuda")]
            Compute::Cuda(ops) => ops.device().clone(),
        }
    }
}
