//! Layer normalisation over the last dimension (Ba et al., 2016).

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::access::{accumulate, column_sums, start_from, tensor, wants_gradient, weight_rows, with_slice};
use crate::model::param::Param;

/// Mean and reciprocal standard deviation of a row, summed in f64.
fn moments(row: &[f32], eps: f32) -> (f32, f32) {
    let n = row.len() as f64;
    let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
    (mean as f32, (1.0 / (variance + f64::from(eps)).sqrt()) as f32)
}

/// `(x - mean) / sqrt(variance + eps) * weight + bias`, and mean and reciprocal standard deviation of each row.
pub(crate) fn layer_norm_forward(x: &Tensor, weight: &Param, bias: &Param, eps: f32) -> Result<(Tensor, Tensor)> {
    let width = weight.rows();
    let (weight, bias) = (weight_rows(weight, 0, 0, width)?, weight_rows(bias, 0, 0, width)?);
    let mut y = vec![0f32; x.elem_count()];
    let mut stats = vec![0f32; 2 * x.elem_count() / width];
    with_slice("layer_norm", &x.contiguous()?, |x| {
        let rows = y.par_chunks_mut(width).zip(x.par_chunks(width)).zip(stats.par_chunks_mut(2));
        rows.for_each(|((y, x), stats)| {
            let (mean, rstd) = moments(x, eps);
            for i in 0..width {
                y[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
            }
            stats.copy_from_slice(&[mean, rstd]);
        });
        Ok(())
    })?;
    let rows = stats.len() / 2;
    Ok((tensor(y, x.shape())?, tensor(stats, (rows, 2))?))
}

/// The gradient of `x` plus `before`; adds to those of `weight` and `bias`.
pub(crate) fn layer_norm_backward(
    dy: &Tensor,
    x: &Tensor,
    stats: &Tensor,
    weight: &Param,
    bias: &Param,
    before: Option<Tensor>,
) -> Result<Tensor> {
    let mut dx = start_from(before, x.elem_count())?;
    with_slice("layer_norm", &x.contiguous()?, |x| {
        with_slice("layer_norm", &dy.contiguous()?, |dy| {
            with_slice("layer_norm", stats, |stats| backward(dy, x, stats, weight, bias, &mut dx))
        })
    })?;
    tensor(dx, x.shape())
}

fn backward(dy: &[f32], x: &[f32], stats: &[f32], weight: &Param, bias: &Param, dx: &mut [f32]) -> Result<()> {
    let width = weight.rows();
    let w = weight_rows(weight, 0, 0, width)?;
    dx.par_chunks_mut(width).enumerate().for_each(|(row, dx)| {
        let (x, dy) = (&x[row * width..][..width], &dy[row * width..][..width]);
        let (mean, rstd) = (stats[2 * row], stats[2 * row + 1]);
        // dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * weight
        let (mut sum, mut dot) = (0f64, 0f64);
        for i in 0..width {
            let g = f64::from(dy[i] * w[i]);
            sum += g;
            dot += g * f64::from((x[i] - mean) * rstd);
        }
        let (sum, dot) = ((sum / width as f64) as f32, (dot / width as f64) as f32);
        for i in 0..width {
            dx[i] += rstd * (dy[i] * w[i] - sum - (x[i] - mean) * rstd * dot);
        }
    });
    if wants_gradient(weight)? {
        let rows = x.len() / width;
        let dweight = column_sums(rows, width, |row, column| {
            let (mean, rstd) = (stats[2 * row], stats[2 * row + 1]);
            dy[row * width + column] * (x[row * width + column] - mean) * rstd
        });
        accumulate(weight, 0, 0, &dweight)?;
        accumulate(bias, 0, 0, &column_sums(rows, width, |row, column| dy[row * width + column]))?;
    }
    Ok(())
}
