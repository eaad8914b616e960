//! Filling and reading the chunks of a model: initial values, foreign weights, single parameters.

#[cfg(feature = "cuda")]
mod on_device;

use patrickstar_actors::adam::{join, narrow_fp16, split_f32};
use patrickstar_actors::chunk::Tile;
use patrickstar_actors::runtime::Runtime;
use patrickstar_actors::types::{ChunkId, GroupId, Kind, Precision};
use rayon::prelude::*;

use super::program::Program;
use crate::error::Error;
use crate::model::compute::Compute;
use crate::model::rng;

/// Elements that a core draws or encodes in one go: they stay in its cache.
const DRAWN_AT_ONCE: usize = 1 << 16;

/// Draws every parameter from its own counter-based stream: the bits depend on seed and name, not on chunks. Each group is
/// drawn where it stays, by the device or by all cores at once.
pub(crate) fn initialise(runtime: &Runtime, program: &Program, _compute: &Compute, seed: u64) -> Result<(), Error> {
    let layout = runtime.layout();
    for group in (0..layout.group_count() as u32).map(GroupId) {
        #[cfg(feature = "cuda")]
        if let Compute::Cuda(ops) = _compute
            && on_device::draw(runtime, program, ops, group, seed)?
        {
            clear_others(runtime, group)?;
            continue;
        }
        let draw = |first: usize, out: &mut [f32]| {
            for tile in layout.group_tiles(group) {
                let spec = &program.parameters[tile.tensor.0 as usize];
                let columns = layout.tensors()[tile.tensor.0 as usize].columns;
                let from = first.max(tile.offset);
                let to = (first + out.len()).min(tile.offset + tile.rows * columns);
                if from < to {
                    let counter = tile.row_start * columns + from - tile.offset;
                    rng::fill(spec.init, seed, &spec.name, counter as u64, &mut out[from - first..to - first]);
                }
            }
        };
        fill_group(runtime, group, draw)?;
    }
    Ok(())
}

/// Fills weights from `read(name, first_row, out)`; optimizer states begin at zero.
pub(crate) fn initialise_from(
    runtime: &Runtime,
    program: &Program,
    mut read: impl FnMut(&str, usize, &mut [f32]) -> Result<(), Error>,
) -> Result<(), Error> {
    let layout = runtime.layout();
    let mut values = vec![0f32; layout.group_capacity()];
    for group in (0..layout.group_count() as u32).map(GroupId) {
        values.fill(0.0);
        for tile in layout.group_tiles(group) {
            let spec = &program.parameters[tile.tensor.0 as usize];
            let elements = tile.rows * layout.tensors()[tile.tensor.0 as usize].columns;
            read(&spec.name, tile.row_start, &mut values[tile.offset..tile.offset + elements])?;
        }
        fill_group(runtime, group, |first, out| out.copy_from_slice(&values[first..first + out.len()]))?;
    }
    Ok(())
}

/// Fills a group's weights by `draw(first_element, out)`, from many threads at once; its other states with zeros.
fn fill_group(runtime: &Runtime, group: GroupId, draw: impl Fn(usize, &mut [f32]) + Sync) -> Result<(), Error> {
    let layout = runtime.layout();
    let precision = layout.precision();
    runtime.initialise(&weight_chunks(runtime, group), |payloads| match (precision, payloads) {
        (Precision::Bf16, [weight, low]) => write(&draw, 0, (Kind::Weight, weight), Some((Kind::Low, low))),
        (Precision::Fp16, [weight, masters @ ..]) => {
            let part = layout.part_elements();
            for ((index, weight), master) in weight.chunks_mut(2 * part).enumerate().zip(masters) {
                write(&draw, index * part, (Kind::Weight, weight), Some((Kind::Master, master)));
            }
        }
        (_, payloads) => payloads.iter_mut().for_each(|weight| write(&draw, 0, (Kind::Master, weight), None)),
    })?;
    clear_others(runtime, group)
}

/// The chunks of a group that hold its parameters or a part of them, by kind and in the order of elements.
fn weight_chunks(runtime: &Runtime, group: GroupId) -> Vec<ChunkId> {
    let layout = runtime.layout();
    let kinds = layout.precision().persistent_kinds().iter().filter(|kind| kind.is_weight());
    kinds.flat_map(|&kind| layout.group_chunks(group, kind).iter().copied()).collect()
}

