//! What the configuration's device stands for: operations, the backend of the device tier, and how memory is measured.

use std::sync::Arc;

use patrickstar_actors::memory::{Backend, CpuBackend};
use patrickstar_actors::monitor::MemoryProbe;
#[cfg(feature = "cuda")]
use patrickstar_actors::neighbours::DeviceReading;
use patrickstar_actors::types::Bytes;

use crate::config::{self, DeviceKind};
use crate::error::Error;
use crate::model::compute::Compute;
use crate::telemetry::alloc;

/// An opened device.
pub(crate) struct Device {
    pub compute: Compute,
    pub backend: Arc<dyn Backend>,
    pub probe: Arc<dyn MemoryProbe>,
    /// Looks after a GPU for as long as it is used.
    #[cfg(feature = "cuda")]
    pub watch: Option<crate::telemetry::periodic::Periodic>,
}

/// Measures activations through the counting allocator of this process, where it is installed.
struct AllocatorProbe;

impl MemoryProbe for AllocatorProbe {
    fn live(&self) -> Bytes {
        Bytes(alloc::live_bytes())
    }

    fn take_peak(&self) -> Bytes {
        let peak = alloc::peak_bytes();
        alloc::reset_peak();
        Bytes(peak)
    }
}

/// Whether this configuration computes on a GPU.
pub(crate) fn is_cuda(compute: &config::Compute) -> bool {
    match compute.device {
        DeviceKind::Auto => cfg!(feature = "cuda"),
        DeviceKind::Cpu => false,
        DeviceKind::Cuda => true,
    }
}

/// Free memory of the configured GPU, less what its context and library need beside; `None` on the host.
pub(crate) fn gpu_memory(compute: &config::Compute) -> Result<Option<Bytes>, Error> {
    if !is_cuda(compute) {
        return Ok(None);
    }
    #[cfg(feature = "cuda")]
    return free_gpu_memory(compute.ordinal).map(Some);
    #[cfg(not(feature = "cuda"))]
    open_gpu(compute.ordinal).map(|_| None)
}

impl Device {
    pub fn open(config: &config::Compute) -> Result<Self, Error> {
        if is_cuda(config) { open_gpu(config.ordinal) } else { Ok(Self::host()) }
    }

    fn host() -> Self {
        Device {
            compute: Compute::Cpu,
            backend: Arc::new(CpuBackend),
            probe: Arc::new(AllocatorProbe),
            #[cfg(feature = "cuda")]
            watch: None,
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn open_gpu(_: usize) -> Result<Device, Error> {
    Err(Error::Failed(
        "compute.device is \"cuda\", and this program was built for the host: build with --features cuda, or set compute.device = \"cpu\"".into(),
    ))
}

#[cfg(feature = "cuda")]
fn open_ops(ordinal: usize) -> Result<Arc<crate::model::cuda::CudaOps>, Error> {
    crate::model::cuda::CudaOps::open(ordinal).map_err(|error| {
        Error::Failed(format!(
            "GPU {ordinal} cannot be used: {}; check the driver with nvidia-smi and the number in compute.ordinal, or set compute.device = \"cpu\"",
            error.to_string().lines().next().unwrap_or_default()
        ))
    })
}

/// Name, compute capability and memory of a GPU on which a run could begin.
#[cfg(feature = "cuda")]
pub(crate) fn describe_gpu(ordinal: usize) -> Result<String, Error> {
    let ops = open_ops(ordinal)?;
    let context = ops.gpu().context();
    let failed = |error| Error::Failed(format!("GPU {ordinal} does not answer: {error}"));
    let (major, minor) = context.compute_capability().map_err(failed)?;
    let (free, total) = context.mem_get_info().map_err(failed)?;
    Ok(format!(
        "GPU {ordinal}: {}, compute capability {major}.{minor}, {} free of {}",
        context.name().map_err(failed)?,
        Bytes(free as u64),
        Bytes(total as u64)
    ))
}

/// Who else is on a GPU, and how it is.
#[cfg(feature = "cuda")]
pub(crate) fn inspect_gpu(ordinal: usize) -> Result<DeviceReading, Error> {
    open_ops(ordinal)?.gpu().inspect().map_err(|error| Error::Failed(error.to_string()))
}

/// What stays free for fragments of the pool.
#[cfg(feature = "cuda")]
const SPARE: u64 = 1 << 30;

#[cfg(feature = "cuda")]
fn free_gpu_memory(ordinal: usize) -> Result<Bytes, Error> {
    let ops = open_ops(ordinal)?;
    let (free, _) = ops
        .gpu()
        .context()
        .mem_get_info()
        .map_err(|error| Error::Failed(format!("the memory of GPU {ordinal} cannot be measured: {error}")))?;
    Ok(Bytes((free as u64).saturating_sub(SPARE)))
}

#[cfg(feature = "cuda")]
fn open_gpu(ordinal: usize) -> Result<Device, Error> {
    use patrickstar_actors::memory::CudaBackend;

    let ops = open_ops(ordinal)?;
    Ok(Device {
        backend: Arc::new(CudaBackend::new(Arc::clone(ops.gpu()), Arc::clone(ops.stream()))),
        probe: Arc::new(PoolProbe(Arc::clone(ops.gpu()))),
        watch: Some(super::watch::start(Arc::clone(ops.gpu()))?),
        compute: Compute::Cuda(ops),
    })
}

/// Measures activations by the pool from which candle takes them.
#[cfg(feature = "cuda")]
struct PoolProbe(Arc<patrickstar_actors::cuda::Gpu>);

#[cfg(feature = "cuda")]
impl MemoryProbe for PoolProbe {
    fn live(&self) -> Bytes {
        self.0.pool_use().map_or(Bytes(0), |pool| pool.live)
    }

    fn take_peak(&self) -> Bytes {
        let peak = self.0.pool_use().map_or(Bytes(0), |pool| pool.peak);
        if let Err(error) = self.0.reset_pool_peak() {
            tracing::warn!(%error, "the peak of the memory pool cannot be reset");
        }
        peak
    }

    fn neighbours(&self) -> Option<String> {
        self.0.last_inspected().map(|reading| reading.neighbours.to_string())
    }
}
