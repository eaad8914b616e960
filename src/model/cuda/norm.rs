//! Layer norm, RMS norm, and sums over rows for the gradients of vectors.

use candle_core::{DType, Result, Tensor};
use patrickstar_actors::cuda::{Arg, Grid};

use super::ops::{COLUMN_COUNTERS, CudaOps, kernel};
use crate::model::param::Param;

/// Packs of 16 bytes that a thread of the forward kernels keeps, and threads of a block whose warps take a row each.
const KEPT_PACKS: usize = 8;
const FORWARD_THREADS: usize = 128;
const MOST_FORWARD_THREADS: usize = 256;
/// Packs of a row up to which a block of the backward kernels has 512 threads, and what all of its blocks stage.
const NARROW_PACKS: usize = 512;
const STAGED_BYTES: u32 = 96 << 10;
/// Blocks of the backward kernels, and so partial sums: they decide the order of additions, so they are as many on every
/// GPU. With one for nearly each of an H100's 132 multiprocessors memory is busier than with two.
const NORM_PARTIALS: usize = 128;
/// Partial sums of `column_sums`: few, since the last block of each tile adds them.
const SUM_PARTIALS: usize = 32;
/// Columns that a block of `accumulate_columns` adds up.
const COLUMNS_PER_BLOCK: u64 = 32;
const WARP: usize = 32;

/// Packs of 16 bytes in a row.
fn packs(cols: usize, dtype: DType) -> usize {
    cols.div_ceil(16 / dtype.size_in_bytes())
}

fn forward_grid(rows: usize, cols: usize, dtype: DType) -> Grid {
    let warps = packs(cols, dtype).div_ceil(WARP * KEPT_PACKS).next_power_of_two();
    if warps == 1 {
        return Grid::linear(rows.div_ceil(FORWARD_THREADS / WARP) as u64, FORWARD_THREADS as u32);
    }
    Grid::linear(rows as u64, (WARP * warps).min(MOST_FORWARD_THREADS) as u32)
}

fn backward_grid(cols: usize, dtype: DType) -> Grid {
    let threads = if packs(cols, dtype) <= NARROW_PACKS { 512 } else { 1024 };
    Grid { shared: STAGED_BYTES, ..Grid::linear(NORM_PARTIALS as u64, threads) }
}

impl CudaOps {
    /// `(x - mean) / sqrt(variance + eps) * weight + bias`, and mean and reciprocal standard deviation of each row.
    pub(crate) fn layer_norm_forward(
        &self,
        x: &Tensor,
        weight: &Param,
        bias: &Param,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        let (cols, dtype) = (weight.rows(), x.dtype());
        let rows = x.elem_count() / cols;
        let y = self.uninitialised(x.shape(), dtype)?;
        let stats = self.uninitialised((rows, 2), DType::F32)?;
        let args = [
            self.pointer(x)?,
            Arg::Pointer(self.weight_address(weight)?),
            Arg::Pointer(self.weight_address(bias)?),
            self.pointer(&y)?,
            self.pointer(&stats)?,
            Arg::U64(rows as u64),
            Arg::I32(cols as i32),
            Arg::F32(eps),
        ];
        let grid = forward_grid(rows, cols, dtype);
        self.launch(&self.norm, kernel!(dtype, "layer_norm_forward"), grid, &args)?;
        Ok((y, stats))
    }

