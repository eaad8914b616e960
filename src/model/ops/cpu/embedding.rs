//! Token and position embeddings, with gradients in a fixed order: tokens of one row are summed in order of position.

use candle_core::{Result, Tensor};
use patrickstar_actors::adam::widen_fp16;
use rayon::prelude::*;

use super::access::{accumulate, tensor, wants_gradient, with_slice};
use crate::model::ops::lookup::{self, ByToken};
use crate::model::param::{Param, WeightSlice};

/// Rows of `table`, in fp32.
fn gather(table: &Param, ids: &[u32]) -> Result<Vec<f32>> {
    let mut out = vec![0f32; ids.len() * table.columns()];
    lookup::gather(table, ids, &mut out, |row, out| match row {
        WeightSlice::F32(row) => out.copy_from_slice(row),
        WeightSlice::Bf16(row) => out.iter_mut().zip(row).for_each(|(out, value)| *out = value.to_f32()),
        WeightSlice::F16(row) => out.iter_mut().zip(row).for_each(|(out, value)| *out = widen_fp16(value.to_bits())),
    })?;
    Ok(out)
}

/// Rows of `table` for `ids`.
pub(crate) fn embedding_forward(ids: &[u32], dims: &[usize], table: &Param) -> Result<Tensor> {
    tensor(gather(table, ids)?, [dims, &[table.columns()]].concat())
}

/// Adds the rows of `dy` to the gradient of `table`; those of one token in order of position.
pub(crate) fn embedding_backward(dy: &Tensor, by_token: &ByToken, table: &Param) -> Result<()> {
    with_slice("embedding", &dy.contiguous()?, |dy| {
        lookup::add_by_token(table, by_token, usize::MAX, dy, |&value| value)
    })
}

/// Adds row `t` of `table` to `x[.., t, ..]`.
pub(crate) fn positions_forward(x: &Tensor, table: &Param) -> Result<Tensor> {
    let (_, time, _) = x.dims3()?;
    let mut y = with_slice("positional_embedding", &x.contiguous()?, |x| Ok(x.to_vec()))?;
    let rows = gather(table, &(0..time as u32).collect::<Vec<_>>())?;
    y.par_chunks_mut(rows.len()).for_each(|y| y.iter_mut().zip(&rows).for_each(|(y, row)| *y += row));
    tensor(y, x.shape())
}

/// Adds the sum of `dy` over sequences to the gradient of `table`.
pub(crate) fn positions_backward(dy: &Tensor, table: &Param) -> Result<()> {
    let (batch, time, width) = dy.dims3()?;
    if !wants_gradient(table)? {
        return Ok(());
    }
    with_slice("positional_embedding", &dy.contiguous()?, |dy| {
        let mut sums = vec![0f32; time * width];
        sums.par_chunks_mut(width).enumerate().for_each(|(t, sum)| {
            for b in 0..batch {
                let dy = &dy[(b * time + t) * width..][..width];
                sum.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
            }
        });
        for (tile, place) in table.tiles().iter().enumerate() {
            let (start, rows) = (place.row_start, place.rows);
            let end = (start + rows).min(time);
            if start < end {
                accumulate(table, tile, 0, &sums[start * width..end * width])?;
            }
        }
        Ok(())
    })
}
