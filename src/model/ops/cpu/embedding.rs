//! Token and position embeddings, with gradients in a fixed order: tokens of one row are summed in order of position.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::access::{accumulate, tensor, wants_gradient, weight_rows, with_slice};
use crate::model::ops::embedding::sorted_positions;
use crate::model::param::Param;

/// For each row of a tile its weights, in fp32.
fn gather(table: &Param, ids: &[u32]) -> Result<Vec<f32>> {
    let width = table.columns();
    let mut out = vec![0f32; ids.len() * width];
    for (tile, place) in table.tiles().iter().enumerate() {
        let (start, rows) = (place.row_start, place.rows);
        let weights = weight_rows(table, tile, 0, rows)?;
        out.par_chunks_mut(width).zip(ids).for_each(|(out, &id)| {
            if let Some(row) = (id as usize).checked_sub(start).filter(|&row| row < rows) {
                out.copy_from_slice(&weights[row * width..][..width]);
            }
        });
    }
    Ok(out)
}

/// Rows of `table` for `ids`.
pub(crate) fn embedding_forward(ids: &[u32], dims: &[usize], table: &Param) -> Result<Tensor> {
    tensor(gather(table, ids)?, [dims, &[table.columns()]].concat())
}

/// Adds the rows of `dy` to the gradient of `table`; those of one token in order of position.
pub(crate) fn embedding_backward(dy: &Tensor, ids: &[u32], table: &Param) -> Result<()> {
    if !wants_gradient(table)? {
        return Ok(());
    }
    let width = table.columns();
    let order = sorted_positions(ids);
    let runs: Vec<&[u32]> = order.chunk_by(|&a, &b| ids[a as usize] == ids[b as usize]).collect();
    let sums: Vec<(usize, Vec<f32>)> = with_slice("embedding", &dy.contiguous()?, |dy| {
        let sums = runs.par_iter().map(|run| {
            let mut sum = vec![0f32; width];
            for &position in *run {
                let dy = &dy[position as usize * width..][..width];
                sum.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
            }
            (ids[run[0] as usize] as usize, sum)
        });
        Ok(sums.collect())
    })?;
    let (tiles, mut tile) = (table.tiles(), 0);
    for (row, sum) in sums {
        while row >= tiles[tile].row_start + tiles[tile].rows {
            tile += 1;
        }
        accumulate(table, tile, (row - tiles[tile].row_start) * width, &sum)?;
    }
    Ok(())
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
