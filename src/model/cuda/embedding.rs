//! Token and position embeddings.

use std::ops::Range;

use candle_core::{D, DType, Result, Tensor};
use patrickstar_actors::cuda::{Arg, Grid};
use patrickstar_actors::types::Precision;

use super::ops::{CudaOps, kernel};
use crate::model::ops::lookup::ByToken;
use crate::model::param::{Param, ParamTile};

/// Positions of one token that are summed in one go; see `embedding.cu`.
pub(super) const SEGMENT: usize = 32;
/// Marks a segment whose sum is one of several of its token.
const PARTIAL: u32 = 1 << 31;
/// Warps of a block.
const WARPS: u64 = 8;
/// Columns of a block that adds up the sums of segments.
const COLUMNS_PER_BLOCK: usize = 1024;
/// More blocks than this only wait for each other.
const MOST_BLOCKS: u64 = 1 << 16;

/// A warp for each `bytes` bytes of each of `rows` rows.
fn row_grid(rows: usize, width: usize, dtype: DType, bytes: usize) -> Grid {
    let parts = (width * dtype.size_in_bytes()).div_ceil(bytes);
    Grid::linear(((rows * parts) as u64).div_ceil(WARPS).clamp(1, MOST_BLOCKS), 256)
}

/// Blocks of 256 threads that fit on a multiprocessor at once; see `common.cuh`.
const RESIDENT: u64 = 4;

/// What `embedding_backward` adds to the rows of a tile.
#[derive(Default)]
struct Segments {
    /// Where each begins in the order of positions, and the end of the last.
    starts: Vec<u32>,
    /// The row of the gradient, or the place of its sum, with `PARTIAL`.
    targets: Vec<u32>,
    /// First place, number of places and row of each token with several segments.
    long: Vec<u32>,
    /// Places for sums.
    places: u32,
}

impl Segments {
    /// Of `tokens` of those that occur, all of a tile whose first row is `row_start`.
    fn new(by_token: &ByToken, tokens: Range<usize>, row_start: usize) -> Self {
        let mut segments = Segments {
            starts: Vec::with_capacity(tokens.len() + 1),
            targets: Vec::with_capacity(tokens.len()),
            ..Segments::default()
        };
        let end = by_token.range(tokens.end - 1).end;
        for i in tokens {
            segments.push(by_token.range(i), (by_token.token(i) - row_start) as u32);
        }
        segments.starts.push(end);
        segments
    }

    /// The positions of one token, whose row of the tile is `row`.
    fn push(&mut self, positions: Range<u32>, row: u32) {
        if positions.len() <= SEGMENT {
            self.starts.push(positions.start);
            self.targets.push(row);
            return;
        }
        let count = positions.len().div_ceil(SEGMENT) as u32;
        self.starts.extend(positions.step_by(SEGMENT));
        self.targets.extend((self.places..self.places + count).map(|place| PARTIAL | place));
        self.long.extend([self.places, count, row]);
        self.places += count;
    }
}

/// Which rows of a gradient are summed and where their sums go, on the device.
pub(crate) struct RowsToAdd {
    order: Tensor,
    tiles: Vec<TileToAdd>,
}

/// The `Segments` of a tile.
struct TileToAdd {
    gradient: u64,
    lists: Tensor,
    segments: usize,
    long: usize,
    places: usize,
}

/// The element type of activations for weights of this precision.
pub(crate) fn dtype_of(precision: Precision) -> DType {
    match precision {
        Precision::Fp32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::Fp16 => DType::F16,
    }
}

impl CudaOps {
    /// No more blocks of `grid` than fit on the GPU at once: each goes on to the next piece, and knows before what that is.
    fn at_once(&self, grid: Grid) -> Grid {
        let most = u64::from(self.multiprocessors) * RESIDENT;
        let [x, y, z] = grid.blocks;
        Grid { blocks: [u64::from(x).min(most) as u32, y, z], ..grid }
    }

    /// Rows of `table` for `ids`.
    pub(crate) fn embedding_forward(&self, ids: &[u32], dims: &[usize], table: &Param) -> Result<Tensor> {
        if table.is_in_host_memory() {
            return self.gather(ids, dims, table);
        }
        self.look_up(&self.upload(ids)?, dims, table)
    }

    /// The same for ids that are on the device.
    pub(crate) fn look_up(&self, ids: &Tensor, dims: &[usize], table: &Param) -> Result<Tensor> {
        let (width, dtype) = (table.columns(), dtype_of(table.precision()));
        let count = ids.elem_count();
        let y = self.uninitialised([dims, &[width]].concat(), dtype)?;
        for tile in self.tiles(table)? {
            let args = [
                Arg::Pointer(tile.weight as u64),
                self.pointer(ids)?,
                self.pointer(&y)?,
                Arg::U64(count as u64),
                Arg::I32(width as i32),
                Arg::U64(tile.row_start as u64),
                Arg::U64(tile.rows as u64),
                Arg::I32(0),
            ];
            self.launch(
                &self.embedding,
                kernel!(dtype, "embedding_forward"),
                self.at_once(row_grid(count, width, dtype, 2048)),
                &args,
            )?;
        }
        Ok(y)
    }

