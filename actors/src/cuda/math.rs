//! The optimizer's and reduction's arithmetic on chunks in device memory, with the bits of the host's.

use std::sync::Arc;

use cudarc::driver::{CudaStream, DevicePtr};

use super::context::{Gpu, device_error};
use super::launch::{Arg, Grid};
use crate::adam::StepScalars;
use crate::memory::{DeviceMath, MemoryError, StateAddresses};
use crate::types::Precision;

const ELEMENTS_PER_BLOCK: u64 = 1024;
const ROWS_PER_BLOCK: u64 = 32;

/// Chunk arithmetic on a stream of its own.
pub struct ChunkMath {
    gpu: Arc<Gpu>,
    stream: Arc<CudaStream>,
}

impl ChunkMath {
    /// On `gpu`.
    pub fn new(gpu: Arc<Gpu>) -> Result<Self, MemoryError> {
        let stream = gpu.context().new_stream().map_err(|error| device_error("make a stream", error))?;
        Ok(ChunkMath { gpu, stream })
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
        };
        let count = [Arg::U64(elements as u64)];
        let args = [&head[..], &tail, &count, &arguments(scalars, decay)].concat();
        let grid = Grid::linear((elements as u64).div_ceil(ELEMENTS_PER_BLOCK), 256);
        // SAFETY: the caller vouches for the addresses.
        unsafe { self.gpu.kernels.launch(&self.stream, name, grid, &args) }
    }

    unsafe fn row_sums(
        &self,
        precision: Precision,
        gradient: *const u8,
        rows: usize,
        columns: usize,
    ) -> Result<Vec<f64>, MemoryError> {
        let failed = |error| device_error("measure a gradient", error);
        // SAFETY: written wholly by the kernel before it is read.
        let sums = unsafe { self.stream.alloc::<f64>(rows) }.map_err(failed)?;
        let name = match precision {
            Precision::Fp32 => "row_sums_f32",
            Precision::Bf16 => "row_sums_bf16",
        };
        let args = [
            Arg::Pointer(gradient as u64),
            Arg::Pointer(sums.device_ptr(&self.stream).0),
            Arg::U64(rows as u64),
            Arg::U64(columns as u64),
        ];
        let grid = Grid::linear((rows as u64).div_ceil(ROWS_PER_BLOCK), 128);
        // SAFETY: the caller vouches for the gradient; `sums` has a place for every row.
        unsafe { self.gpu.kernels.launch(&self.stream, name, grid, &args)? };
        self.stream.clone_dtoh(&sums).map_err(failed)
    }

    fn finish(&self) -> Result<(), MemoryError> {
        self.stream.synchronize().map_err(|error| device_error("finish its work on chunks", error))
    }
}
