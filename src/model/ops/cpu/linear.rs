//! `y = x Wᵀ + b (+ residual)`, and its gradients, panel by panel of the weight's rows.

#![expect(unsafe_code, reason = "multiplies parts of matrices by address")]

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::access::{accumulate, column_sums, panels, start_from, tensor, wants_gradient, weight_rows, with_slice};
use super::gemm::{Matrix, multiply, product};
use crate::model::param::{GradientSlice, Param};

/// `x Wᵀ + bias + residual`.
pub(crate) fn linear_forward(
    x: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let (out, inner) = (weight.rows(), weight.columns());
    let tokens = x.elem_count() / inner;
    let mut y = start_from(residual.cloned(), tokens * out)?;
    with_slice("linear", &x.contiguous()?, |x| {
        for panel in panels(weight) {
            let w = weight_rows(weight, panel.tile, panel.row_in_tile, panel.rows)?;
            let target = y[panel.row..].as_mut_ptr();
            // SAFETY: columns [row, row + rows) of the tokens x out matrix `y`.
            unsafe {
                let shape = (tokens, panel.rows, inner);
                let (x, w) = (Matrix::new(x, inner), Matrix::new(&w, inner).t());
                multiply(shape, x, w, target, out, residual.is_some(), 1.0, true);
            }
        }
        Ok(())
    })?;
    if let Some(bias) = bias {
        let bias = weight_rows(bias, 0, 0, out)?;
        y.par_chunks_mut(out).for_each(|row| row.iter_mut().zip(bias.iter()).for_each(|(y, b)| *y += b));
    }
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = out;
    }
    tensor(y, dims)
}

/// `dy W + before`.
pub(crate) fn linear_backward_input(dy: &Tensor, weight: &Param, before: Option<Tensor>) -> Result<Tensor> {
    let (out, inner) = (weight.rows(), weight.columns());
    let tokens = dy.elem_count() / out;
    let mut accumulate = before.is_some();
    let mut dx = start_from(before, tokens * inner)?;
    with_slice("linear", &dy.contiguous()?, |dy| {
        for panel in panels(weight) {
            let w = weight_rows(weight, panel.tile, panel.row_in_tile, panel.rows)?;
            let dy = Matrix { data: dy[panel.row..].as_ptr(), row_stride: out, column_stride: 1 };
            product((tokens, inner, panel.rows), dy, Matrix::new(&w, inner), &mut dx, accumulate);
            accumulate = true;
        }
        Ok(())
    })?;
    let mut dims = dy.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = inner;
    }
    tensor(dx, dims)
}

/// Adds `dyᵀ x` to the gradient of `weight` and the sum of `dy` to that of `bias`.
pub(crate) fn linear_backward_weight(dy: &Tensor, x: &Tensor, weight: &Param, bias: Option<&Param>) -> Result<()> {
    let (out, inner) = (weight.rows(), weight.columns());
    let tokens = dy.elem_count() / out;
    with_slice("linear", &dy.contiguous()?, |dy| {
        with_slice("linear", &x.contiguous()?, |x| {
            for panel in panels(weight) {
                let dy = Matrix { data: dy[panel.row..].as_ptr(), row_stride: out, column_stride: 1 };
                let shape = (panel.rows, inner, tokens);
                add_product(weight, panel.tile, panel.row_in_tile * inner, shape, dy.t(), Matrix::new(x, inner))?;
            }
            Ok(())
        })?;
        match bias {
            Some(bias) if wants_gradient(bias)? => {
                accumulate(bias, 0, 0, &column_sums(tokens, out, |row, column| dy[row * out + column]))
            }
            _ => Ok(()),
        }
    })
}

/// Adds `a b` to the gradient of `param`: straight into an fp32 chunk, through fp32 scratch and one rounding else.
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
        Some(GradientSlice::Bf16(_) | GradientSlice::F16(_)) => {
            let mut scratch = vec![0f32; elements];
            product(shape, a, b, &mut scratch, false);
            accumulate(param, tile, offset, &scratch)
        }
    }
}
