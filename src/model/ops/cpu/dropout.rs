//! Dropout whose mask is computed, never stored.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::access::{GRAIN, start_from, tensor, with_slice};
use crate::model::rng::Mask;

/// `mask * x + before`: forward and backward alike.
pub(crate) fn dropout(x: &Tensor, mask: &Mask, before: Option<Tensor>) -> Result<Tensor> {
    let mut y = start_from(before, x.elem_count())?;
    with_slice("dropout", &x.contiguous()?, |x| {
        y.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).enumerate().for_each(|(grain, (y, x))| {
            let mut factors = vec![0f32; x.len()];
            mask.write((grain * GRAIN) as u64, &mut factors);
            y.iter_mut().zip(x).zip(factors).for_each(|((y, x), factor)| *y += factor * x);
        });
        Ok(())
    })?;
    tensor(y, x.shape())
}
