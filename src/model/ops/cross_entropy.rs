//! Linear head and cross-entropy in one operation that never holds all logits.
//!
//! Tokens are taken in blocks; of each block's logits only the log-sum-exp survives the forward, and the backward
//! computes them again.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::access::{panels, slice, tensor_like, weight_rows, with_slice};
use super::gemm::{Matrix, multiply};
use super::linear::add_product;
use crate::model::block::Context;
use crate::model::param::Param;

/// Tokens whose logits exist at once.
const BLOCK: usize = 256;
/// Targets with this value do not count, as in PyTorch.
pub const IGNORE_INDEX: i64 = -100;

struct LinearCrossEntropy {
    weight: Param,
    targets: Vec<i64>,
    /// One over the number of targets that count in the whole batch.
    scale: f32,
    log_sum_exp: Arc<OnceLock<Vec<f32>>>,
}

/// Sum over the counted targets of `-log softmax(x Wᵀ)[target]`, divided by `ctx.target_count`. `x` is (.., hidden),
/// `weight` (vocabulary, hidden), `targets` (..) of u32 or i64, where -100 does not count.
pub fn linear_cross_entropy(x: &Tensor, weight: &Param, targets: &Tensor, ctx: &Context) -> Result<Tensor> {
    let targets = targets.flatten_all()?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let width = x.dims().last().copied().unwrap_or(0);
    if width != weight.columns() || x.elem_count() != targets.len() * width {
        bail!(
            "linear_cross_entropy: input {:?} and {} targets do not fit `{}` of shape {:?}",
            x.dims(),
            targets.len(),
            weight.name(),
            weight.shape()
        );
    }
    if let Some(target) = targets.iter().find(|&&t| t != IGNORE_INDEX && !(0..weight.rows() as i64).contains(&t)) {
        bail!("linear_cross_entropy: target {target} is outside of {} classes: check the tokenizer", weight.rows());
    }
    let scale = 1.0 / ctx.target_count.max(1) as f32;
    let op = LinearCrossEntropy { weight: weight.clone(), targets, scale, log_sum_exp: Arc::default() };
    x.contiguous()?.apply_op1(op)
}

impl LinearCrossEntropy {
    /// Logits of the tokens in `x`, panel by panel of the vocabulary.
    fn logits(&self, x: &[f32], out: &mut [f32]) -> Result<()> {
        let (vocabulary, width) = (self.weight.rows(), self.weight.columns());
        for panel in panels(&self.weight) {
            let w = weight_rows(&self.weight, panel.tile, panel.row_in_tile, panel.rows)?;
            let shape = (x.len() / width, panel.rows, width);
            let target = out[panel.row..].as_mut_ptr();
            // SAFETY: columns [row, row + rows) of the tokens x vocabulary matrix `out`.
            unsafe {
                multiply(
                    shape,
                    Matrix::new(x, width),
                    Matrix::new(&w, width).t(),
                    target,
                    vocabulary,
                    false,
                    1.0,
                    true,
                );
            }
        }
        Ok(())
    }

    fn loss(&self, x: &[f32]) -> Result<f64> {
        let (vocabulary, width) = (self.weight.rows(), self.weight.columns());
        let mut sums = Vec::with_capacity(self.targets.len());
        let mut scratch = vec![0f32; BLOCK.min(self.targets.len()) * vocabulary];
        let mut loss = 0f64;
        for (x, targets) in x.chunks(BLOCK * width).zip(self.targets.chunks(BLOCK)) {
            let logits = &mut scratch[..targets.len() * vocabulary];
            self.logits(x, logits)?;
            let block: Vec<f32> = logits.par_chunks(vocabulary).map(log_sum_exp).collect();
            for ((row, &target), &sum) in logits.chunks(vocabulary).zip(targets).zip(&block) {
                if target != IGNORE_INDEX {
                    loss += f64::from(sum) - f64::from(row[target as usize]);
                }
            }
            sums.extend(block);
        }
        // Filled once: the op belongs to one forward.
        let _ = self.log_sum_exp.set(sums);
        Ok(loss * f64::from(self.scale))
    }

    fn backward(&self, x: &[f32], upstream: f32) -> Result<Vec<f32>> {
        let (vocabulary, width) = (self.weight.rows(), self.weight.columns());
        let Some(sums) = self.log_sum_exp.get() else { bail!("linear_cross_entropy: backward before forward") };
        let mut dx = vec![0f32; x.len()];
        let mut scratch = vec![0f32; BLOCK.min(self.targets.len()) * vocabulary];
        for (block, targets) in self.targets.chunks(BLOCK).enumerate() {
            let first = block * BLOCK;
            let tokens = targets.len();
            let x = &x[first * width..][..tokens * width];
            let logits = &mut scratch[..tokens * vocabulary];
            self.logits(x, logits)?;
            let factor = upstream * self.scale;
            logits.par_chunks_mut(vocabulary).zip(targets).zip(&sums[first..]).for_each(|((row, &target), &sum)| {
                if target == IGNORE_INDEX {
                    row.fill(0.0);
                    return;
                }
                row.iter_mut().for_each(|logit| *logit = (*logit - sum).exp() * factor);
                row[target as usize] -= factor;
            });
            let dx = &mut dx[first * width..][..tokens * width];
            for (index, panel) in panels(&self.weight).into_iter().enumerate() {
                let w = weight_rows(&self.weight, panel.tile, panel.row_in_tile, panel.rows)?;
                let d = Matrix { data: logits[panel.row..].as_ptr(), row_stride: vocabulary, column_stride: 1 };
                let shape = (tokens, width, panel.rows);
                // SAFETY: `d` is tokens x rows inside `logits`, `dx` exactly tokens x width.
                unsafe { multiply(shape, d, Matrix::new(&w, width), dx.as_mut_ptr(), width, index > 0, 1.0, true) }
                let shape = (panel.rows, width, tokens);
                add_product(&self.weight, panel.tile, panel.row_in_tile * width, shape, d.t(), Matrix::new(x, width))?;
            }
        }
        Ok(dx)
    }
}

fn log_sum_exp(row: &[f32]) -> f32 {
    let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&x| f64::from((x - highest).exp())).sum();
    (f64::from(highest) + sum.ln()) as f32
}

impl CustomOp1 for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let loss = self.loss(slice("linear_cross_entropy", storage, layout)?)?;
        Ok((CpuStorage::F32(vec![loss as f32]), Shape::from(())))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let upstream = dy.to_scalar::<f32>()?;
        let dx = with_slice("linear_cross_entropy", x, |x| self.backward(x, upstream))?;
        tensor_like(dx, x).map(Some)
    }
}
