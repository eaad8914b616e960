//! GELU (Hendrycks and Gimpel, 2016): the tanh form of GPT-2 and the exact erf form.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::access::{GRAIN, accumulate, column_sums, start_from, tensor, wants_gradient, with_slice};
use crate::model::ops::gelu::Gelu;
use crate::model::param::Param;

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

/// tanh by one exponential: several times faster than the library's, and exact to about one ulp of 1.
fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / ((2.0 * x).exp() + 1.0)
}

impl Gelu {
    fn value(self, x: f32) -> f32 {
        match self {
            Gelu::Tanh => 0.5 * x * (1.0 + tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x))),
            Gelu::Erf => 0.5 * x * (1.0 + erf(x)),
        }
    }

    fn derivative(self, x: f32) -> f32 {
        match self {
            Gelu::Tanh => {
                let t = tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
                0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x)
            }
            Gelu::Erf => {
                let density = (-0.5 * x * x).exp() * 0.398_942_3;
                0.5 * (1.0 + erf(x)) + x * density
            }
        }
    }
}

/// erf(x / sqrt(2))
fn erf(x: f32) -> f32 {
    candle_core::cpu::erf::erf_f64(f64::from(x) * std::f64::consts::FRAC_1_SQRT_2) as f32
}

/// `gelu(x)`.
pub(crate) fn gelu_forward(x: &Tensor, form: Gelu) -> Result<Tensor> {
    let y = with_slice("gelu", &x.contiguous()?, |x| {
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).for_each(|(y, x)| {
            y.iter_mut().zip(x).for_each(|(y, &x)| *y = form.value(x));
        });
        Ok(y)
    })?;
    tensor(y, x.shape())
}

/// `dy gelu'(x) + before`.
pub(crate) fn gelu_backward(dy: &Tensor, x: &Tensor, form: Gelu, before: Option<Tensor>) -> Result<Tensor> {
    let mut dx = start_from(before, x.elem_count())?;
    with_slice("gelu", &x.contiguous()?, |x| {
        with_slice("gelu", &dy.contiguous()?, |dy| {
            dx.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).zip(dy.par_chunks(GRAIN)).for_each(|((dx, x), dy)| {
                dx.iter_mut().zip(x).zip(dy).for_each(|((dx, &x), dy)| *dx += dy * form.derivative(x));
            });
            Ok(())
        })
    })?;
    tensor(dx, x.shape())
}

/// As [`gelu_backward`] without `before`; adds its sum over rows to the gradient of `bias`.
pub(crate) fn gelu_backward_bias(dy: &Tensor, x: &Tensor, form: Gelu, bias: &Param) -> Result<Tensor> {
    let dx = gelu_backward(dy, x, form, None)?;
    if wants_gradient(bias)? {
        let columns = bias.rows();
        with_slice("gelu", &dx, |dx| {
            let sums = column_sums(dx.len() / columns, columns, |row, column| dx[row * columns + column]);
            accumulate(bias, 0, 0, &sums)
        })?;
    }
    Ok(dx)
}
