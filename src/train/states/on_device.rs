//! Drawing a group's parameters in the memory of a GPU: nothing crosses the link, and no copy lies anywhere else meanwhile.

use patrickstar_actors::chunk::Tile;
use patrickstar_actors::cuda::sleep_until_done;
use patrickstar_actors::runtime::Runtime;
use patrickstar_actors::types::{GroupId, Precision, Tier};

use super::weight_chunks;
use crate::error::Error;
use crate::model::cuda::{CudaOps, Run, Target};
use crate::train::program::Program;

/// Draws the parameters of a group that stays on the device; false where it stays elsewhere.
pub(super) fn draw(
    runtime: &Runtime,
    program: &Program,
    ops: &CudaOps,
    group: GroupId,
    seed: u64,
) -> Result<bool, Error> {
    let chunks = weight_chunks(runtime, group);
    if runtime.home(&chunks) != Tier::Device {
        return Ok(false);
    }
    let layout = runtime.layout();
    runtime.initialise_on_device(&chunks, |addresses| {
        for tile in layout.group_tiles(group) {
            draw_tile(runtime, program, ops, tile, addresses, seed)?;
        }
        Ok::<(), Error>(sleep_until_done(ops.stream()).map_err(candle_core::Error::wrap)?)
    })?;
    Ok(true)
}

/// Elements of a tile lie in one chunk of weights, but for fp16 masters in as many as they fill.
fn draw_tile(
    runtime: &Runtime,
    program: &Program,
    ops: &CudaOps,
    tile: &Tile,
    addresses: &[*mut u8],
    seed: u64,
) -> Result<(), Error> {
    let layout = runtime.layout();
    let spec = &program.parameters[tile.tensor.0 as usize];
    let columns = layout.tensors()[tile.tensor.0 as usize].columns;
    let end = tile.offset + tile.rows * columns;
    let part = layout.part_elements();
    let mut from = tile.offset;
    while from < end {
        let place = |index: usize, element: usize, size: usize| addresses[index] as u64 + (element * size) as u64;
        let (to, target) = match layout.precision() {
            Precision::Fp32 => (end, Target::Fp32 { weight: place(0, from, 4) }),
            Precision::Bf16 => (end, Target::Bf16 { weight: place(0, from, 2), low: place(1, from, 2) }),
            Precision::Fp16 => {
                let master = place(1 + from / part, from % part, 4);
                (end.min((from / part + 1) * part), Target::Fp16 { weight: place(0, from, 2), master })
            }
        };
        let first = (tile.row_start * columns + from - tile.offset) as u64;
        ops.draw(&Run { init: spec.init, seed, name: &spec.name, first, count: to - from }, target)?;
        from = to;
    }
    Ok(())
}
