//! The gate of SwiGLU (Shazeer, 2020).

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::access::{start_from, tensor, with_slice};
use crate::model::ops::swiglu::halved;

fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `silu(gate) * up`.
pub(crate) fn swiglu_forward(gate_up: &Tensor) -> Result<Tensor> {
    let dims = halved(gate_up.dims());
    let width = dims.last().copied().unwrap_or(1);
    let mut y = vec![0f32; gate_up.elem_count() / 2];
    with_slice("swiglu", &gate_up.contiguous()?, |gate_up| {
        y.par_chunks_mut(width).zip(gate_up.par_chunks(2 * width)).for_each(|(y, gate_up)| {
            let (gate, up) = gate_up.split_at(width);
            for i in 0..width {
                y[i] = gate[i] * logistic(gate[i]) * up[i];
            }
        });
        Ok(())
    })?;
    tensor(y, dims)
}

/// The gradient of gates and ups, plus `before`.
pub(crate) fn swiglu_backward(dy: &Tensor, gate_up: &Tensor, before: Option<Tensor>) -> Result<Tensor> {
    let width = gate_up.dims().last().copied().unwrap_or(2) / 2;
    let mut dx = start_from(before, gate_up.elem_count())?;
    with_slice("swiglu", &gate_up.contiguous()?, |gate_up| {
        with_slice("swiglu", &dy.contiguous()?, |dy| {
            let rows = dx.par_chunks_mut(2 * width).zip(gate_up.par_chunks(2 * width)).zip(dy.par_chunks(width));
            rows.for_each(|((dx, gate_up), dy)| {
                let (gate, up) = gate_up.split_at(width);
                let (dgate, dup) = dx.split_at_mut(width);
                for i in 0..width {
                    let open = logistic(gate[i]);
                    // silu'(x) = s (1 + x (1 - s)) with s the logistic function of x
                    dgate[i] += dy[i] * up[i] * (open * (1.0 + gate[i] * (1.0 - open)));
                    dup[i] += dy[i] * (gate[i] * open);
                }
            });
            Ok(())
        })
    })?;
    tensor(dx, gate_up.shape())
}
