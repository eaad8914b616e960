//! Token and position embeddings, with gradients in a fixed order: tokens of one row are summed in order of position.

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::access::{accumulate, slice, tensor_like, wants_gradient, weight_rows, with_slice};
use crate::model::block::Context;
use crate::model::param::Param;

struct Embedding {
    table: Param,
    ids: Vec<u32>,
    shape: Vec<usize>,
}

/// Rows of `table` (vocabulary, hidden) for `ids` (.., u32). The graph hangs on `ctx.anchor`, as ids cannot carry one.
pub fn embedding(ids: &Tensor, table: &Param, ctx: &Context) -> Result<Tensor> {
    let values = ids.flatten_all()?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
    if let Some(id) = values.iter().find(|&&id| id as usize >= table.rows()) {
        bail!("embedding: token {id} is outside of `{}` with {} rows: check the tokenizer", table.name(), table.rows());
    }
    let mut shape = ids.dims().to_vec();
    shape.push(table.columns());
    let op = Embedding { table: table.clone(), ids: values, shape };
    match &ctx.anchor {
        Some(anchor) => anchor.apply_op1(op),
        None => Tensor::zeros((), DType::F32, &Device::Cpu)?.apply_op1(op),
    }
}

/// For each row of a tile its weights, in fp32.
fn gather(table: &Param, ids: &[u32]) -> Result<Vec<f32>> {
    let width = table.columns();
    let mut out = vec![0f32; ids.len() * width];
    for tile in 0..table.tile_count() {
        let (start, rows) = table.tile_rows(tile);
        let weights = weight_rows(table, tile, 0, rows)?;
        out.par_chunks_mut(width).zip(ids).for_each(|(out, &id)| {
            if let Some(row) = (id as usize).checked_sub(start).filter(|&row| row < rows) {
                out.copy_from_slice(&weights[row * width..][..width]);
            }
        });
    }
    Ok(out)
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(gather(&self.table, &self.ids)?), Shape::from(self.shape.clone())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        with_slice("embedding", &dy, |dy| self.scatter(dy))?;
        Ok(None)
    }
}

impl Embedding {
    fn scatter(&self, dy: &[f32]) -> Result<()> {
        if !wants_gradient(&self.table)? {
            return Ok(());
        }
        let width = self.table.columns();
        let mut order: Vec<u32> = (0..self.ids.len() as u32).collect();
        order.sort_by_key(|&position| (self.ids[position as usize], position));
        let runs: Vec<&[u32]> = order.chunk_by(|&a, &b| self.ids[a as usize] == self.ids[b as usize]).collect();
        let sums: Vec<(usize, Vec<f32>)> = runs
            .par_iter()
            .map(|run| {
                let mut sum = vec![0f32; width];
                for &position in *run {
                    let dy = &dy[position as usize * width..][..width];
                    sum.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
                }
                (self.ids[run[0] as usize] as usize, sum)
            })
            .collect();
        let mut tile = 0;
        for (row, sum) in sums {
            while row >= self.table.tile_rows(tile).0 + self.table.tile_rows(tile).1 {
                tile += 1;
            }
            accumulate(&self.table, tile, (row - self.table.tile_rows(tile).0) * width, &sum)?;
        }
        Ok(())
    }
}

struct Positions {
    table: Param,
}

/// Adds row `t` of `table` (positions, hidden) to `x[.., t, ..]` (batch, time, hidden).
pub fn positional_embedding(x: &Tensor, table: &Param) -> Result<Tensor> {
    let (_, time, width) = x.dims3()?;
    if time > table.rows() || width != table.columns() {
        bail!(
            "positional_embedding: input {:?} does not fit `{}` of shape {:?}",
            x.dims(),
            table.name(),
            table.shape()
        );
    }
    x.contiguous()?.apply_op1(Positions { table: table.clone() })
}

impl CustomOp1 for Positions {
    fn name(&self) -> &'static str {
        "positional_embedding"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, time, _) = layout.shape().dims3()?;
        let mut y = slice("positional_embedding", storage, layout)?.to_vec();
        let rows = gather(&self.table, &(0..time as u32).collect::<Vec<_>>())?;
        y.par_chunks_mut(rows.len()).for_each(|y| y.iter_mut().zip(&rows).for_each(|(y, row)| *y += row));
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let (batch, time, width) = x.dims3()?;
        if wants_gradient(&self.table)? {
            with_slice("positional_embedding", &dy, |dy| {
                let mut sums = vec![0f32; time * width];
                sums.par_chunks_mut(width).enumerate().for_each(|(t, sum)| {
                    for b in 0..batch {
                        let dy = &dy[(b * time + t) * width..][..width];
                        sum.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
                    }
                });
                for tile in 0..self.table.tile_count() {
                    let (start, rows) = self.table.tile_rows(tile);
                    let end = (start + rows).min(time);
                    if start < end {
                        accumulate(&self.table, tile, 0, &sums[start * width..end * width])?;
                    }
                }
                Ok(())
            })?;
        }
        tensor_like(with_slice("positional_embedding", &dy, |dy| Ok(dy.to_vec()))?, x).map(Some)
    }
}
