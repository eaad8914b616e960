//! Dropout (Srivastava et al., 2014) whose mask is computed from a counter, never stored.

use candle_core::{Result, bail};

use crate::model::block::Context;
use crate::model::rng::Mask;
use crate::model::tape::Activation;

/// Zeroes elements with probability `p`, a multiple of 2^-16, and scales the others by `1 / (1 - p)`; the identity outside of
/// training. `op` tells the dropouts of a block apart.
pub fn dropout(x: &Activation, p: f64, ctx: &Context, op: u32) -> Result<Activation> {
    if !(0.0..1.0).contains(&p) {
        bail!("dropout: probability {p} is not in [0, 1)");
    }
    if p == 0.0 || !ctx.training {
        return Ok(x.clone());
    }
    let (compute, mask) = (x.compute().clone(), Mask::new(p, ctx, op));
    let forward = {
        let (compute, mask, x) = (compute.clone(), mask.clone(), x.clone());
        move || on!(&compute, dropout(&x.tensor()?, &mask, None))
    };
    let into_x = x.slot();
    x.tape().record_deferred(x.dims(), x.dtype(), forward, move |dy, gradients| {
        gradients.add(into_x, |before| on!(&compute, dropout(&dy, &mask, before)))
    })
}
