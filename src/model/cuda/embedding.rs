//! Token and position embeddings.

use candle_core::{DType, Result, Tensor};
use patrickstar_actors::cuda::{Arg, Grid};
use patrickstar_actors::types::Precision;

use super::ops::{CudaOps, kernel};
use crate::model::ops::embedding::sorted_positions;
use crate::model::param::Param;

/// Positions of one token that are summed in one go; see `embedding.cu`.
const SEGMENT: usize = 32;
/// Columns of a block that sums rows.
const COLUMNS_PER_BLOCK: usize = 1024;
const MOST_BLOCKS: u64 = 4096;

fn row_grid(rows: usize) -> Grid {
    Grid::linear((rows as u64).div_ceil(8).clamp(1, MOST_BLOCKS), 256)
}

/// The element type of activations for weights of this precision.
pub(super) fn dtype_of(param: &Param) -> DType {
    match param.precision() {
        Precision::Fp32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::Fp16 => DType::F16,
    }
}

impl CudaOps {
    /// Rows of `table` for `ids`.
    pub(crate) fn embedding_forward(&self, ids: &[u32], dims: &[usize], table: &Param) -> Result<Tensor> {
        let (width, dtype) = (table.columns(), dtype_of(table));
        let on_device = self.upload(ids)?;
        let y = self.uninitialised([dims, &[width]].concat(), dtype)?;
        for tile in self.tiles(table)? {
            let args = [
                Arg::Pointer(tile.weight as u64),
                self.pointer(&on_device)?,
                self.pointer(&y)?,
                Arg::U64(ids.len() as u64),
                Arg::I32(width as i32),
                Arg::U64(tile.row_start as u64),
                Arg::U64(tile.rows as u64),
                Arg::I32(0),
            ];
            self.launch(&self.embedding, kernel!(dtype, "embedding_forward"), row_grid(ids.len()), &args)?;
        }
        Ok(y)
    }

    /// Adds the rows of `dy` to the gradient of `table`; those of one token in order of position.
    pub(crate) fn embedding_backward(&self, dy: &Tensor, ids: &[u32], table: &Param) -> Result<()> {
        let (width, dtype) = (table.columns(), dy.dtype());
        let order = sorted_positions(ids);
        let runs: Vec<&[u32]> = order.chunk_by(|&a, &b| ids[a as usize] == ids[b as usize]).collect();
        let order_on_device = self.upload(&order)?;
        let mut first = 0;
        let mut start = 0u32;
        for tile in self.tiles(table)? {
            // Runs are sorted by token, so those of a tile are neighbours.
            let token = |run: &&[u32]| ids[run[0] as usize] as usize;
            let count = runs[first..].iter().take_while(|run| token(run) < tile.row_start + tile.rows).count();
            let own = &runs[first..first + count];
            first += count;
            if own.is_empty() || tile.gradient.is_null() {
                start += own.iter().map(|run| run.len() as u32).sum::<u32>();
                continue;
            }
            let mut starts = vec![start];
            for run in own {
                start += run.len() as u32;
                starts.push(start);
            }
            let rows: Vec<u32> = own.iter().map(|run| (token(run) - tile.row_start) as u32).collect();
            let windows = ((start - starts[0]) as usize).div_ceil(SEGMENT);
            let (starts, rows) = (self.upload(&starts)?, self.upload(&rows)?);
            let partial = self.uninitialised((2 * windows, width), DType::F32)?;
            let columns = width.div_ceil(COLUMNS_PER_BLOCK) as u32;
            let gradient = Arg::Pointer(tile.gradient as u64);
            let (run_count, width_arg) = (Arg::I32(count as i32), Arg::I32(width as i32));
            let args = [
                self.pointer(dy)?,
                self.pointer(&order_on_device)?,
                self.pointer(&starts)?,
                self.pointer(&rows)?,
                gradient,
                self.pointer(&partial)?,
                run_count,
                width_arg,
            ];
            let grid = Grid { blocks: [windows as u32, columns, 1], threads: 256, shared: 0 };
            self.launch(&self.embedding, kernel!(dtype, "embedding_backward"), grid, &args)?;
            let args =
                [self.pointer(&partial)?, self.pointer(&starts)?, self.pointer(&rows)?, gradient, run_count, width_arg];
            let grid = Grid { blocks: [count.min(MOST_BLOCKS as usize) as u32, columns, 1], threads: 256, shared: 0 };
            self.launch(&self.embedding, kernel!(dtype, "embedding_backward_long"), grid, &args)?;
        }
        Ok(())
    }

    /// Adds row `t` of `table` to `x[.., t, ..]`.
    pub(crate) fn positions_forward(&self, x: &Tensor, table: &Param) -> Result<Tensor> {
        let (batch, time, width) = x.dims3()?;
        let dtype = x.dtype();
        let y = self.uninitialised(x.shape(), dtype)?;
        for tile in self.tiles(table)?.iter().filter(|tile| tile.row_start < time) {
            let count = tile.rows.min(time - tile.row_start);
            let args = [
                self.pointer(x)?,
                Arg::Pointer(tile.weight as u64),
                self.pointer(&y)?,
                Arg::U64(batch as u64),
                Arg::I32(time as i32),
                Arg::I32(width as i32),
                Arg::I32(tile.row_start as i32),
                Arg::I32(count as i32),
            ];
            self.launch(&self.embedding, kernel!(dtype, "add_positions"), row_grid(batch * count), &args)?;
        }
        Ok(y)
    }

    /// Adds the sum of `dy` over sequences to the gradient of `table`.
    pub(crate) fn positions_backward(&self, dy: &Tensor, table: &Param) -> Result<()> {
        let (batch, time, width) = dy.dims3()?;
        for tile in self.tiles(table)?.iter().filter(|tile| tile.row_start < time && !tile.gradient.is_null()) {
            let count = tile.rows.min(time - tile.row_start);
            let args = [
                self.pointer(dy)?,
                Arg::Pointer(tile.gradient as u64),
                Arg::U64(batch as u64),
                Arg::I32(time as i32),
                Arg::I32(width as i32),
                Arg::I32(tile.row_start as i32),
                Arg::I32(count as i32),
            ];
            self.launch(&self.embedding, kernel!(dy.dtype(), "positions_backward"), row_grid(count), &args)?;
        }
        Ok(())
    }
}
