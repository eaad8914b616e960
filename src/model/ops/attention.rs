//! Self-attention on packed queries, keys and values (Vaswani et al., 2017), with grouped queries (Ainslie et al., 2023),
//! a sliding window (Beltagy et al., 2020) and packed samples; scores are never kept.

use std::ops::Range;
use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::sync::Mutex;

#[cfg(feature = "cuda")]
use candle_core::Tensor;
use candle_core::{Result, bail};

use crate::model::tape::Activation;

/// Heads, and which keys a query sees: those that every mask leaves.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and of values, each shared by `heads / kv_heads` neighbouring heads of queries.
    pub kv_heads: usize,
    /// Query `i` sees keys `j <= i` only.
    pub causal: bool,
    /// Query `i` sees keys `j > i - window` only: the last `window` ones where it is causal too.
    pub window: Option<usize>,
    /// Queries see the keys of their own sample only.
    pub segments: Option<Segments>,
}

/// Which samples were packed into each sequence of a batch, one after another. Cheap to clone; build it once a batch, for
/// a GPU keeps its copy in it.
#[derive(Clone, Debug)]
pub struct Segments {
    inner: Arc<Bounds>,
}

#[derive(Debug)]
struct Bounds {
    batch: usize,
    time: usize,
    /// For each token where its sample begins, then for each token where it ends.
    bounds: Vec<u32>,
    #[cfg(feature = "cuda")]
    on_device: Mutex<Option<Tensor>>,
}

/// `softmax(Q Kᵀ / sqrt(d) + masks) V` for `qkv` (batch, time, (heads + 2 * kv_heads) * d), which holds all queries of a
/// token, then its keys, then its values, into (batch, time, heads * d).
pub fn attention(qkv: &Activation, attention: &Attention) -> Result<Activation> {
    attention.check(qkv.dims())?;
    let (compute, input, into_qkv) = (qkv.compute().clone(), qkv.tensor()?, qkv.slot());
    let (output, log_sum_exp) = on!(&compute, attend(&input, attention))?;
    let (kept, attention) = (output.clone(), attention.clone());
    Ok(qkv.tape().record(output, move |dy, gradients| {
        gradients.add(into_qkv, |before| {
            let gradient = on!(&compute, attend_backward(&dy, &input, &kept, log_sum_exp.as_ref(), &attention))?;
            before.map_or(Ok(gradient.clone()), |before| super::sum(&compute, &before, &gradient))
        })
    }))
}

/// `softmax(Q Kᵀ / sqrt(d) + causal mask) V` for `qkv` (batch, time, 3 * hidden) into (batch, time, hidden).
pub fn causal_attention(qkv: &Activation, heads: usize) -> Result<Activation> {
    attention(qkv, &Attention::causal(heads))
}

impl Attention {
    /// Every query sees itself and what came before; every head has keys and values of its own.
    pub fn causal(heads: usize) -> Self {
        Attention { heads, kv_heads: heads, causal: true, window: None, segments: None }
    }

    /// Heads in a packed row.
    pub(crate) fn packed_heads(&self) -> usize {
        self.heads + 2 * self.kv_heads
    }

    /// The keys that `query` of sequence `batch` sees, of `time`: always a range that holds the query itself.
    pub(crate) fn visible(&self, batch: usize, query: usize, time: usize) -> Range<usize> {
        let segment = self.segments.as_ref().map_or(0..time, |segments| segments.of(batch, query));
        let oldest = self.window.map_or(0, |window| (query + 1).saturating_sub(window));
        let end = if self.causal { query + 1 } else { segment.end };
        segment.start.max(oldest)..end
    }

