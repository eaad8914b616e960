//! GELU, SwiGLU, sums and dropout.

use candle_core::{D, DType, Result, Tensor};
use patrickstar_actors::cuda::{Arg, Grid};

use super::ops::{CudaOps, elementwise, kernel};
use crate::model::ops::gelu::Gelu;
use crate::model::ops::swiglu::halved;
use crate::model::param::Param;
use crate::model::rng::Mask;

/// Rows that a block of the SwiGLU kernels walks over, where there are enough of them.
const SWIGLU_ROWS: usize = 32;
const MOST_BLOCKS: usize = 65_535;
/// Partial sums of the gradient of a bias. They decide the order of additions, so they are as many on every GPU.
const PARTIALS: usize = 128;

impl CudaOps {
    /// `a + b`.
    pub(crate) fn sum(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let (n, dtype) = (a.elem_count(), a.dtype());
        let out = self.uninitialised(a.shape(), dtype)?;
        let args = [self.pointer(a)?, self.pointer(b)?, self.pointer(&out)?, Arg::U64(n as u64)];
        self.launch(&self.activation, kernel!(dtype, "add"), elementwise(n), &args)?;
        Ok(out)
    }

    /// Queues a kernel that reads from where it may not, which breaks the context as a bug in a kernel would.
    pub(crate) fn read_forbidden_memory(&self) -> Result<()> {
        let nowhere = Arg::Pointer(16);
        let args = [nowhere, nowhere, nowhere, Arg::U64(1)];
        self.launch(&self.activation, "add_f32", Grid::linear(1, 256), &args)
    }

    /// Reads all of `x` and nothing else, which leaves a cache with clean copies of its end.
    pub(crate) fn read_through(&self, x: &Tensor) -> Result<()> {
        let bytes = x.elem_count() * x.dtype().size_in_bytes();
        let never = self.uninitialised(1, DType::U32)?;
        let args = [self.pointer(x)?, Arg::U64(bytes as u64 / 16), self.pointer(&never)?];
        self.launch(&self.cast, "read_through", elementwise(bytes / 16), &args)
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
        let ([partial], _scratch) = self.scratch([PARTIALS * cols])?;
        let args = [
            self.pointer(dy)?,
            self.pointer(u)?,
            self.pointer(&out)?,
            partial,
            Arg::U64((u.elem_count() / cols) as u64),
            Arg::I32(cols as i32),
            Arg::I32(PARTIALS as i32),
            Arg::I32(form as i32),
        ];
        let grid = self.column_grid(cols, dtype, PARTIALS);
        self.launch(&self.activation, kernel!(dtype, "gelu_backward_bias"), grid, &args)?;
        self.accumulate_columns(&[(partial, bias)], PARTIALS, dtype)?;
        Ok(out)
    }

    /// `silu(gate) * up`.
    pub(crate) fn swiglu_forward(&self, gate_up: &Tensor) -> Result<Tensor> {
        let dtype = gate_up.dtype();
        let out = self.uninitialised(halved(gate_up.dims()), dtype)?;
        let (rows, cols, grid) = self.swiglu_sizes(gate_up)?;
        let args = [self.pointer(gate_up)?, self.pointer(&out)?, rows, cols];
        self.launch(&self.activation, kernel!(dtype, "swiglu_forward"), grid, &args)?;
        Ok(out)
    }

    /// The gradient of gates and ups, plus `before`.
    pub(crate) fn swiglu_backward(&self, dy: &Tensor, gate_up: &Tensor, before: Option<Tensor>) -> Result<Tensor> {
        let dtype = gate_up.dtype();
        let out = self.uninitialised(gate_up.shape(), dtype)?;
        let (rows, cols, grid) = self.swiglu_sizes(gate_up)?;
        let args = [self.pointer(dy)?, self.pointer(gate_up)?, self.pointer(&out)?, rows, cols];
        self.launch(&self.activation, kernel!(dtype, "swiglu_backward"), grid, &args)?;
        before.map_or(Ok(out.clone()), |before| self.sum(&before, &out))
    }

    /// Rows, columns of a half, and the grid for both.
    fn swiglu_sizes(&self, gate_up: &Tensor) -> Result<(Arg, Arg, Grid)> {
        let cols = gate_up.dim(D::Minus1)? / 2;
        let rows = gate_up.elem_count() / (2 * cols);
        let grid = self.column_grid(cols, gate_up.dtype(), rows.div_ceil(SWIGLU_ROWS).min(MOST_BLOCKS));
        Ok((Arg::U64(rows as u64), Arg::I32(cols as i32), grid))
    }

    /// `mask * x + before`: forward and backward alike.
    pub(crate) fn dropout(&self, x: &Tensor, mask: &Mask, before: Option<Tensor>) -> Result<Tensor> {
        let (n, dtype) = (x.elem_count(), x.dtype());
        let out = self.uninitialised(x.shape(), dtype)?;
        let (seed, stream, threshold) = mask.parts();
        let rest = [
            self.pointer(&out)?,
            Arg::U64(n as u64),
            Arg::U64(seed),
            Arg::U64(stream),
            Arg::U64(u64::from(threshold)),
            Arg::F32(mask.scale()),
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
