//! Leased parameters: zero-copy windows on weight and gradient chunks.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Result, bail};
use half::bf16;
use patrickstar_actors::types::Precision;

/// Rows of a parameter that lie in one chunk.
#[derive(Clone, Copy, Debug)]
pub struct ParamTile {
    /// First row of the parameter in this tile.
    pub row_start: usize,
    /// Rows in this tile.
    pub rows: usize,
    /// Elements at `weight`, row-major.
    pub weight: *const u8,
    /// Gradient elements in the same order and type; null in passes that compute none.
    pub gradient: *mut u8,
}

// SAFETY: the pointers are only dereferenced through `Param`, which checks that the lease they came from is alive; the
// runtime hands a gradient tile to one compute thread at a time.
unsafe impl Send for ParamTile {}
// SAFETY: as above.
unsafe impl Sync for ParamTile {}

/// A parameter that may be used while the lease it came from lives. Cheap to clone into custom operations.
#[derive(Clone, Debug)]
pub struct Param {
    name: Arc<str>,
    shape: Arc<[usize]>,
    precision: Precision,
    tiles: Arc<[ParamTile]>,
    /// Panel height for tiled parameters; the number of rows otherwise.
    panel_rows: usize,
    alive: Arc<AtomicBool>,
}

/// Weight elements of one tile.
#[derive(Clone, Copy, Debug)]
pub enum WeightSlice<'a> {
    /// fp32 weights.
    F32(&'a [f32]),
    /// bf16 weights.
    Bf16(&'a [bf16]),
}

/// Gradient elements of one tile, to be accumulated into.
#[derive(Debug)]
pub enum GradientSlice<'a> {
    /// fp32 gradients.
    F32(&'a mut [f32]),
    /// bf16 gradients: add in f32, round once.
    Bf16(&'a mut [bf16]),
}

impl Param {
    /// # Safety
    /// Every tile's `weight` (and `gradient`, when not null) must point to `rows * columns` aligned elements of
    /// `precision` that stay valid, and are not written by anyone else, until `alive` turns false.
    pub unsafe fn new(
        name: &str,
        shape: &[usize],
        precision: Precision,
        tiles: Vec<ParamTile>,
        panel_rows: Option<usize>,
        alive: Arc<AtomicBool>,
    ) -> Self {
        Param {
            name: name.into(),
            panel_rows: panel_rows.unwrap_or(shape.first().copied().unwrap_or(1)),
            shape: shape.into(),
            precision,
            tiles: tiles.into(),
            alive,
        }
    }

    /// The parameter's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// First dimension.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Elements of a row: the product of all but the first dimension.
    pub fn columns(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// Storage type.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Rows of a panel: operations on tileable parameters work panel by panel, whatever the tiling, so that chunk size
    /// never changes an order of summation.
    pub fn panel_rows(&self) -> usize {
        self.panel_rows
    }

    /// Tiles in row order; one for a parameter that is not tiled.
    pub fn tile_count(&self) -> usize {
        self.tiles.len()
    }

    /// First row and number of rows of tile `index`.
    pub fn tile_rows(&self, index: usize) -> (usize, usize) {
        (self.tiles[index].row_start, self.tiles[index].rows)
    }

    /// Weights of tile `index`.
    pub fn weight(&self, index: usize) -> Result<WeightSlice<'_>> {
        let (tile, elements) = self.checked_tile(index)?;
        // SAFETY: `new` promised the pointer for as long as `alive`, which was just checked; the lease outlives the
        // operation because both live on the compute thread.
        Ok(unsafe {
            match self.precision {
                Precision::Fp32 => WeightSlice::F32(std::slice::from_raw_parts(tile.weight.cast(), elements)),
                Precision::Bf16 => WeightSlice::Bf16(std::slice::from_raw_parts(tile.weight.cast(), elements)),
            }
        })
    }

    /// Gradients of tile `index`, to accumulate into; `None` when this pass computes none.
    ///
    /// # Safety
    /// The caller must hold no other slice of the same tile's gradient.
    pub unsafe fn gradient(&self, index: usize) -> Result<Option<GradientSlice<'_>>> {
        let (tile, elements) = self.checked_tile(index)?;
        if tile.gradient.is_null() {
            return Ok(None);
        }
        // SAFETY: as for `weight`; exclusive by this function's contract.
        Ok(Some(unsafe {
            match self.precision {
                Precision::Fp32 => GradientSlice::F32(std::slice::from_raw_parts_mut(tile.gradient.cast(), elements)),
                Precision::Bf16 => GradientSlice::Bf16(std::slice::from_raw_parts_mut(tile.gradient.cast(), elements)),
            }
        }))
    }

    fn checked_tile(&self, index: usize) -> Result<(ParamTile, usize)> {
        // A graph that somebody kept beyond its block would read a chunk that has moved on: refuse instead.
        if !self.alive.load(Ordering::Acquire) {
            bail!(
                "parameter `{}` is used after its lease ended: do not keep a block's outputs with their graph",
                self.name
            )
        }
        match self.tiles.get(index) {
            Some(&tile) => Ok((tile, tile.rows * self.columns())),
            None => bail!("parameter `{}` has no tile {index}", self.name),
        }
    }
}

/// The parameters of one block for the time of a lease.
#[derive(Clone, Debug, Default)]
pub struct Params {
    by_name: HashMap<Arc<str>, Param>,
}

impl Params {
    /// Parameters by their names.
    pub fn new(params: impl IntoIterator<Item = Param>) -> Self {
        Params { by_name: params.into_iter().map(|param| (param.name.clone(), param)).collect() }
    }

    /// The parameter `name`, which the block must have listed.
    pub fn get(&self, name: &str) -> Result<&Param> {
        match self.by_name.get(name) {
            Some(param) => Ok(param),
            None => bail!("block asks for parameter `{name}` but does not list it in `parameters()`"),
        }
    }
}
