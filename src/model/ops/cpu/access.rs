//! Reading activations and weights as slices, and adding to gradients.

#![expect(unsafe_code, reason = "takes the only slice of a gradient")]

use std::borrow::Cow;

use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};
use patrickstar_actors::adam::{narrow_fp16, widen_fp16};
use rayon::prelude::*;

use crate::model::param::{GradientSlice, Param, WeightSlice};

/// Elements that are worth a task of their own.
pub(super) const GRAIN: usize = 1 << 14;

/// The contiguous fp32 elements of an operation's input.
fn slice<'a>(op: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((from, to))) => Ok(&values[from..to]),
        (CpuStorage::F32(_), None) => bail!("{op} needs a contiguous input: call contiguous() first"),
        _ => bail!("{op} computes in fp32: convert its input with to_dtype(F32)"),
    }
}

/// Calls `read` with the elements of a contiguous fp32 tensor.
pub(super) fn with_slice<R>(op: &str, tensor: &Tensor, read: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => read(slice(op, storage, layout)?),
        _ => bail!("{op} has no kernel for this device"),
    }
}

/// A new tensor of `values`.
pub(super) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

/// The values to add to: those of `before`, or zeros.
pub(super) fn start_from(before: Option<Tensor>, elements: usize) -> Result<Vec<f32>> {
    match before {
        None => Ok(vec![0.0; elements]),
        Some(before) => with_slice("a gradient", &before.contiguous()?, |values| Ok(values.to_vec())),
    }
}

/// Rows `[row, row + rows)` of tile `tile`, in fp32.
pub(super) fn weight_rows(param: &Param, tile: usize, row: usize, rows: usize) -> Result<Cow<'_, [f32]>> {
    let columns = param.columns();
    let range = row * columns..(row + rows) * columns;
    Ok(match param.weight(tile)? {
        WeightSlice::F32(values) => Cow::Borrowed(&values[range]),
        WeightSlice::Bf16(values) => Cow::Owned(widened(&values[range], |value| value.to_f32())),
        WeightSlice::F16(values) => Cow::Owned(widened(&values[range], |value| widen_fp16(value.to_bits()))),
    })
}

fn widened<T: Copy + Sync>(narrow: &[T], widen: impl Fn(T) -> f32 + Sync) -> Vec<f32> {
    let mut wide = vec![0f32; narrow.len()];
    wide.par_chunks_mut(GRAIN).zip(narrow.par_chunks(GRAIN)).for_each(|(wide, narrow)| {
        wide.iter_mut().zip(narrow).for_each(|(wide, &narrow)| *wide = widen(narrow));
    });
    wide
}

/// One panel of a parameter: the unit in which tileable operations work, whatever the tiling.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panel {
    pub tile: usize,
    /// First row within the tile.
    pub row_in_tile: usize,
    /// First row within the parameter.
    pub row: usize,
    pub rows: usize,
}

/// Panels in row order.
pub(super) fn panels(param: &Param) -> Vec<Panel> {
    let mut panels = Vec::new();
    for (tile, place) in param.tiles().iter().enumerate() {
        let mut row_in_tile = 0;
        while row_in_tile < place.rows {
            let rows = param.panel_rows().min(place.rows - row_in_tile);
            panels.push(Panel { tile, row_in_tile, row: place.row_start + row_in_tile, rows });
            row_in_tile += rows;
        }
    }
    panels
}

/// Adds `values` to the gradient of tile `tile` from element `offset` on; nothing in passes without gradients.
pub(super) fn accumulate(param: &Param, tile: usize, offset: usize, values: &[f32]) -> Result<()> {
    // SAFETY: this is the only slice of the tile's gradient: operations run one after another on the compute thread.
    match unsafe { param.gradient(tile)? } {
        None => {}
        Some(GradientSlice::F32(gradient)) => {
            let gradient = &mut gradient[offset..offset + values.len()];
            gradient.par_chunks_mut(GRAIN).zip(values.par_chunks(GRAIN)).for_each(|(gradient, values)| {
                gradient.iter_mut().zip(values).for_each(|(gradient, value)| *gradient += value);
            });
        }
        Some(GradientSlice::Bf16(gradient)) => {
            let gradient = &mut gradient[offset..offset + values.len()];
            add_each(gradient, values, |gradient, value| bf16::from_f32(gradient.to_f32() + value));
        }
        Some(GradientSlice::F16(gradient)) => {
            let gradient = &mut gradient[offset..offset + values.len()];
            let sum = |gradient: f16, value| f16::from_bits(narrow_fp16(widen_fp16(gradient.to_bits()) + value));
            add_each(gradient, values, sum);
        }
    }
    Ok(())
}

fn add_each<T: Copy + Send>(gradient: &mut [T], values: &[f32], add: impl Fn(T, f32) -> T + Sync) {
    gradient.par_chunks_mut(GRAIN).zip(values.par_chunks(GRAIN)).for_each(|(gradient, values)| {
        gradient.iter_mut().zip(values).for_each(|(gradient, &value)| *gradient = add(*gradient, value));
    });
}

/// Whether this pass computes gradients of `param`.
pub(super) fn wants_gradient(param: &Param) -> Result<bool> {
    // SAFETY: the slice is dropped at once.
    Ok(unsafe { param.gradient(0)? }.is_some())
}

/// For each column the sum over rows of `term(row, column)`, rows in order; columns are shared out to threads.
pub(super) fn column_sums(rows: usize, columns: usize, term: impl Fn(usize, usize) -> f32 + Sync) -> Vec<f32> {
    const BAND: usize = 64;
    let mut sums = vec![0f32; columns];
    sums.par_chunks_mut(BAND).enumerate().for_each(|(band, sums)| {
        for row in 0..rows {
            for (offset, sum) in sums.iter_mut().enumerate() {
                *sum += term(row, band * BAND + offset);
            }
        }
    });
    sums
}
