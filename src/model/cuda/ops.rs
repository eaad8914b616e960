//! The GPU as the operations see it: tensors, addresses, kernels by element type.

#![expect(unsafe_code, reason = "launches kernels and allocates without clearing")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute::{
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
};
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage};
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};
use patrickstar_actors::cuda::{Arg, Gpu, Grid, Kernels};
use patrickstar_actors::types::Bytes;

use super::buffers::Buffers;
use super::matmul::Products;
use super::pace::Pace;
use super::rope::Tables;
use super::staging::Staging;

/// How long an allocation waits for memory that chunks give back, and between its tries: a few looks of the monitor.
const PATIENCE: Duration = Duration::from_secs(5);
const BETWEEN_TRIES: Duration = Duration::from_millis(20);
/// fp32 numbers between places in the scratch memory: 256 bytes, the alignment of an allocation.
const SCRATCH_MULTIPLE: usize = 64;
/// Tiles of columns of which the last block adds the sums.
pub(super) const COLUMN_COUNTERS: usize = 4096;

/// The operations of a model on one GPU.
pub struct CudaOps {
    device: Device,
    cuda: CudaDevice,
    stream: Arc<CudaStream>,
    gpu: Arc<Gpu>,
    pub(super) multiprocessors: u32,
    /// Bytes of shared memory that a block may have.
    pub(super) shared_per_block: u32,
    pub(super) norm: Kernels,
    pub(super) activation: Kernels,
    pub(super) embedding: Kernels,
    pub(super) cross_entropy: Kernels,
    pub(super) cast: Kernels,
    pub(super) draw: Kernels,
    pub(super) rope: Kernels,
    pub(super) attention_forward: Kernels,
    pub(super) attention_backward_q: Kernels,
    pub(super) attention_backward_kv: Kernels,
    pub(super) attention_f32: Kernels,
    pub(super) products: Mutex<Products>,
    pace: Pace,
    staging: Mutex<Staging>,
    pub(super) rope_tables: Tables,
    buffers: Mutex<Buffers>,
    /// What one operation's kernels hand to each other; the next operation on the stream may write over it.
    scratch: Mutex<Option<Tensor>>,
    /// Two counters by which blocks share out work.
    pub(super) counters: Tensor,
    /// A zero for each tile of columns, before and after every launch on the stream.
    pub(super) column_counters: Tensor,
}

/// The scratch memory of the operations, while one of them uses it.
pub(super) type Scratch<'a> = MutexGuard<'a, Option<Tensor>>;

/// The name of a kernel for an element type, of those it is compiled for.
macro_rules! kernel {
    ($dtype:expr, $name:literal) => {
        match $dtype {
            candle_core::DType::F32 => concat!($name, "_f32"),
            candle_core::DType::BF16 => concat!($name, "_bf16"),
            candle_core::DType::F16 => concat!($name, "_f16"),
            other => candle_core::bail!(concat!($name, " has no kernel for {:?}"), other),
        }
    };
}
pub(super) use kernel;

macro_rules! cubin {
    ($gpu:expr, $name:literal) => {
        Kernels::load(
            $gpu.context(),
            $gpu.profile(),
            $name,
            include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".cubin")),
        )
        .map_err(message)?
    };
}

/// What an error below candle becomes.
pub(super) fn message(error: impl std::fmt::Display) -> candle_core::Error {
    candle_core::Error::Msg(error.to_string())
}