    /// The gradient of `x` plus `before`; adds to those of `weight` and `bias`.
    pub(crate) fn layer_norm_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        stats: &Tensor,
        weight: &Param,
        bias: &Param,
        before: Option<Tensor>,
    ) -> Result<Tensor> {
        let (cols, dtype) = (weight.rows(), x.dtype());
        let rows = x.elem_count() / cols;
        let dx = self.uninitialised(x.shape(), dtype)?;
        let ([dweight, dbias], _scratch) = self.scratch([NORM_PARTIALS * cols; 2])?;
        let args = [
            self.pointer(dy)?,
            self.pointer(x)?,
            Arg::Pointer(self.weight_address(weight)?),
            self.pointer(stats)?,
            before.as_ref().map_or(Ok(Arg::Pointer(0)), |before| self.pointer(before))?,
            self.pointer(&dx)?,
            dweight,
            dbias,
            Arg::U64(rows as u64),
            Arg::I32(cols as i32),
            Arg::I32(NORM_PARTIALS as i32),
        ];
        self.launch(&self.norm, kernel!(dtype, "layer_norm_backward"), backward_grid(cols, dtype), &args)?;
        self.accumulate_columns(&[(dweight, weight), (dbias, bias)], NORM_PARTIALS, dtype)?;
        Ok(dx)
    }

    /// `x / sqrt(mean(x²) + eps) * weight`, and the reciprocal root of each row.
    pub(crate) fn rms_norm_forward(&self, x: &Tensor, weight: &Param, eps: f32) -> Result<(Tensor, Tensor)> {
        let (cols, dtype) = (weight.rows(), x.dtype());
        let rows = x.elem_count() / cols;
        let y = self.uninitialised(x.shape(), dtype)?;
        let stats = self.uninitialised(rows, DType::F32)?;
        let args = [
            self.pointer(x)?,
            Arg::Pointer(self.weight_address(weight)?),
            self.pointer(&y)?,
            self.pointer(&stats)?,
            Arg::U64(rows as u64),
            Arg::I32(cols as i32),
            Arg::F32(eps),
        ];
        let grid = forward_grid(rows, cols, dtype);
        self.launch(&self.norm, kernel!(dtype, "rms_norm_forward"), grid, &args)?;
        Ok((y, stats))
    }

    /// The gradient of `x` plus `before`; adds to that of `weight`.
    pub(crate) fn rms_norm_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        stats: &Tensor,
        weight: &Param,
        before: Option<Tensor>,
    ) -> Result<Tensor> {
        let (cols, dtype) = (weight.rows(), x.dtype());
        let rows = x.elem_count() / cols;
        let dx = self.uninitialised(x.shape(), dtype)?;
        let ([dweight], _scratch) = self.scratch([NORM_PARTIALS * cols])?;
        let args = [
            self.pointer(dy)?,
            self.pointer(x)?,
            Arg::Pointer(self.weight_address(weight)?),
            self.pointer(stats)?,
            before.as_ref().map_or(Ok(Arg::Pointer(0)), |before| self.pointer(before))?,
            self.pointer(&dx)?,
            dweight,
            Arg::U64(rows as u64),
            Arg::I32(cols as i32),
            Arg::I32(NORM_PARTIALS as i32),
        ];
        self.launch(&self.norm, kernel!(dtype, "rms_norm_backward"), backward_grid(cols, dtype), &args)?;
        self.accumulate_columns(&[(dweight, weight)], NORM_PARTIALS, dtype)?;
        Ok(dx)
    }

    /// Adds the sum of the rows of `dy` to the gradient of the vector `param`.
    pub(super) fn add_column_sums(&self, dy: &Tensor, param: &Param) -> Result<()> {
        let Some(gradient) = self.gradient_address(param)? else { return Ok(()) };
        let (cols, dtype) = (param.rows(), dy.dtype());
        let ([partial], _scratch) = self.scratch([SUM_PARTIALS * cols])?;
        let grid = self.column_grid(cols, dtype, SUM_PARTIALS);
        // Beyond a million columns there are not enough counters, and the sums take a launch of their own.
        let is_counted = grid.blocks[0] as usize <= COLUMN_COUNTERS;
        let args = [
            self.pointer(dy)?,
            partial,
            Arg::U64((dy.elem_count() / cols) as u64),
            Arg::I32(cols as i32),
            Arg::Pointer(gradient),
            if is_counted { self.pointer(&self.column_counters)? } else { Arg::Pointer(0) },
        ];
        self.launch(&self.norm, kernel!(dtype, "column_sums"), grid, &args)?;
        if is_counted { Ok(()) } else { self.accumulate_columns(&[(partial, param)], SUM_PARTIALS, dtype) }
    }

    /// Blocks of a kernel that leaves `partials` partial sums of columns.
    pub(super) fn column_grid(&self, cols: usize, dtype: DType, partials: usize) -> Grid {
        let columns_per_block = 512 / dtype.size_in_bytes() as u32;
        let mut grid = Grid::linear(u64::from((cols as u32).div_ceil(columns_per_block)), 256);
        grid.blocks[1] = partials as u32;
        grid
    }

    /// Adds the sums of partial sums to the gradients of one or two vectors of one length.
    pub(super) fn accumulate_columns(&self, sums: &[(Arg, &Param)], partials: usize, dtype: DType) -> Result<()> {
        let mut pairs = Vec::with_capacity(2);
        for &(partial, param) in sums {
            if let Some(gradient) = self.gradient_address(param)? {
                pairs.push([partial, Arg::Pointer(gradient)]);
            }
        }
        let (Some(&first), Some(&last)) = (pairs.first(), pairs.last()) else { return Ok(()) };
        let cols = sums[0].1.rows();
        let args = [&first[..], &last, &[Arg::I32(partials as i32), Arg::I32(cols as i32)]].concat();
        let mut grid = Grid::linear((cols as u64).div_ceil(COLUMNS_PER_BLOCK), 512).overlapping();
        grid.blocks[1] = pairs.len() as u32;
        self.launch(&self.norm, kernel!(dtype, "accumulate_columns"), grid, &args)
    }
}
