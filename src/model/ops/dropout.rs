//! Dropout whose mask is computed, never stored.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::access::{GRAIN, slice, tensor_like, with_slice};
use crate::model::block::Context;
use crate::model::rng::Mask;

struct Dropout {
    mask: Mask,
    scale: f32,
}

/// Zeroes elements with probability `p` and scales the others by `1 / (1 - p)`; the identity outside of training. `op`
/// tells the dropouts of a block apart.
pub fn dropout(x: &Tensor, p: f64, ctx: &Context, op: u32) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p) {
        bail!("dropout: probability {p} is not in [0, 1)");
    }
    if p == 0.0 || !ctx.training {
        return Ok(x.clone());
    }
    x.contiguous()?.apply_op1(Dropout { mask: Mask::new(p, ctx, op), scale: (1.0 / (1.0 - p)) as f32 })
}

impl Dropout {
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).enumerate().for_each(|(grain, (y, x))| {
            self.mask.write((grain * GRAIN) as u64, self.scale, y);
            y.iter_mut().zip(x).for_each(|(y, x)| *y *= x);
        });
        y
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.apply(slice("dropout", storage, layout)?)), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let dx = with_slice("dropout", &dy, |dy| Ok(self.apply(dy)))?;
        tensor_like(dx, x).map(Some)
    }
}
