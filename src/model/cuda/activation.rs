//! GELU, sums and dropout.

use candle_core::{DType, Result, Tensor};
use patrickstar_actors::cuda::Arg;

use super::ops::{CudaOps, PARTIALS, elementwise, kernel};
use crate::model::ops::gelu::Gelu;
use crate::model::param::Param;
use crate::model::rng::Mask;

impl CudaOps {
    /// `a + b`.
    pub(crate) fn sum(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let (n, dtype) = (a.elem_count(), a.dtype());
        let out = self.uninitialised(a.shape(), dtype)?;
        let args = [self.pointer(a)?, self.pointer(b)?, self.pointer(&out)?, Arg::U64(n as u64)];
        self.launch(&self.activation, kernel!(dtype, "add"), elementwise(n), &args)?;
        Ok(out)
    }

    /// `gelu(u)`.
    pub(crate) fn gelu_forward(&self, u: &Tensor, form: Gelu) -> Result<Tensor> {
        let (n, dtype) = (u.elem_count(), u.dtype());
        let out = self.uninitialised(u.shape(), dtype)?;
        let args = [self.pointer(u)?, self.pointer(&out)?, Arg::U64(n as u64), Arg::I32(form as i32)];
        self.launch(&self.activation, kernel!(dtype, "gelu_forward"), elementwise(n), &args)?;
        Ok(out)
    }

    /// `dy gelu'(u) + before`.
    pub(crate) fn gelu_backward(&self, dy: &Tensor, u: &Tensor, form: Gelu, before: Option<Tensor>) -> Result<Tensor> {
        let (n, dtype) = (u.elem_count(), u.dtype());
        let out = self.uninitialised(u.shape(), dtype)?;
        let args =
            [self.pointer(dy)?, self.pointer(u)?, self.pointer(&out)?, Arg::U64(n as u64), Arg::I32(form as i32)];
        self.launch(&self.activation, kernel!(dtype, "gelu_backward"), elementwise(n), &args)?;
        before.map_or(Ok(out.clone()), |before| self.sum(&before, &out))
    }

    /// `dy gelu'(u)`; adds its sum over rows to the gradient of `bias`.
    pub(crate) fn gelu_backward_bias(&self, dy: &Tensor, u: &Tensor, form: Gelu, bias: &Param) -> Result<Tensor> {
        let (cols, dtype) = (bias.rows(), u.dtype());
        let out = self.uninitialised(u.shape(), dtype)?;
        let partial = self.uninitialised((PARTIALS, cols), DType::F32)?;
        let args = [
            self.pointer(dy)?,
            self.pointer(u)?,
            self.pointer(&out)?,
            self.pointer(&partial)?,
            Arg::U64((u.elem_count() / cols) as u64),
            Arg::I32(cols as i32),
            Arg::I32(PARTIALS as i32),
            Arg::I32(form as i32),
        ];
        let grid = self.column_grid(cols, dtype);
        self.launch(&self.activation, kernel!(dtype, "gelu_backward_bias"), grid, &args)?;
        self.accumulate_columns(&partial, bias, dtype)?;
        Ok(out)
    }

    /// `mask * scale * x + before`: forward and backward alike.
    pub(crate) fn dropout(&self, x: &Tensor, mask: &Mask, scale: f32, before: Option<Tensor>) -> Result<Tensor> {
        let (n, dtype) = (x.elem_count(), x.dtype());
        let out = self.uninitialised(x.shape(), dtype)?;
        let (seed, stream, threshold) = mask.parts();
        let rest = [
            self.pointer(&out)?,
            Arg::U64(n as u64),
            Arg::U64(seed),
            Arg::U64(stream),
            Arg::U64(u64::from(threshold)),
            Arg::F32(scale),
        ];
        let (name, mut args) = match &before {
            Some(before) => (kernel!(dtype, "dropout_add"), vec![self.pointer(x)?, self.pointer(before)?]),
            None => (kernel!(dtype, "dropout"), vec![self.pointer(x)?]),
        };
        args.extend(rest);
        self.launch(&self.activation, name, elementwise(n), &args)?;
        Ok(out)
    }
}
