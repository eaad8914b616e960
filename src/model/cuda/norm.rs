//! Layer norm, RMS norm, and sums over rows for the gradients of vectors.

use candle_core::{DType, Result, Tensor};
use patrickstar_actors::cuda::{Arg, Grid};

use super::ops::{CudaOps, PARTIALS, kernel};
use crate::model::param::Param;

/// Threads of the kernels that walk over rows.
const BACKWARD_THREADS: u32 = 512;
const FORWARD_BLOCKS: u64 = 2048;
/// Columns that a block of `accumulate_columns` adds up.
const COLUMNS_PER_BLOCK: u64 = 32;

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
        let grid = Grid::linear((rows as u64).min(FORWARD_BLOCKS), 256);
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
        let dweight = self.uninitialised((PARTIALS, cols), DType::F32)?;
        let dbias = self.uninitialised((PARTIALS, cols), DType::F32)?;
        let args = [
            self.pointer(dy)?,
            self.pointer(x)?,
            Arg::Pointer(self.weight_address(weight)?),
            self.pointer(stats)?,
            before.as_ref().map_or(Ok(Arg::Pointer(0)), |before| self.pointer(before))?,
            self.pointer(&dx)?,
            self.pointer(&dweight)?,
            self.pointer(&dbias)?,
            Arg::U64(rows as u64),
            Arg::I32(cols as i32),
            Arg::I32(PARTIALS as i32),
        ];
        let grid = Grid::linear(PARTIALS as u64, BACKWARD_THREADS);
        self.launch(&self.norm, kernel!(dtype, "layer_norm_backward"), grid, &args)?;
        self.accumulate_columns(&dweight, weight, dtype)?;
        self.accumulate_columns(&dbias, bias, dtype)?;
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
        let grid = Grid::linear((rows as u64).min(FORWARD_BLOCKS), 256);
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
        let dweight = self.uninitialised((PARTIALS, cols), DType::F32)?;
        let args = [
            self.pointer(dy)?,
            self.pointer(x)?,
            Arg::Pointer(self.weight_address(weight)?),
            self.pointer(stats)?,
            before.as_ref().map_or(Ok(Arg::Pointer(0)), |before| self.pointer(before))?,
            self.pointer(&dx)?,
            self.pointer(&dweight)?,
            Arg::U64(rows as u64),
            Arg::I32(cols as i32),
            Arg::I32(PARTIALS as i32),
        ];
        let grid = Grid::linear(PARTIALS as u64, BACKWARD_THREADS);
        self.launch(&self.norm, kernel!(dtype, "rms_norm_backward"), grid, &args)?;
        self.accumulate_columns(&dweight, weight, dtype)?;
        Ok(dx)
    }

    /// Adds the sum of the rows of `dy` to the gradient of the vector `param`.
    pub(super) fn add_column_sums(&self, dy: &Tensor, param: &Param) -> Result<()> {
        let (cols, dtype) = (param.rows(), dy.dtype());
        let partial = self.uninitialised((PARTIALS, cols), DType::F32)?;
        let args = [
            self.pointer(dy)?,
            self.pointer(&partial)?,
            Arg::U64((dy.elem_count() / cols) as u64),
            Arg::I32(cols as i32),
            Arg::I32(PARTIALS as i32),
        ];
        let grid = self.column_grid(cols, dtype);
        self.launch(&self.norm, kernel!(dtype, "column_sums"), grid, &args)?;
        self.accumulate_columns(&partial, param, dtype)
    }

    /// Blocks of a kernel that leaves partial sums of columns.
    pub(super) fn column_grid(&self, cols: usize, dtype: DType) -> Grid {
        let columns_per_block = 512 / dtype.size_in_bytes() as u32;
        Grid { blocks: [(cols as u32).div_ceil(columns_per_block), PARTIALS as u32, 1], threads: 256, shared: 0 }
    }

    /// Adds the sum of partial sums to the gradient of the vector `param`.
    pub(super) fn accumulate_columns(&self, partial: &Tensor, param: &Param, dtype: DType) -> Result<()> {
        let Some(gradient) = self.gradient_address(param)? else { return Ok(()) };
        let cols = param.rows();
        let args = [self.pointer(partial)?, Arg::I32(PARTIALS as i32), Arg::I32(cols as i32), Arg::Pointer(gradient)];
        let grid = Grid::linear((cols as u64).div_ceil(COLUMNS_PER_BLOCK), 512);
        self.launch(&self.norm, kernel!(dtype, "accumulate_columns"), grid, &args)
    }
}
