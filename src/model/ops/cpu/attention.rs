//! Self-attention on packed queries, keys and values. Probabilities exist for one head at a time and are computed again in
//! the backward.

#![expect(unsafe_code, reason = "lets heads write columns of one output")]

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::access::{tensor, with_slice};
use super::gemm::{Matrix, multiply};
use crate::model::ops::Attention;

/// Sizes and masks of one call.
#[derive(Clone, Copy)]
struct Call<'a> {
    attention: &'a Attention,
    batch: usize,
    time: usize,
    /// Elements of a head.
    width: usize,
}

/// Parts of a packed row.
#[derive(Clone, Copy)]
enum Part {
    Query,
    Key,
    Value,
}

impl<'a> Call<'a> {
    fn of(qkv: &Tensor, attention: &'a Attention) -> Result<Self> {
        let (batch, time, packed) = qkv.dims3()?;
        Ok(Call { attention, batch, time, width: packed / attention.packed_heads() })
    }

    fn scale(self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    fn heads(self) -> usize {
        self.attention.heads
    }

    /// Heads of queries that share a head of keys.
    fn group(self) -> usize {
        self.heads() / self.attention.kv_heads
    }

    /// Columns of the result.
    fn hidden(self) -> usize {
        self.heads() * self.width
    }

    /// Columns of a packed row.
    fn packed(self) -> usize {
        self.attention.packed_heads() * self.width
    }

    /// Every (batch, head of queries).
    fn tasks(self) -> impl IndexedParallelIterator<Item = (usize, usize)> {
        let heads = self.heads();
        (0..self.batch * heads).into_par_iter().map(move |task| (task / heads, task % heads))
    }

    /// Where in a packed buffer the part of a head of queries begins.
    fn offset(self, batch: usize, head: usize, part: Part) -> usize {
        let shared = head / self.group();
        let column = match part {
            Part::Query => head,
            Part::Key => self.heads() + shared,
            Part::Value => self.heads() + self.attention.kv_heads + shared,
        };
        batch * self.time * self.packed() + column * self.width
    }

    /// A part for one head of queries: time x width.
    fn part(self, qkv: &[f32], batch: usize, head: usize, part: Part) -> Matrix {
        let offset = self.offset(batch, head, part);
        Matrix { data: qkv[offset..].as_ptr(), row_stride: self.packed(), column_stride: 1 }
    }

    /// Columns of one head in a (batch, time, hidden) tensor.
    fn columns(self, x: &[f32], batch: usize, head: usize) -> Matrix {
        let offset = batch * self.time * self.hidden() + head * self.width;
        Matrix { data: x[offset..].as_ptr(), row_stride: self.hidden(), column_stride: 1 }
    }

    /// Row-wise softmax of the scores that masks leave, time x time.
    fn probabilities(self, qkv: &[f32], batch: usize, head: usize) -> Vec<f32> {
        let time = self.time;
        let mut scores = vec![0f32; time * time];
        let (q, k) = (self.part(qkv, batch, head, Part::Query), self.part(qkv, batch, head, Part::Key));
        // SAFETY: q and k are time x width inside `qkv`; `scores` is time x time.
        unsafe {
            let shape = (time, time, self.width);
            multiply(shape, q, k.t(), scores.as_mut_ptr(), time, false, self.scale(), false);
        }
        for (row, scores) in scores.chunks_exact_mut(time).enumerate() {
            let visible = self.attention.visible(batch, row, time);
            scores[..visible.start].fill(0.0);
            scores[visible.end..].fill(0.0);
            let seen = &mut scores[visible];
            let highest = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0f32;
            for score in seen.iter_mut() {
                *score = (*score - highest).exp();
                sum += *score;
            }
            let inverse = 1.0 / sum;
            seen.iter_mut().for_each(|score| *score *= inverse);
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
pub(crate) fn attend(qkv: &Tensor, attention: &Attention) -> Result<(Tensor, Option<Tensor>)> {
    let call = Call::of(qkv, attention)?;
    let (time, width, hidden) = (call.time, call.width, call.hidden());
    let mut out = vec![0f32; call.batch * time * hidden];
    let target = Columns(out.as_mut_ptr());
    with_slice("attention", &qkv.contiguous()?, |qkv| {
        call.tasks().for_each(|(b, h)| {
            let p = call.probabilities(qkv, b, h);
            let offset = b * time * hidden + h * width;
            // SAFETY: writes the time x width columns of (b, h) in `out`, which no other task touches.
            unsafe {
                let v = call.part(qkv, b, h, Part::Value);
                let shape = (time, width, time);
                multiply(shape, Matrix::new(&p, time), v, target.at(offset), hidden, false, 1.0, false);
            }
        });
        Ok(())
    })?;
    Ok((tensor(out, (call.batch, time, hidden))?, None))
}

/// The gradient of the packed queries, keys and values.
pub(crate) fn attend_backward(
    dy: &Tensor,
    qkv: &Tensor,
    _out: &Tensor,
    _log_sum_exp: Option<&Tensor>,
    attention: &Attention,
) -> Result<Tensor> {
    let call = Call::of(qkv, attention)?;
    let mut dqkv = vec![0f32; qkv.elem_count()];
    // Heads that share keys and values leave their gradients here first: for each head time x width of keys, then of
    // values. So heads still run at the same time, and their sum has one order.
    let head_elements = call.time * call.width;
    let shared = call.group() > 1;
    let mut apart = vec![0f32; if shared { call.batch * call.heads() * 2 * head_elements } else { 0 }];
    let (packed, scratch) = (Columns(dqkv.as_mut_ptr()), Columns(apart.as_mut_ptr()));
    with_slice("attention", &qkv.contiguous()?, |qkv| {
        with_slice("attention", &dy.contiguous()?, |dy| {
            call.tasks().for_each(|(b, h)| {
                let inside = |part| Target { at: packed.at(call.offset(b, h, part)), row_stride: call.packed() };
                let outside = |which: usize| {
                    let at = scratch.at(((b * call.heads() + h) * 2 + which) * head_elements);
                    Target { at, row_stride: call.width }
                };
                let (dk, dv) = if shared { (outside(0), outside(1)) } else { (inside(Part::Key), inside(Part::Value)) };
                // SAFETY: in `dqkv` these are the time x width columns of this head, where keys and values are its own;
                // in the scratch its own place. No other task writes them.
                unsafe { backward(call, qkv, dy, (b, h), [inside(Part::Query), dk, dv]) }
            });
            Ok(())
        })
    })?;
    if shared {
        add_shared(call, &apart, &mut dqkv);
    }
    tensor(dqkv, qkv.shape())
}

/// A time x width matrix to write.
#[derive(Clone, Copy)]
struct Target {
    at: *mut f32,
    row_stride: usize,
}

/// dV = Pᵀ dO; dS = P ∘ (dO Vᵀ - rowsum(P ∘ dO Vᵀ)); dQ = dS K / sqrt(d); dK = dSᵀ Q / sqrt(d).
///
/// # Safety
/// The targets must be valid for writes and apart from each other, from `qkv` and from `dy`, and nobody else's meanwhile.
unsafe fn backward(call: Call<'_>, qkv: &[f32], dy: &[f32], (batch, head): (usize, usize), [dq, dk, dv]: [Target; 3]) {
    let (time, width) = (call.time, call.width);
    let p = call.probabilities(qkv, batch, head);
    let dout = call.columns(dy, batch, head);
    let [q, k, v] = [Part::Query, Part::Key, Part::Value].map(|part| call.part(qkv, batch, head, part));
    let mut ds = vec![0f32; time * time];
    // SAFETY: `dout` and `v` are time x width inside `dy` and `qkv`; `ds` is time x time.
    unsafe { multiply((time, time, width), dout, v.t(), ds.as_mut_ptr(), time, false, 1.0, false) }
    for (row, (ds, p)) in ds.chunks_exact_mut(time).zip(p.chunks_exact(time)).enumerate() {
        let visible = call.attention.visible(batch, row, time);
        let dot: f32 = ds[visible.clone()].iter().zip(&p[visible]).map(|(ds, p)| ds * p).sum();
        ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = p * (*ds - dot));
    }
    let (ds, p) = (Matrix::new(&ds, time), Matrix::new(&p, time));
    let shape = (time, width, time);
    // SAFETY: by this function's contract.
    unsafe {
        multiply(shape, ds, k, dq.at, dq.row_stride, false, call.scale(), false);
        multiply(shape, ds.t(), q, dk.at, dk.row_stride, false, call.scale(), false);
        multiply(shape, p.t(), dout, dv.at, dv.row_stride, false, 1.0, false);
    }
}

/// Sums the gradients of keys and values over the heads that share them, in order of the heads.
fn add_shared(call: Call<'_>, apart: &[f32], dqkv: &mut [f32]) {
    let (time, width, group, kv_heads) = (call.time, call.width, call.group(), call.attention.kv_heads);
    dqkv.par_chunks_mut(call.packed()).enumerate().for_each(|(token, row)| {
        let (b, t) = (token / time, token % time);
        let keys_and_values = row[call.hidden()..].chunks_exact_mut(width).enumerate();
        for (index, sum) in keys_and_values {
            let (which, shared) = (index / kv_heads, index % kv_heads);
            for h in shared * group..(shared + 1) * group {
                let from = (((b * call.heads() + h) * 2 + which) * time + t) * width;
                sum.iter_mut().zip(&apart[from..][..width]).for_each(|(sum, value)| *sum += value);
            }
        }
    });
}
