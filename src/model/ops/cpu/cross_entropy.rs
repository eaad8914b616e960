//! Linear head and cross-entropy in one operation that never holds all logits.
//!
//! Tokens are taken in blocks. The gradient of a block's logits is known as soon as they are, so the gradients of input
//! and weight are taken while they are there: nothing has to be computed twice.

#![expect(unsafe_code, reason = "multiplies parts of matrices by address")]

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::access::{panels, tensor, weight_rows, with_slice};
use super::gemm::{Matrix, multiply};
use super::linear::add_product;
use crate::model::ops::cross_entropy::IGNORE_INDEX;
use crate::model::param::Param;

/// Tokens whose logits exist at once.
const BLOCK: usize = 256;

/// The loss and, with a scale for it, the gradient of `x`; then the gradient of `weight` has been added to as well.
pub(crate) fn linear_cross_entropy(
    x: &Tensor,
    weight: &Param,
    targets: &[i64],
    scale: f32,
    gradient_scale: Option<f32>,
) -> Result<(Tensor, Option<Tensor>)> {
    let (vocabulary, width) = (weight.rows(), weight.columns());
    let mut dx = vec![0f32; if gradient_scale.is_some() { x.elem_count() } else { 0 }];
    let mut scratch = vec![0f32; BLOCK.min(targets.len()) * vocabulary];
    let mut loss = 0f64;
    with_slice("linear_cross_entropy", &x.contiguous()?, |x| {
        for (block, targets) in targets.chunks(BLOCK).enumerate() {
            let range = block * BLOCK * width..(block * BLOCK + targets.len()) * width;
            let x = &x[range.clone()];
            let logits = &mut scratch[..targets.len() * vocabulary];
            write_logits(x, weight, logits)?;
            let sums: Vec<f32> = logits.par_chunks(vocabulary).map(log_sum_exp).collect();
            for ((row, &target), &sum) in logits.chunks(vocabulary).zip(targets).zip(&sums) {
                if target != IGNORE_INDEX {
                    loss += f64::from(sum) - f64::from(row[target as usize]);
                }
            }
            if let Some(scale) = gradient_scale {
                differentiate(logits, &sums, targets, scale);
                add_gradients(x, weight, logits, &mut dx[range])?;
            }
        }
        Ok(())
    })?;
    let loss = tensor(vec![(loss * f64::from(scale)) as f32], ())?;
    Ok((loss, gradient_scale.map(|_| tensor(dx, x.shape())).transpose()?))
}

/// Logits of the tokens in `x`, panel by panel of the vocabulary.
fn write_logits(x: &[f32], weight: &Param, out: &mut [f32]) -> Result<()> {
    let (vocabulary, width) = (weight.rows(), weight.columns());
    for panel in panels(weight) {
        let w = weight_rows(weight, panel.tile, panel.row_in_tile, panel.rows)?;
        let shape = (x.len() / width, panel.rows, width);
        let target = out[panel.row..].as_mut_ptr();
        let (x, w) = (Matrix::new(x, width), Matrix::new(&w, width).t());
        // SAFETY: columns [row, row + rows) of the tokens x vocabulary matrix `out`.
        unsafe { multiply(shape, x, w, target, vocabulary, false, 1.0, true) }
    }
    Ok(())
}

/// Replaces logits by their gradients, `(softmax - one-hot) * scale`.
fn differentiate(logits: &mut [f32], sums: &[f32], targets: &[i64], scale: f32) {
    let vocabulary = logits.len() / targets.len();
    logits.par_chunks_mut(vocabulary).zip(targets).zip(sums).for_each(|((row, &target), &sum)| {
        if target == IGNORE_INDEX {
            row.fill(0.0);
            return;
        }
        row.iter_mut().for_each(|logit| *logit = (*logit - sum).exp() * scale);
        row[target as usize] -= scale;
    });
}

fn add_gradients(x: &[f32], weight: &Param, dlogits: &[f32], dx: &mut [f32]) -> Result<()> {
    let (vocabulary, width) = (weight.rows(), weight.columns());
    let tokens = x.len() / width;
    for (index, panel) in panels(weight).into_iter().enumerate() {
        let w = weight_rows(weight, panel.tile, panel.row_in_tile, panel.rows)?;
        let d = Matrix { data: dlogits[panel.row..].as_ptr(), row_stride: vocabulary, column_stride: 1 };
        let shape = (tokens, width, panel.rows);
        // SAFETY: `d` is tokens x rows inside `dlogits`, `dx` exactly tokens x width.
        unsafe { multiply(shape, d, Matrix::new(&w, width), dx.as_mut_ptr(), width, index > 0, 1.0, true) }
        let shape = (panel.rows, width, tokens);
        add_product(weight, panel.tile, panel.row_in_tile * width, shape, d.t(), Matrix::new(x, width))?;
    }
    Ok(())
}

fn log_sum_exp(row: &[f32]) -> f32 {
    let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&x| f64::from((x - highest).exp())).sum();
    (f64::from(highest) + sum.ln()) as f32
}