/// What the optimizer keeps beside a group's weights begins at zero.
fn clear_others(runtime: &Runtime, group: GroupId) -> Result<(), Error> {
    let layout = runtime.layout();
    let kinds = layout.precision().persistent_kinds().iter().filter(|kind| !kind.is_weight());
    for &chunk in kinds.flat_map(|&kind| layout.group_chunks(group, kind)) {
        runtime.clear(&[chunk])?;
    }
    Ok(())
}

/// Writes elements from `first` on to one or two kinds of them.
fn write(
    draw: &(impl Fn(usize, &mut [f32]) + Sync),
    first: usize,
    (kind, bytes): (Kind, &mut [u8]),
    other: Option<(Kind, &mut [u8])>,
) {
    let size = |kind: Kind| if kind == Kind::Master { 4 } else { 2 };
    let elements = bytes.len() / size(kind);
    let pieces = bytes.par_chunks_mut(DRAWN_AT_ONCE * size(kind)).enumerate();
    let draw_piece = |piece: usize| {
        let start = piece * DRAWN_AT_ONCE;
        let mut values = vec![0f32; DRAWN_AT_ONCE.min(elements - start)];
        draw(first + start, &mut values);
        values
    };
    match other {
        Some((second, others)) => {
            pieces.zip(others.par_chunks_mut(DRAWN_AT_ONCE * size(second))).for_each(|((piece, bytes), others)| {
                let values = draw_piece(piece);
                encode(kind, second, &values, bytes);
                encode(second, kind, &values, others);
            });
        }
        None => pieces.for_each(|(piece, bytes)| encode(kind, kind, &draw_piece(piece), bytes)),
    }
}

/// Writes `values` as `kind` stores them beside `other`.
fn encode(kind: Kind, other: Kind, values: &[f32], bytes: &mut [u8]) {
    match (kind, other) {
        (Kind::Weight, Kind::Low) => halves(values, bytes, |value| split_f32(value).0),
        (Kind::Low, _) => halves(values, bytes, |value| split_f32(value).1),
        (Kind::Weight, _) => halves(values, bytes, narrow_fp16),
        _ => bytes.copy_from_slice(bytemuck::cast_slice(values)),
    }
}

fn halves(values: &[f32], bytes: &mut [u8], narrow: impl Fn(f32) -> u16) {
    for (out, &value) in bytes.chunks_exact_mut(2).zip(values) {
        out.copy_from_slice(&narrow(value).to_ne_bytes());
    }
}

/// Reads one parameter's `kind` in fp32: the whole weight (both halves) for `Kind::Weight`.
pub(crate) fn read_parameter(runtime: &Runtime, name: &str, kind: Kind) -> Result<Vec<f32>, Error> {
    let layout = runtime.layout();
    let tensor = layout.tensor_id(name).ok_or_else(|| Error::Model(format!("the model has no parameter `{name}`")))?;
    let columns = layout.tensors()[tensor.0 as usize].columns;
    let mut out = Vec::new();
    for tile in layout.tiles(tensor) {
        read_tile(runtime, tile, columns, kind, &mut out)?;
    }
    Ok(out)
}

fn read_tile(runtime: &Runtime, tile: &Tile, columns: usize, kind: Kind, out: &mut Vec<f32>) -> Result<(), Error> {
    let layout = runtime.layout();
    // The whole weight is the master where there is one.
    let kind = if kind == Kind::Weight { layout.precision().master().unwrap_or(kind) } else { kind };
    let split = kind == Kind::Weight && layout.precision() == Precision::Bf16;
    let mut chunks = layout.group_chunks(tile.group, kind).to_vec();
    if split {
        chunks.extend_from_slice(layout.group_chunks(tile.group, Kind::Low));
    }
    let part = layout.part_elements();
    runtime.read(&chunks, |slices| {
        for element in tile.offset..tile.offset + tile.rows * columns {
            out.push(if split {
                let half = |slice: &[u8]| u16::from_ne_bytes([slice[2 * element], slice[2 * element + 1]]);
                join(half(slices[0]), half(slices[1]))
            } else {
                let (slice, inner) =
                    if slices.len() > 1 { (slices[element / part], element % part) } else { (slices[0], element) };
                let at = 4 * inner;
                f32::from_ne_bytes([slice[at], slice[at + 1], slice[at + 2], slice[at + 3]])
            });
        }
    })?;
    Ok(())
}