    fn check(&self, dims: &[usize]) -> Result<()> {
        let &[batch, time, packed] = dims else {
            bail!("attention: {dims:?} is not (batch, time, (heads + 2 * kv_heads) * head)")
        };
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            bail!("attention: {heads} heads of queries cannot share {kv_heads} heads of keys evenly");
        }
        if packed == 0 || !packed.is_multiple_of(self.packed_heads()) {
            bail!(
                "attention: {packed} columns cannot be split into {heads} heads of queries and 2 x {kv_heads} others"
            );
        }
        if batch == 0 || time == 0 {
            bail!("attention: {dims:?} holds no tokens");
        }
        if self.window == Some(0) {
            bail!("attention: in a window of 0 a query does not even see itself");
        }
        if let Some(segments) = &self.segments
            && (segments.inner.batch, segments.inner.time) != (batch, time)
        {
            bail!(
                "attention: segments of {} sequences of {} tokens do not fit {dims:?}",
                segments.inner.batch,
                segments.inner.time
            );
        }
        Ok(())
    }
}

impl Segments {
    /// From the lengths of the samples in each sequence; all sequences must have the same number of tokens.
    pub fn new(lengths: &[impl AsRef<[usize]>]) -> Result<Self> {
        let tokens = |row: &[usize]| row.iter().sum::<usize>();
        let time = lengths.first().map_or(0, |row| tokens(row.as_ref()));
        let (mut starts, mut ends) = (Vec::new(), Vec::new());
        for (index, row) in lengths.iter().map(AsRef::as_ref).enumerate() {
            if row.contains(&0) {
                bail!("segments: sequence {index} has a sample of length 0: {row:?}");
            }
            if tokens(row) != time {
                bail!(
                    "segments: the samples of sequence {index} have {} tokens, those of the first {time}",
                    tokens(row)
                );
            }
            let mut start = 0;
            for &length in row {
                let end = start + length;
                starts.extend(std::iter::repeat_n(start as u32, length));
                ends.extend(std::iter::repeat_n(end as u32, length));
                start = end;
            }
        }
        starts.append(&mut ends);
        let inner = Bounds {
            batch: lengths.len(),
            time,
            bounds: starts,
            #[cfg(feature = "cuda")]
            on_device: Mutex::new(None),
        };
        Ok(Segments { inner: Arc::new(inner) })
    }

    /// The sample of a token.
    fn of(&self, batch: usize, token: usize) -> Range<usize> {
        let Bounds { batch: sequences, time, bounds, .. } = &*self.inner;
        let at = batch * time + token;
        bounds[at] as usize..bounds[sequences * time + at] as usize
    }

    /// For each token where its sample begins, then for each token where it ends.
    #[cfg(feature = "cuda")]
    pub(crate) fn bounds(&self) -> &[u32] {
        &self.inner.bounds
    }

    /// A copy of the bounds in device memory, once there is one.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(&self) -> &Mutex<Option<Tensor>> {
        &self.inner.on_device
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mask_cuts_the_range_of_keys() {
        let mut attention = Attention::causal(1);
        assert_eq!(attention.visible(0, 5, 8), 0..6);
        attention.window = Some(3);
        assert_eq!(attention.visible(0, 5, 8), 3..6);
        assert_eq!(attention.visible(0, 1, 8), 0..2);
        attention.segments = Some(Segments::new(&[vec![8], vec![4, 4]]).unwrap());
        assert_eq!(attention.visible(1, 5, 8), 4..6);
        assert_eq!(attention.visible(0, 5, 8), 3..6);
        attention.causal = false;
        assert_eq!(attention.visible(1, 5, 8), 4..8);
        assert_eq!(attention.visible(1, 7, 8), 5..8);
    }

    #[test]
    fn samples_must_fill_every_sequence() {
        assert!(Segments::new(&[[3, 5], [4, 4]]).is_ok());
        let uneven = Segments::new(&[vec![3, 5], vec![4]]).unwrap_err().to_string();
        assert!(uneven.contains("sequence 1 have 4 tokens, those of the first 8"), "{uneven}");
        assert!(Segments::new(&[[3, 0]]).is_err());
    }
}