    /// Adds the rows of `dy` to the gradient of `table`; those of one token in order of position.
    pub(crate) fn embedding_backward(&self, dy: &Tensor, by_token: &ByToken, table: &Param) -> Result<()> {
        if table.is_in_host_memory() {
            return self.add_gathered(dy, by_token, table);
        }
        self.add_rows(dy, &self.rows_to_add(by_token, table)?)
    }

    /// Brings to the device where the rows of gradients go.
    pub(crate) fn rows_to_add(&self, by_token: &ByToken, table: &Param) -> Result<RowsToAdd> {
        let order = self.upload(by_token.order())?;
        let (mut first, mut tiles) = (0, Vec::new());
        for tile in self.tiles(table)? {
            // Tokens are sorted, so those of a tile are neighbours.
            let own = first..first + by_token.count_below(first, tile.row_start + tile.rows);
            first = own.end;
            if own.is_empty() || tile.gradient.is_null() {
                continue;
            }
            let Segments { starts, targets, long, places } = Segments::new(by_token, own, tile.row_start);
            tiles.push(TileToAdd {
                gradient: tile.gradient as u64,
                // One copy brings all three.
                lists: self.upload(&[&starts[..], &targets, &long].concat())?,
                segments: targets.len(),
                long: long.len() / 3,
                places: places as usize,
            });
        }
        Ok(RowsToAdd { order, tiles })
    }

    /// Adds rows of `dy` to the gradients of a bound table.
    pub(crate) fn add_rows(&self, dy: &Tensor, rows: &RowsToAdd) -> Result<()> {
        let (width, dtype) = (dy.dim(D::Minus1)?, dy.dtype());
        for tile in &rows.tiles {
            let list = |elements: usize| {
                Ok::<_, candle_core::Error>(Arg::Pointer(self.address(&tile.lists)? + 4 * elements as u64))
            };
            let partial = self.uninitialised((tile.places, width), DType::F32)?;
            let (gradient, width_arg) = (Arg::Pointer(tile.gradient), Arg::I32(width as i32));
            let args = [
                self.pointer(dy)?,
                self.pointer(&rows.order)?,
                list(0)?,
                list(tile.segments + 1)?,
                gradient,
                self.pointer(&partial)?,
                Arg::I32(tile.segments as i32),
                width_arg,
            ];
            let grid = self.at_once(row_grid(tile.segments, width, dtype, 2048));
            self.launch(&self.embedding, kernel!(dtype, "embedding_backward"), grid, &args)?;
            if tile.long == 0 {
                continue;
            }
            let list = list(2 * tile.segments + 1)?;
            let args = [self.pointer(&partial)?, list, gradient, Arg::I32(tile.long as i32), width_arg];
            let mut grid = Grid::linear(tile.long as u64, 256);
            grid.blocks[1] = width.div_ceil(COLUMNS_PER_BLOCK) as u32;
            self.launch(&self.embedding, kernel!(dtype, "embedding_backward_long"), grid, &args)?;
        }
        Ok(())
    }

    /// Adds row `t` of `table` to `x[.., t, ..]`.
    pub(crate) fn positions_forward(&self, x: &Tensor, table: &Param) -> Result<Tensor> {
        let (batch, time, width) = x.dims3()?;
        let dtype = x.dtype();
        let y = self.uninitialised(x.shape(), dtype)?;
        let (_visiting, tiles) = if table.is_in_host_memory() {
            let (visiting, tile) = self.visiting_rows(time, table)?;
            (Some(visiting), vec![tile])
        } else {
            (None, self.tiles(table)?)
        };
        for tile in tiles.iter().filter(|tile| tile.row_start < time) {
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
            self.launch(
                &self.embedding,
                kernel!(dtype, "add_positions"),
                row_grid(batch * count, width, dtype, 2048),
                &args,
            )?;
        }
        Ok(y)
    }

    /// Adds the sum of `dy` over sequences to the gradient of `table`.
    pub(crate) fn positions_backward(&self, dy: &Tensor, table: &Param) -> Result<()> {
        let time = dy.dims3()?.1;
        if table.is_in_host_memory() {
            return self.visit_gradient(time, table, |tile| self.add_positions_gradient(dy, tile));
        }
        let tiles = self.tiles(table)?;
        let wanted = tiles.iter().filter(|tile| tile.row_start < time && !tile.gradient.is_null());
        wanted.into_iter().try_for_each(|tile| self.add_positions_gradient(dy, tile))
    }

    /// Adds the sum of `dy` over sequences to the gradient of a tile.
    fn add_positions_gradient(&self, dy: &Tensor, tile: &ParamTile) -> Result<()> {
        let (batch, time, width) = dy.dims3()?;
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
        let grid = row_grid(count, width, dy.dtype(), 512);
        self.launch(&self.embedding, kernel!(dy.dtype(), "positions_backward"), grid, &args)
    }
}
