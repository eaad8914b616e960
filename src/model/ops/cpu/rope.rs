//! Rotary position embedding (Su et al., 2021).

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::access::{tensor, with_slice};
use crate::model::ops::Rope;

/// A copy of `x` (batch, time, columns) whose first heads are rotated forth (`direction` 1) or back (-1).
pub(crate) fn rope(x: &Tensor, rope: &Rope, direction: i32) -> Result<Tensor> {
    let (_, time, columns) = x.dims3()?;
    let half = rope.rotary_dim / 2;
    let angles = rope.angles(time);
    let mut y = with_slice("rope", &x.contiguous()?, |x| Ok(x.to_vec()))?;
    y.par_chunks_mut(columns).enumerate().for_each(|(row, y)| {
        let first_angle = row % time * half;
        let (cos, sin) = (&angles.cos[first_angle..][..half], &angles.sin[first_angle..][..half]);
        for head in y.chunks_exact_mut(rope.head_dim).take(rope.heads) {
            for i in 0..half {
                let (first, second) = if rope.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
                let (a, b, sin) = (head[first], head[second], sin[i] * direction as f32);
                head[first] = a * cos[i] - b * sin;
                head[second] = b * cos[i] + a * sin;
            }
        }
    });
    tensor(y, x.shape())
}
