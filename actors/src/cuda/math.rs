//! The optimizer's and reduction's arithmetic on chunks in device memory, with the bits of the host's.

#![expect(unsafe_code, reason = "calls the driver and launches kernels on leased chunks")]

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::context::{Gpu, device_error, sleep_until_done};
use super::launch::{Arg, Grid};
use crate::adam::StepScalars;
use crate::memory::{DeviceMath, MemoryError, Rows, StateAddresses};
use crate::types::Precision;

const ELEMENTS_PER_BLOCK: u64 = 1024;
const ROWS_PER_BLOCK: u64 = 32;

/// Chunk arithmetic on a stream of its own.
pub struct ChunkMath {
    gpu: Arc<Gpu>,
    stream: Arc<CudaStream>,
    /// Where sums of rows are written. Not from the pool: a block that another stream gave back would tie this stream to
    /// it.
    sums: Mutex<Sums>,
}

/// Growing room for numbers in device memory, and for as many in pinned host memory: a copy to ordinary memory keeps this
/// thread spinning in the driver, whose locks the compute thread wants at the same time.
struct Sums {
    context: Arc<CudaContext>,
    on_device: sys::CUdeviceptr,
    on_host: *mut f64,
    capacity: usize,
}

// SAFETY: both allocations belong to this value alone, which is used under a lock; the driver takes them back on any thread.
unsafe impl Send for Sums {}

impl Sums {
    fn new(context: Arc<CudaContext>) -> Self {
        Sums { context, on_device: 0, on_host: std::ptr::null_mut(), capacity: 0 }
    }

    /// Makes room for `count`; work on a smaller one must be over.
    fn reserve(&mut self, count: usize) -> Result<(), DriverError> {
        if count > self.capacity {
            self.context.bind_to_thread()?;
            self.release();
            let capacity = count.next_power_of_two();
            let bytes = capacity * size_of::<f64>();
            // SAFETY: plain allocations, freed by `release`. The host's is cleared before anybody reads it as numbers.
            unsafe {
                self.on_device = result::malloc_sync(bytes)?;
                self.on_host = result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE)?.cast();
                self.on_host.write_bytes(0, capacity);
            }
            self.capacity = capacity;
        }
        Ok(())
    }

    /// The first `count` numbers, once the kernels queued on `stream` have written them.
    fn read(&mut self, count: usize, stream: &CudaStream) -> Result<&[f64], DriverError> {
        if count == 0 {
            return Ok(&[]);
        }
        assert!(count <= self.capacity, "{count} numbers of {} were reserved", self.capacity);
        // SAFETY: `reserve` made room for them; nobody else has a reference, and the copy is over before this one is read.
        let values = unsafe { std::slice::from_raw_parts_mut(self.on_host, count) };
        // SAFETY: as above; the device's room has as many.
        unsafe { result::memcpy_dtoh_async(values, self.on_device, stream.cu_stream()) }?;
        sleep_until_done(stream)?;
        Ok(values)
    }

    fn release(&mut self) {
        self.capacity = 0;
        let (device, host) =
            (std::mem::take(&mut self.on_device), std::mem::replace(&mut self.on_host, std::ptr::null_mut()));
        // SAFETY: allocated by `reserve`, each at most once; nobody uses them any more.
        unsafe {
            if device != 0 {
                let _ = result::free_sync(device);
            }
            if !host.is_null() {
                let _ = result::free_host(host.cast());
            }
        }
    }
}

impl Drop for Sums {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        self.release();
    }
}

impl ChunkMath {
    /// On a stream of its own.
    pub fn new(gpu: Arc<Gpu>) -> Result<Self, MemoryError> {
        let stream = gpu.context().new_stream().map_err(|error| device_error("make a stream", error))?;
        Ok(Self::on(gpu, stream))
    }

    /// On `stream` of `gpu`, in the order of what else is queued there.
    pub fn on(gpu: Arc<Gpu>, stream: Arc<CudaStream>) -> Self {
        let context = Arc::clone(gpu.context());
        ChunkMath { gpu, stream, sums: Mutex::new(Sums::new(context)) }
    }
}

/// The scalars as the kernels take them.
fn arguments(scalars: &StepScalars, decay: bool) -> [Arg; 11] {
    let use_l2 = decay && scalars.l2 != 0.0;
    let floats = [
        scalars.gradient_scale,
        if decay { scalars.shrink } else { 1.0 },
        scalars.l2,
        scalars.lerp,
        scalars.beta2,
        scalars.one_minus_beta2,
        scalars.sqrt_correction2,
        scalars.eps,
        scalars.negative_step_size,
    ];
    let mut all = [Arg::I32(i32::from(use_l2)); 11];
    for (argument, value) in all.iter_mut().zip(floats) {
        *argument = Arg::F32(value);
    }
    all[10] = Arg::I32(i32::from(scalars.lerp_from_gradient));
    all
}

impl DeviceMath for ChunkMath {
    unsafe fn step(
        &self,
        precision: Precision,
        scalars: &StepScalars,
        decay: bool,
        states: StateAddresses,
        elements: usize,
    ) -> Result<(), MemoryError> {
        let pointer = |address: *mut u8| Arg::Pointer(address as u64);
        let tail = [pointer(states.momentum), pointer(states.variance), pointer(states.gradient)];
        let (name, head) = match precision {
            Precision::Fp32 => ("adam_fp32", vec![pointer(states.weight)]),
            Precision::Bf16 => ("adam_bf16", vec![pointer(states.weight), pointer(states.low)]),
            Precision::Fp16 => ("adam_fp16", vec![pointer(states.weight), pointer(states.master)]),
        };
        let count = [Arg::U64(elements as u64)];
        let args = [&head[..], &tail, &count, &arguments(scalars, decay)].concat();
        let grid = Grid::linear((elements as u64).div_ceil(ELEMENTS_PER_BLOCK), 256);
        // SAFETY: the caller vouches for the addresses.
        unsafe { self.gpu.kernels.launch(&self.stream, name, grid, &args) }
    }

    unsafe fn row_sums(&self, precision: Precision, gradients: &[Rows]) -> Result<Vec<Vec<f64>>, MemoryError> {
        let failed = |error| device_error("measure a gradient", error);
        let total: usize = gradients.iter().map(|gradient| gradient.rows).sum();
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.reserve(total).map_err(failed)?;
        let name = match precision {
            Precision::Fp32 => "row_sums_f32",
            Precision::Bf16 => "row_sums_bf16",
            Precision::Fp16 => "row_sums_fp16",
        };
        let mut place = sums.on_device;
        for &Rows { gradient, rows, columns } in gradients {
            let (rows, columns) = (rows as u64, columns as u64);
            let args = [Arg::Pointer(gradient as u64), Arg::Pointer(place), Arg::U64(rows), Arg::U64(columns)];
            let grid = Grid::linear(rows.div_ceil(ROWS_PER_BLOCK), 128);
            // SAFETY: the caller vouches for the gradient; `sums` has a place for every row.
            unsafe { self.gpu.kernels.launch(&self.stream, name, grid, &args)? };
            place += rows * size_of::<f64>() as u64;
        }
        let mut rest = sums.read(total, &self.stream).map_err(failed)?;
        let of_each = gradients.iter().map(|gradient| {
            let (first, others) = rest.split_at(gradient.rows);
            rest = others;
            first.to_vec()
        });
        Ok(of_each.collect())
    }

    fn finish(&self) -> Result<(), MemoryError> {
        sleep_until_done(&self.stream).map_err(|error| device_error("finish its work on chunks", error))
    }
}
