//! Sums of activations.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::access::{GRAIN, start_from, tensor, with_slice};

/// `a + b`.
pub(crate) fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let mut out = start_from(Some(a.clone()), a.elem_count())?;
    with_slice("add", &b.contiguous()?, |b| {
        out.par_chunks_mut(GRAIN).zip(b.par_chunks(GRAIN)).for_each(|(out, b)| {
            out.iter_mut().zip(b).for_each(|(out, b)| *out += b);
        });
        Ok(())
    })?;
    tensor(out, a.shape())
}
