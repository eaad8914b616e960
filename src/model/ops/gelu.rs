//! GELU (Hendrycks and Gimpel, 2016): the tanh form of GPT-2 and the exact erf form.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::access::{GRAIN, slice, tensor_like, with_slice};

#[derive(Clone, Copy)]
enum Form {
    Tanh,
    Erf,
}

struct Gelu(Form);

/// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x³)))`, which Hugging Face calls `gelu_new`.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Gelu(Form::Tanh))
}

/// `x/2 (1 + erf(x / sqrt(2)))`.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Gelu(Form::Erf))
}

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

/// tanh by one exponential: several times faster than the library's, and exact to about one ulp of 1.
fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / ((2.0 * x).exp() + 1.0)
}

impl Form {
    fn value(self, x: f32) -> f32 {
        match self {
            Form::Tanh => 0.5 * x * (1.0 + tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x))),
            Form::Erf => 0.5 * x * (1.0 + erf(x)),
        }
    }

    fn derivative(self, x: f32) -> f32 {
        match self {
            Form::Tanh => {
                let t = tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
                0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x)
            }
            Form::Erf => {
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

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice("gelu", storage, layout)?;
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).for_each(|(y, x)| {
            y.iter_mut().zip(x).for_each(|(y, &x)| *y = self.0.value(x));
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let dx = with_slice("gelu", x, |x| {
            with_slice("gelu", &dy, |dy| {
                let mut dx = vec![0f32; x.len()];
                dx.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).zip(dy.par_chunks(GRAIN)).for_each(
                    |((dx, x), dy)| {
                        dx.iter_mut().zip(x).zip(dy).for_each(|((dx, &x), dy)| *dx = dy * self.0.derivative(x));
                    },
                );
                Ok(dx)
            })
        })?;
        tensor_like(dx, x).map(Some)
    }
}
