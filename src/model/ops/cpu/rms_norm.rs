//! RMS normalisation over the last dimension (Zhang and Sennrich, 2019).

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::access::{accumulate, column_sums, start_from, tensor, wants_gradient, weight_rows, with_slice};
use crate::model::param::Param;

/// `x / sqrt(mean(x²) + eps) * weight`, and the reciprocal root of each row, whose squares are summed in f64.
pub(crate) fn rms_norm_forward(x: &Tensor, weight: &Param, eps: f32) -> Result<(Tensor, Tensor)> {
    let width = weight.rows();
    let weight = weight_rows(weight, 0, 0, width)?;
    let mut y = vec![0f32; x.elem_count()];
    let mut stats = vec![0f32; x.elem_count() / width];
    with_slice("rms_norm", &x.contiguous()?, |x| {
        let rows = y.par_chunks_mut(width).zip(x.par_chunks(width)).zip(stats.par_iter_mut());
        rows.for_each(|((y, x), stat)| {
            let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / width as f64;
            let rrms = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
            for i in 0..width {
                y[i] = x[i] * rrms * weight[i];
            }
            *stat = rrms;
        });
        Ok(())
    })?;
    let rows = stats.len();
    Ok((tensor(y, x.shape())?, tensor(stats, rows)?))
}

/// The gradient of `x` plus `before`; adds to that of `weight`.
pub(crate) fn rms_norm_backward(
    dy: &Tensor,
    x: &Tensor,
    stats: &Tensor,
    weight: &Param,
    before: Option<Tensor>,
) -> Result<Tensor> {
    let mut dx = start_from(before, x.elem_count())?;
    with_slice("rms_norm", &x.contiguous()?, |x| {
        with_slice("rms_norm", &dy.contiguous()?, |dy| {
            with_slice("rms_norm", stats, |stats| backward(dy, x, stats, weight, &mut dx))
        })
    })?;
    tensor(dx, x.shape())
}

fn backward(dy: &[f32], x: &[f32], stats: &[f32], weight: &Param, dx: &mut [f32]) -> Result<()> {
    let width = weight.rows();
    let w = weight_rows(weight, 0, 0, width)?;
    dx.par_chunks_mut(width).enumerate().for_each(|(row, dx)| {
        let (x, dy, rrms) = (&x[row * width..][..width], &dy[row * width..][..width], stats[row]);
        // dx = rrms * (g - xhat * mean(g * xhat)) with g = dy * weight
        let dot: f64 = (0..width).map(|i| f64::from(dy[i] * w[i]) * f64::from(x[i] * rrms)).sum();
        let dot = (dot / width as f64) as f32;
        for i in 0..width {
            dx[i] += rrms * (dy[i] * w[i] - x[i] * rrms * dot);
        }
    });
    if wants_gradient(weight)? {
        let dweight = column_sums(x.len() / width, width, |row, column| {
            dy[row * width + column] * x[row * width + column] * stats[row]
        });
        accumulate(weight, 0, 0, &dweight)?;
    }
    Ok(())
}
