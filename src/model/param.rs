//! Leased parameters: zero-copy windows on weight and gradient chunks.

#![expect(unsafe_code, reason = "turns leased addresses into slices")]

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use candle_core::{Result, bail};
use half::{bf16, f16};
use patrickstar_actors::types::{Precision, Tier};

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

// SAFETY: the pointers are only dereferenced through `Param`, which forgets them when the lease they came from ends; the
// runtime hands a gradient tile to one compute thread at a time.
unsafe impl Send for ParamTile {}
// SAFETY: as above.
unsafe impl Sync for ParamTile {}

/// A parameter of a block. It is bound to chunks for the time of a lease; all its clones, in whatever an operation keeps
/// for its backward, are bound and released with it.
#[derive(Clone, Debug)]
pub struct Param {
    inner: Arc<Inner>,
    /// Where the chunks lie to which it is bound.
    tier: Tier,
}

#[derive(Debug)]
struct Inner {
    name: Box<str>,
    shape: Box<[usize]>,
    precision: Precision,
    /// Panel height for tiled parameters; the number of rows otherwise.
    panel_rows: usize,
    /// Empty while no lease is held.
    tiles: RwLock<Vec<ParamTile>>,
}

/// Weight elements of one tile.
#[derive(Clone, Copy, Debug)]
pub enum WeightSlice<'a> {
    /// fp32 weights.
    F32(&'a [f32]),
    /// bf16 weights.
    Bf16(&'a [bf16]),
    /// fp16 weights.
    F16(&'a [f16]),
}

/// Gradient elements of one tile, to be accumulated into.
#[derive(Debug)]
pub enum GradientSlice<'a> {
    /// fp32 gradients.
    F32(&'a mut [f32]),
    /// bf16 gradients: add in f32, round once.
    Bf16(&'a mut [bf16]),
    /// fp16 gradients, likewise.
    F16(&'a mut [f16]),
}

impl<'a> WeightSlice<'a> {
    /// Some of the elements.
    pub(crate) fn part(self, elements: Range<usize>) -> Self {
        match self {
            WeightSlice::F32(values) => WeightSlice::F32(&values[elements]),
            WeightSlice::Bf16(values) => WeightSlice::Bf16(&values[elements]),
            WeightSlice::F16(values) => WeightSlice::F16(&values[elements]),
        }
    }

    /// Their bytes.
    #[cfg(feature = "cuda")]
    pub(crate) fn bytes(self) -> &'a [u8] {
        match self {
            WeightSlice::F32(values) => bytemuck::cast_slice(values),
            WeightSlice::Bf16(values) => bytemuck::cast_slice(values),
            WeightSlice::F16(values) => bytemuck::cast_slice(values),
        }
    }
}

#[cfg(feature = "cuda")]
impl<'a> GradientSlice<'a> {
    /// The bytes of the elements.
    pub(crate) fn bytes(self) -> &'a mut [u8] {
        match self {
            GradientSlice::F32(values) => bytemuck::cast_slice_mut(values),
            GradientSlice::Bf16(values) => bytemuck::cast_slice_mut(values),
            GradientSlice::F16(values) => bytemuck::cast_slice_mut(values),
        }
    }
}

impl Param {
    /// A parameter that no lease has bound yet. `panel_rows` is the height of a panel where it may be tiled.
    pub fn new(name: &str, shape: &[usize], precision: Precision, panel_rows: Option<usize>) -> Self {
        let panel_rows = panel_rows.unwrap_or(shape.first().copied().unwrap_or(1));
        let inner =
            Inner { name: name.into(), shape: shape.into(), precision, panel_rows, tiles: RwLock::new(Vec::new()) };
        Param { inner: Arc::new(inner), tier: Tier::Device }
    }

    /// The same for chunks in `tier`.
    pub fn in_tier(self, tier: Tier) -> Self {
        Param { tier, ..self }
    }

    /// Whether operations on a GPU find its elements in host memory.
    pub fn is_in_host_memory(&self) -> bool {
        self.tier != Tier::Device
    }

    /// Binds it to chunks.
    ///
    /// # Safety
    /// Every tile's `weight` (and `gradient`, when not null) must point to `rows * columns` aligned elements of the
    /// parameter's precision that stay valid, and are not written by anyone else, until [`Param::release`].
    pub unsafe fn bind(&self, tiles: Vec<ParamTile>) {
        *self.inner.tiles.write().unwrap_or_else(PoisonError::into_inner) = tiles;
    }

    /// The lease ends: whoever still uses the parameter gets an error.
    pub fn release(&self) {
        self.inner.tiles.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The parameter's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.inner.shape
    }

    /// First dimension.
    pub fn rows(&self) -> usize {
        self.shape().first().copied().unwrap_or(1)
    }

    /// Elements of a row: the product of all but the first dimension.
    pub fn columns(&self) -> usize {
        self.shape().iter().skip(1).product()
    }

    /// Storage type.
    pub fn precision(&self) -> Precision {
        self.inner.precision
    }

    /// Rows of a panel: operations on tileable parameters work panel by panel, whatever the tiling, so that chunk size
    /// never changes an order of summation.
    pub fn panel_rows(&self) -> usize {
        self.inner.panel_rows
    }

    /// The tiles, in row order; one for a parameter that is not tiled, none while it is not leased.
    pub fn tiles(&self) -> Vec<ParamTile> {
        self.inner.tiles.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Weights of tile `index`, where they lie in host memory.
    pub(crate) fn weight(&self, index: usize) -> Result<WeightSlice<'_>> {
        let (tile, elements) = self.checked_tile(index)?;
        // SAFETY: `bind` promised the pointer until `release`; the lease outlives the operation because both live on the
        // compute thread.
        Ok(unsafe {
            match self.precision() {
                Precision::Fp32 => WeightSlice::F32(std::slice::from_raw_parts(tile.weight.cast(), elements)),
                Precision::Bf16 => WeightSlice::Bf16(std::slice::from_raw_parts(tile.weight.cast(), elements)),
                Precision::Fp16 => WeightSlice::F16(std::slice::from_raw_parts(tile.weight.cast(), elements)),
            }
        })
    }

    /// Gradients of tile `index` in host memory, to accumulate into; `None` when this pass computes none.
    ///
    /// # Safety
    /// The caller must hold no other slice of the same tile's gradient.
    pub(crate) unsafe fn gradient(&self, index: usize) -> Result<Option<GradientSlice<'_>>> {
        let (tile, elements) = self.checked_tile(index)?;
        if tile.gradient.is_null() {
            return Ok(None);
        }
        // SAFETY: as for `weight`; exclusive by this function's contract.
        Ok(Some(unsafe {
            match self.precision() {
                Precision::Fp32 => GradientSlice::F32(std::slice::from_raw_parts_mut(tile.gradient.cast(), elements)),
                Precision::Bf16 => GradientSlice::Bf16(std::slice::from_raw_parts_mut(tile.gradient.cast(), elements)),
                Precision::Fp16 => GradientSlice::F16(std::slice::from_raw_parts_mut(tile.gradient.cast(), elements)),
            }
        }))
    }

    fn checked_tile(&self, index: usize) -> Result<(ParamTile, usize)> {
        let tiles = self.inner.tiles.read().unwrap_or_else(PoisonError::into_inner);
        match tiles.get(index) {
            Some(&tile) => Ok((tile, tile.rows * self.columns())),
            // A tape that somebody kept beyond its block would read a chunk that has moved on: refuse instead.
            None if tiles.is_empty() => {
                bail!("parameter `{}` is used outside of its lease: do not keep a block's activations", self.name())
            }
            None => bail!("parameter `{}` has no tile {index}", self.name()),
        }
    }
}

/// The parameters of one block.
#[derive(Clone, Debug, Default)]
pub struct Params {
    by_name: HashMap<Box<str>, Param>,
}

impl Params {
    /// Parameters by their names.
    pub fn new(params: impl IntoIterator<Item = Param>) -> Self {
        Params { by_name: params.into_iter().map(|param| (param.name().into(), param)).collect() }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Param> {
        self.by_name.values()
    }

    /// The parameter `name`, which the block must have listed.
    pub fn get(&self, name: &str) -> Result<&Param> {
        match self.by_name.get(name) {
            Some(param) => Ok(param),
            None => bail!("block asks for parameter `{name}` but does not list it in `parameters()`"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_is_usable_during_its_lease_only() {
        let mut weight = [1f32, 2.0, 3.0, 4.0];
        let tile =
            ParamTile { row_start: 0, rows: 2, weight: weight.as_ptr().cast(), gradient: weight.as_mut_ptr().cast() };
        let param = Param::new("w", &[2, 2], Precision::Fp32, None);
        let kept = param.clone();
        assert!(kept.weight(0).unwrap_err().to_string().contains("outside of its lease"));
        // SAFETY: the array outlives the binding.
        unsafe { param.bind(vec![tile]) };
        assert!(matches!(kept.weight(0).unwrap(), WeightSlice::F32([1.0, 2.0, 3.0, 4.0])));
        assert!(kept.weight(1).unwrap_err().to_string().contains("no tile 1"));
        param.release();
        assert!(kept.weight(0).is_err(), "a clone still reads a chunk that was given back");
    }
}
