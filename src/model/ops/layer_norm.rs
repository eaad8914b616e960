//! Layer normalisation over the last dimension (Ba et al., 2016).

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::access::{accumulate, column_sums, slice, tensor_like, wants_gradient, weight_rows, with_slice};
use crate::model::param::Param;

struct LayerNorm {
    weight: Param,
    bias: Param,
    eps: f32,
}

/// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension.
pub fn layer_norm(x: &Tensor, weight: &Param, bias: &Param, eps: f64) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(0);
    for param in [weight, bias] {
        if param.shape() != [width] {
            bail!(
                "layer_norm: `{}` has shape {:?}, the input's last dimension is {width}",
                param.name(),
                param.shape()
            );
        }
    }
    x.contiguous()?.apply_op1(LayerNorm { weight: weight.clone(), bias: bias.clone(), eps: eps as f32 })
}

/// Mean and reciprocal standard deviation of a row, summed in f64.
fn moments(row: &[f32], eps: f32) -> (f32, f32) {
    let n = row.len() as f64;
    let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
    (mean as f32, (1.0 / (variance + f64::from(eps)).sqrt()) as f32)
}

impl CustomOp1 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice("layer_norm", storage, layout)?;
        let width = self.weight.rows();
        let weight = weight_rows(&self.weight, 0, 0, width)?;
        let bias = weight_rows(&self.bias, 0, 0, width)?;
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(width).zip(x.par_chunks(width)).for_each(|(y, x)| {
            let (mean, rstd) = moments(x, self.eps);
            for i in 0..width {
                y[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
            }
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let dx = with_slice("layer_norm", x, |x| with_slice("layer_norm", &dy, |dy| self.backward(x, dy)))?;
        tensor_like(dx, x).map(Some)
    }
}

impl LayerNorm {
    fn backward(&self, x: &[f32], dy: &[f32]) -> Result<Vec<f32>> {
        let width = self.weight.rows();
        let rows = x.len() / width;
        let weight = weight_rows(&self.weight, 0, 0, width)?;
        let rows_moments: Vec<(f32, f32)> = x.par_chunks(width).map(|row| moments(row, self.eps)).collect();
        let mut dx = vec![0f32; x.len()];
        dx.par_chunks_mut(width).enumerate().for_each(|(row, dx)| {
            let (x, dy) = (&x[row * width..][..width], &dy[row * width..][..width]);
            let (mean, rstd) = rows_moments[row];
            // dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * weight
            let (mut sum, mut dot) = (0f64, 0f64);
            for i in 0..width {
                let g = f64::from(dy[i] * weight[i]);
                sum += g;
                dot += g * f64::from((x[i] - mean) * rstd);
            }
            let (sum, dot) = ((sum / width as f64) as f32, (dot / width as f64) as f32);
            for i in 0..width {
                dx[i] = rstd * (dy[i] * weight[i] - sum - (x[i] - mean) * rstd * dot);
            }
        });
        if wants_gradient(&self.weight)? {
            let dweight = column_sums(rows, width, |row, column| {
                let (mean, rstd) = rows_moments[row];
                dy[row * width + column] * (x[row * width + column] - mean) * rstd
            });
            accumulate(&self.weight, 0, 0, &dweight)?;
            accumulate(&self.bias, 0, 0, &column_sums(rows, width, |row, column| dy[row * width + column]))?;
        }
        Ok(dx)
    }
}
