//! Causal self-attention on packed queries, keys and values. Probabilities exist for one head at a time and are computed
//! again in the backward.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::access::{tensor, with_slice};
use super::gemm::{Matrix, multiply};

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    time: usize,
    hidden: usize,
    heads: usize,
}

impl Sizes {
    fn head(self) -> usize {
        self.hidden / self.heads
    }

    fn scale(self) -> f32 {
        1.0 / (self.head() as f32).sqrt()
    }

    /// Query, key (1) or value (2) of one head: time x head, rows 3 * hidden apart.
    fn part(self, qkv: &[f32], batch: usize, head: usize, which: usize) -> Matrix {
        let offset = batch * self.time * 3 * self.hidden + which * self.hidden + head * self.head();
        Matrix { data: qkv[offset..].as_ptr(), row_stride: 3 * self.hidden, column_stride: 1 }
    }

    /// Columns of one head in a (batch, time, hidden) tensor.
    fn columns(self, x: &[f32], batch: usize, head: usize) -> Matrix {
        let offset = batch * self.time * self.hidden + head * self.head();
        Matrix { data: x[offset..].as_ptr(), row_stride: self.hidden, column_stride: 1 }
    }

    /// Row-wise softmax of the causal scores, time x time.
    fn probabilities(self, qkv: &[f32], batch: usize, head: usize) -> Vec<f32> {
        let time = self.time;
        let mut scores = vec![0f32; time * time];
        let (q, k) = (self.part(qkv, batch, head, 0), self.part(qkv, batch, head, 1));
        // SAFETY: q and k are time x head inside `qkv`; `scores` is time x time.
        unsafe {
            let shape = (time, time, self.head());
            multiply(shape, q, k.t(), scores.as_mut_ptr(), time, false, self.scale(), false);
        }
        for (row, scores) in scores.chunks_exact_mut(time).enumerate() {
            let (seen, future) = scores.split_at_mut(row + 1);
            let highest = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0f32;
            for score in seen.iter_mut() {
                *score = (*score - highest).exp();
                sum += *score;
            }
            let inverse = 1.0 / sum;
            seen.iter_mut().for_each(|score| *score *= inverse);
            future.fill(0.0);
        }
        scores
    }
}

/// An output that several heads write, each its own columns.
struct Columns(*mut f32);

// SAFETY: every task writes the columns of its own (batch, head) only.
unsafe impl Sync for Columns {}

impl Columns {
    /// A method, so that closures capture the wrapper and not the pointer in it.
    fn at(&self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// Attention of each (batch, head); the log-sum-exp of scores is recomputed in the backward.
pub(crate) fn attention_forward(qkv: &Tensor, heads: usize) -> Result<(Tensor, Option<Tensor>)> {
    let (batch, time, packed) = qkv.dims3()?;
    let sizes = Sizes { batch, time, hidden: packed / 3, heads };
    let mut out = vec![0f32; batch * time * sizes.hidden];
    let target = Columns(out.as_mut_ptr());
    with_slice("causal_attention", &qkv.contiguous()?, |qkv| {
        (0..batch * heads).into_par_iter().for_each(|task| {
            let (b, h) = (task / heads, task % heads);
            let p = sizes.probabilities(qkv, b, h);
            let offset = b * time * sizes.hidden + h * sizes.head();
            // SAFETY: writes the time x head columns of (b, h) in `out`, which no other task touches.
            unsafe {
                let shape = (time, sizes.head(), time);
                let v = sizes.part(qkv, b, h, 2);
                multiply(shape, Matrix::new(&p, time), v, target.at(offset), sizes.hidden, false, 1.0, false);
            }
        });
        Ok(())
    })?;
    Ok((tensor(out, (batch, time, sizes.hidden))?, None))
}

/// The gradient of the packed queries, keys and values.
pub(crate) fn attention_backward(
    dy: &Tensor,
    qkv: &Tensor,
    _out: &Tensor,
    _log_sum_exp: Option<&Tensor>,
    heads: usize,
) -> Result<Tensor> {
    let (batch, time, packed) = qkv.dims3()?;
    let sizes = Sizes { batch, time, hidden: packed / 3, heads };
    let mut dqkv = vec![0f32; qkv.elem_count()];
    let target = Columns(dqkv.as_mut_ptr());
    with_slice("causal_attention", &qkv.contiguous()?, |qkv| {
        with_slice("causal_attention", &dy.contiguous()?, |dy| {
            (0..sizes.batch * heads)
                .into_par_iter()
                .for_each(|task| backward(sizes, qkv, dy, task / heads, task % heads, &target));
            Ok(())
        })
    })?;
    tensor(dqkv, qkv.shape())
}

/// dV = Pᵀ dO; dS = P ∘ (dO Vᵀ - rowsum(P ∘ dO Vᵀ)); dQ = dS K / sqrt(d); dK = dSᵀ Q / sqrt(d).
fn backward(sizes: Sizes, qkv: &[f32], dy: &[f32], batch: usize, head: usize, target: &Columns) {
    let (time, width, stride) = (sizes.time, sizes.head(), 3 * sizes.hidden);
    let p = sizes.probabilities(qkv, batch, head);
    let dout = sizes.columns(dy, batch, head);
    let [q, k, v] = [0, 1, 2].map(|which| sizes.part(qkv, batch, head, which));
    let mut ds = vec![0f32; time * time];
    // SAFETY: `dout` and `v` are time x width inside `dy` and `qkv`; `ds` is time x time.
    unsafe { multiply((time, time, width), dout, v.t(), ds.as_mut_ptr(), time, false, 1.0, false) }
    for (row, (ds, p)) in ds.chunks_exact_mut(time).zip(p.chunks_exact(time)).enumerate() {
        let dot: f32 = ds[..=row].iter().zip(p).map(|(ds, p)| ds * p).sum();
        ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = p * (*ds - dot));
    }
    let base = batch * time * stride + head * width;
    let part = |which: usize| target.at(base + which * sizes.hidden);
    let (ds, p) = (Matrix::new(&ds, time), Matrix::new(&p, time));
    let shape = (time, width, time);
    // SAFETY: each product writes the time x width columns of (batch, head) and of its own part in `dqkv`.
    unsafe {
        multiply(shape, ds, k, part(0), stride, false, sizes.scale(), false);
        multiply(shape, ds.t(), q, part(1), stride, false, sizes.scale(), false);
        multiply(shape, p.t(), dout, part(2), stride, false, 1.0, false);
    }
}