impl CudaOps {
    /// GPU `ordinal`, which all engines of a process share: one context, one stream, every kernel loaded once.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        static OPEN: Mutex<BTreeMap<usize, Arc<CudaOps>>> = Mutex::new(BTreeMap::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ops) = open.get(&ordinal) {
            // A context is current in one thread at a time; this one may be new.
            ops.gpu.context().bind_to_thread().map_err(message)?;
            return Ok(Arc::clone(ops));
        }
        let ops = Arc::new(Self::new(ordinal)?);
        open.insert(ordinal, Arc::clone(&ops));
        Ok(ops)
    }

    /// Sets up a GPU: a stream of its own, no event for every tensor.
    fn new(ordinal: usize) -> Result<Self> {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        patrickstar_actors::cuda::libraries::check().map_err(message)?;
        let device = Device::new_cuda_with_stream(ordinal)?;
        let cuda = device.as_cuda_device()?.clone();
        // SAFETY: nothing is allocated yet, and streams are ordered by explicit events.
        unsafe { cuda.disable_event_tracking() };
        let stream = cuda.cuda_stream();
        let gpu = Arc::new(Gpu::new(Arc::clone(stream.context())).map_err(message)?);
        let attribute = |which| gpu.context().attribute(which).map(i32::unsigned_abs).map_err(message);
        let multiprocessors = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_per_block = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let products = Mutex::new(Products::new(&stream)?);
        let staging = Mutex::new(Staging::new(&stream)?);
        let counters = Tensor::zeros(2, DType::U32, &device)?;
        let column_counters = Tensor::zeros(COLUMN_COUNTERS, DType::U32, &device)?;
        Ok(CudaOps {
            multiprocessors,
            shared_per_block,
            norm: cubin!(gpu, "norm"),
            activation: cubin!(gpu, "activation"),
            embedding: cubin!(gpu, "embedding"),
            cross_entropy: cubin!(gpu, "cross_entropy"),
            cast: cubin!(gpu, "cast"),
            draw: cubin!(gpu, "draw"),
            rope: cubin!(gpu, "rope"),
            attention_forward: cubin!(gpu, "attention_forward"),
            attention_backward_q: cubin!(gpu, "attention_backward_q"),
            attention_backward_kv: cubin!(gpu, "attention_backward_kv"),
            attention_f32: cubin!(gpu, "attention_f32"),
            products,
            pace: Pace::default(),
            staging,
            rope_tables: Tables::default(),
            buffers: Mutex::default(),
            scratch: Mutex::default(),
            counters,
            column_counters,
            device,
            cuda,
            stream,
            gpu,
        })
    }

    /// candle's device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The GPU below.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// The stream on which everything is queued.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// An uninitialised tensor, for a kernel to write wholly.
    pub(crate) fn uninitialised(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        let shape = shape.into();
        let elements = shape.elem_count();
        let mut buffers = self.buffers.lock().map_err(message)?;
        if let Some(again) = buffers.take(&shape, dtype)? {
            return Ok(again);
        }
        let allocate = || {
            // SAFETY: callers hand the tensor to a kernel that writes all of it before anybody reads it.
            unsafe {
                match dtype {
                    DType::F32 => self.allocate::<f32>(elements),
                    DType::BF16 => self.allocate::<bf16>(elements),
                    DType::F16 => self.allocate::<f16>(elements),
                    DType::U32 => self.allocate::<u32>(elements),
                    other => bail!("no activations of type {other:?} on a GPU"),
                }
            }
        };
        let storage = match allocate() {
            Ok(storage) => storage,
            // Free memory in pieces that are too small becomes whole when nothing is queued any more.
            Err(_) => {
                buffers.clear();
                self.stream.synchronize().map_err(message)?;
                self.gpu.trim_pool(Bytes(0)).map_err(message)?;
                let bytes = Bytes((elements * dtype.size_in_bytes()) as u64);
                self.allocate_in_time(bytes, allocate).map_err(|error| {
                    message(format!(
                        "the GPU has no {bytes} left for an activation ({}; {}): lower train.batch, raise train.micro_batches, or set train.recompute = \"full\"",
                        error.to_string().lines().next().unwrap_or_default(),
                        self.gpu.neighbours()
                    ))
                })?
            }
        };
        let kept = buffers.wants(dtype, elements);
        let tensor = Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), kept);
        if kept {
            buffers.keep(&tensor);
        }
        Ok(tensor)
    }

    /// Allocates `bytes`. Where the pool may take them and the device has none, a neighbour was faster: the monitor then takes
    /// memory from chunks, region by region, as far as they can do without.
    fn allocate_in_time(&self, bytes: Bytes, allocate: impl Fn() -> Result<CudaStorage>) -> Result<CudaStorage> {
        let began = Instant::now();
        loop {
            match allocate() {
                Err(_) if began.elapsed() < PATIENCE && self.gpu.pool_may_take(bytes).map_err(message)? => {
                    std::thread::sleep(BETWEEN_TRIES);
                }
                outcome => return outcome,
            }
        }
    }

    /// How many matrix products were queued as they had been recorded.
    pub fn replayed_products(&self) -> Result<u64> {
        Ok(self.products.lock().map_err(message)?.replayed())
    }

    /// From now on the memory of up to `limit` bytes of activations is kept for the next ones of their size.
    pub(crate) fn keep_buffers(&self, limit: Bytes) -> Result<()> {
        self.buffers.lock().map_err(message)?.restart(limit);
        Ok(())
    }

    /// Uninitialised places for so many fp32 numbers each, for the kernels of one operation: the next one gets the same
    /// memory. Whoever asks keeps what is returned beside the places until all its kernels are queued: an operation that
    /// another thread queues in between would write over the sums. An allocation of the driver costs as much as a launch,
    /// and half of them were for partial sums.
    pub(super) fn scratch<const N: usize>(&self, numbers: [usize; N]) -> Result<([Arg; N], Scratch<'_>)> {
        let places = numbers.map(|count| count.next_multiple_of(SCRATCH_MULTIPLE));
        let total: usize = places.iter().sum();
        let mut scratch = self.scratch.lock().map_err(message)?;
        if scratch.as_ref().is_none_or(|scratch| scratch.elem_count() < total) {
            // What is queued keeps the old one: memory is freed in the order of the stream.
            *scratch = Some(self.uninitialised(total, DType::F32)?);
        }
        let mut next = scratch.as_ref().map_or(Ok(0), |scratch| self.address(scratch))?;
        let places = places.map(|count| {
            let place = next;
            next += (count * DType::F32.size_in_bytes()) as u64;
            Arg::Pointer(place)
        });
        Ok((places, scratch))
    }

    /// # Safety
    /// The memory is uninitialised: it must be written before it is read.
    unsafe fn allocate<T: CudaDType + DeviceRepr>(&self, elements: usize) -> Result<CudaStorage> {
        // SAFETY: by this function's contract.
        let slice = unsafe { self.cuda.alloc::<T>(elements.max(1)) }?;
        Ok(CudaStorage::wrap_cuda_slice(slice, self.cuda.clone()))
    }

    /// A tensor of zeros.
    pub(super) fn zeros(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        Tensor::zeros(shape.into(), dtype, &self.device)
    }

    /// Copies numbers to the device, after what is queued so far.
    pub(super) fn upload(&self, values: &[u32]) -> Result<Tensor> {
        let tensor = self.uninitialised(values.len(), DType::U32)?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        // SAFETY: the tensor was just made for these values; its memory is freed in the order of the stream.
        unsafe {
            self.bring(bytes.len(), self.address(&tensor)?, |place| {
                place.copy_from_slice(bytes);
                Ok(())
            })?;
        }
        Ok(tensor)
    }

    /// Copies what `fill` writes, all of `bytes`, to the device, after what is queued so far.
    ///
    /// # Safety
    /// `target` must have room for so many bytes in device memory until the stream has passed the copy.
    pub(super) unsafe fn bring(
        &self,
        bytes: usize,
        target: u64,
        fill: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let mut staging = self.staging.lock().map_err(message)?;
        // SAFETY: by this function's contract.
        unsafe { staging.upload(bytes, target, fill) }
    }

    /// Passes `bytes` that lie at `source` on the device to `read`, after waiting for what is queued so far.
    ///
    /// # Safety
    /// So many bytes must be in device memory at `source` when everything queued is done.
    pub(super) unsafe fn fetch(&self, source: u64, bytes: usize, read: impl FnOnce(&[u8]) -> Result<()>) -> Result<()> {
        let mut staging = self.staging.lock().map_err(message)?;
        // SAFETY: by this function's contract.
        unsafe { staging.download(source, bytes, read) }
    }

    /// The address of a contiguous tensor on this device.
    pub(crate) fn address(&self, tensor: &Tensor) -> Result<u64> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("an operation on the GPU got a tensor in host memory") };
        if !layout.is_contiguous() {
            bail!("an operation on the GPU needs contiguous tensors: call contiguous() first");
        }
        let offset = (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64;
        let base = match storage.dtype() {
            DType::F32 => storage.as_cuda_slice::<f32>()?.device_ptr(&self.stream).0,
            DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(&self.stream).0,
            DType::F16 => storage.as_cuda_slice::<f16>()?.device_ptr(&self.stream).0,
            DType::U32 => storage.as_cuda_slice::<u32>()?.device_ptr(&self.stream).0,
            other => bail!("an operation on the GPU got a tensor of {other:?}"),
        };
        Ok(base + offset)
    }

    /// As [`CudaOps::address`], as an argument.
    pub(super) fn pointer(&self, tensor: &Tensor) -> Result<Arg> {
        self.address(tensor).map(Arg::Pointer)
    }

    /// Queues a kernel.
    pub(super) fn launch(&self, kernels: &Kernels, name: &'static str, grid: Grid, args: &[Arg]) -> Result<()> {
        // SAFETY: callers pass the arguments that the kernel's source lists, from live tensors or leased chunks, and an
        // overlapping grid to kernels that wait; memory is freed in the order of this stream.
        unsafe { kernels.launch(&self.stream, name, grid, args) }.map_err(message)?;
        self.queued()
    }

    /// After each kernel or product: the host does not get too far ahead of the GPU.
    pub(super) fn queued(&self) -> Result<()> {
        self.pace.queued(&self.stream)
    }
}

/// Blocks for `n` elements of an element-wise kernel.
pub(super) fn elementwise(n: usize) -> Grid {
    Grid::linear((n as u64).div_ceil(8192), 256)
}
