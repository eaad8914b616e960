//! `y = x Wᵀ + b`, and its backward: `dx = dy W`, `dW += dyᵀ x`, `db += Σ dy`.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::access::{accumulate, column_sums, panels, slice, tensor_like, wants_gradient, weight_rows, with_slice};
use super::gemm::{Matrix, multiply, product};
use crate::model::param::{GradientSlice, Param};

struct Linear {
    weight: Param,
    bias: Option<Param>,
}

/// Applies `weight` (out, in) and `bias` (out) to the last dimension of `x` (.., in).
pub fn linear(x: &Tensor, weight: &Param, bias: Option<&Param>) -> Result<Tensor> {
    if weight.shape().len() != 2 || x.dims().last() != Some(&weight.columns()) {
        bail!("linear: input {:?} does not fit `{}` of shape {:?}", x.dims(), weight.name(), weight.shape());
    }
    if let Some(bias) = bias
        && bias.shape() != [weight.rows()]
    {
        bail!("linear: bias `{}` has shape {:?}, expected [{}]", bias.name(), bias.shape(), weight.rows());
    }
    x.contiguous()?.apply_op1(Linear { weight: weight.clone(), bias: bias.cloned() })
}

/// The prediction of a head without bias: `x Wᵀ`, panel by panel.
pub fn logits(x: &Tensor, weight: &Param) -> Result<Tensor> {
    linear(x, weight, None)
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice("linear", storage, layout)?;
        let (out, inner) = (self.weight.rows(), self.weight.columns());
        let tokens = x.len() / inner;
        let mut y = vec![0f32; tokens * out];
        for panel in panels(&self.weight) {
            let w = weight_rows(&self.weight, panel.tile, panel.row_in_tile, panel.rows)?;
            let target = y[panel.row..].as_mut_ptr();
            // SAFETY: columns [row, row + rows) of the tokens x out matrix `y`.
            unsafe {
                let shape = (tokens, panel.rows, inner);
                multiply(shape, Matrix::new(x, inner), Matrix::new(&w, inner).t(), target, out, false, 1.0, true);
            }
        }
        if let Some(bias) = &self.bias {
            let bias = weight_rows(bias, 0, 0, out)?;
            y.par_chunks_mut(out).for_each(|row| row.iter_mut().zip(bias.iter()).for_each(|(y, b)| *y += b));
        }
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = out;
        }
        Ok((CpuStorage::F32(y), Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let dx = with_slice("linear", x, |x| with_slice("linear", &dy, |dy| self.backward(x, dy)))?;
        tensor_like(dx, x).map(Some)
    }
}

impl Linear {
    fn backward(&self, x: &[f32], dy: &[f32]) -> Result<Vec<f32>> {
        let (out, inner) = (self.weight.rows(), self.weight.columns());
        let tokens = x.len() / inner;
        let mut dx = vec![0f32; x.len()];
        for (index, panel) in panels(&self.weight).into_iter().enumerate() {
            let w = weight_rows(&self.weight, panel.tile, panel.row_in_tile, panel.rows)?;
            let dy = Matrix { data: dy[panel.row..].as_ptr(), row_stride: out, column_stride: 1 };
            product((tokens, inner, panel.rows), dy, Matrix::new(&w, inner), &mut dx, index > 0);
            let shape = (panel.rows, inner, tokens);
            add_product(&self.weight, panel.tile, panel.row_in_tile * inner, shape, dy.t(), Matrix::new(x, inner))?;
        }
        if let Some(bias) = &self.bias
            && wants_gradient(bias)?
        {
            accumulate(bias, 0, 0, &column_sums(tokens, out, |row, column| dy[row * out + column]))?;
        }
        Ok(dx)
    }
}

/// Adds `a b` to the gradient of `param`: straight into an fp32 chunk, through fp32 scratch and one rounding for bf16.
pub(super) fn add_product(
    param: &Param,
    tile: usize,
    offset: usize,
    shape: (usize, usize, usize),
    a: Matrix,
    b: Matrix,
) -> Result<()> {
    let elements = shape.0 * shape.1;
    // SAFETY: this is the only slice of the tile's gradient: operations run one after another on the compute thread.
    match unsafe { param.gradient(tile)? } {
        None => Ok(()),
        Some(GradientSlice::F32(gradient)) => {
            product(shape, a, b, &mut gradient[offset..offset + elements], true);
            Ok(())
        }
        Some(GradientSlice::Bf16(_)) => {
            let mut scratch = vec![0f32; elements];
            product(shape, a, b, &mut scratch, false);
            accumulate(param, tile, offset, &scratch)
        }
    }
}
