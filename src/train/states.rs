//! Filling and reading the chunks of a model: initial values, foreign weights, single parameters.

use patrickstar_actors::adam::{join, narrow_fp16, split_f32};
use patrickstar_actors::chunk::Tile;
use patrickstar_actors::runtime::Runtime;
use patrickstar_actors::types::{GroupId, Kind, Precision};
use rayon::prelude::*;

use super::program::Program;
use crate::error::Error;
use crate::model::rng;

/// Elements that a core draws in one go.
const DRAWN_AT_ONCE: usize = 1 << 16;

/// Draws every parameter from its own counter-based stream: the bits depend on seed and name, not on chunks.
pub(crate) fn initialise(runtime: &Runtime, program: &Program, seed: u64) -> Result<(), Error> {
    let columns: Vec<usize> = program.tensor_specs().iter().map(|spec| spec.columns).collect();
    let index = |name: &str| program.parameters.iter().position(|spec| spec.name == name).unwrap_or(0);
    initialise_from(runtime, program, |name, first_row, out| {
        let index = index(name);
        let (init, first) = (program.parameters[index].init, first_row * columns[index]);
        // Counters, not order, decide the numbers: all cores draw at once.
        out.par_chunks_mut(DRAWN_AT_ONCE).enumerate().for_each(|(piece, out)| {
            rng::fill(init, seed, name, (first + piece * DRAWN_AT_ONCE) as u64, out);
        });
        Ok(())
    })
}

/// Fills weights from `read(name, first_row, out)`; optimizer states begin at zero.
pub(crate) fn initialise_from(
    runtime: &Runtime,
    program: &Program,
    mut read: impl FnMut(&str, usize, &mut [f32]) -> Result<(), Error>,
) -> Result<(), Error> {
    let layout = runtime.layout();
    for group in (0..layout.group_count() as u32).map(GroupId) {
        let mut values = vec![0f32; layout.group_capacity()];
        for tile in layout.group_tiles(group) {
            let spec = &program.parameters[tile.tensor.0 as usize];
            let elements = tile.rows * layout.tensors()[tile.tensor.0 as usize].columns;
            read(&spec.name, tile.row_start, &mut values[tile.offset..tile.offset + elements])?;
        }
        for &kind in layout.precision().persistent_kinds() {
            for &chunk in layout.group_chunks(group, kind) {
                let first = layout.chunk(chunk).part as usize * layout.part_elements();
                runtime.initialise(chunk, |bytes| encode(kind, layout.precision(), &values[first..], bytes))?;
            }
        }
    }
    Ok(())
}

/// Writes the part of `values` that a chunk of `kind` holds.
fn encode(kind: Kind, precision: Precision, values: &[f32], bytes: &mut [u8]) {
    match (kind, precision) {
        (Kind::Weight, Precision::Fp32) => bytes.copy_from_slice(bytemuck::cast_slice(values)),
        (Kind::Weight, Precision::Bf16) => {
            for (out, &value) in bytes.chunks_exact_mut(2).zip(values) {
                out.copy_from_slice(&split_f32(value).0.to_ne_bytes());
            }
        }
        (Kind::Weight, Precision::Fp16) => {
            for (out, &value) in bytes.chunks_exact_mut(2).zip(values) {
                out.copy_from_slice(&narrow_fp16(value).to_ne_bytes());
            }
        }
        (Kind::Master, _) => {
            for (out, &value) in bytes.chunks_exact_mut(4).zip(values) {
                out.copy_from_slice(&value.to_ne_bytes());
            }
        }
        (Kind::Low, _) => {
            for (out, &value) in bytes.chunks_exact_mut(2).zip(values) {
                out.copy_from_slice(&split_f32(value).1.to_ne_bytes());
            }
        }
        _ => bytes.fill(0),
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
