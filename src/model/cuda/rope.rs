//! Rotary position embedding on a packed buffer of heads.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{Result, Tensor};
use patrickstar_actors::cuda::{Arg, Grid};

use super::ops::{CudaOps, kernel};
use crate::model::ops::Rope;

/// Rows that a block takes at once.
const ROWS: u64 = 4;

/// Tables in device memory by base and rotated elements.
pub(super) type Tables = Mutex<BTreeMap<(u64, usize), Table>>;

/// Cosines and sines of the first positions, each (positions, rotary_dim / 2).
#[derive(Clone)]
pub(super) struct Table {
    positions: usize,
    cos: Tensor,
    sin: Tensor,
}

impl CudaOps {
    /// A copy of `x` (batch, time, columns) whose first heads are rotated forth (`direction` 1) or back (-1).
    pub(crate) fn rope(&self, x: &Tensor, rope: &Rope, direction: i32) -> Result<Tensor> {
        let (batch, time, columns) = x.dims3()?;
        let (rows, dtype) = ((batch * time) as u64, x.dtype());
        let table = self.rope_table(rope, time)?;
        // The input of an operation and the gradient of a result may be somebody else's as well.
        let y = self.uninitialised(x.shape(), dtype)?;
        let args = [
            self.pointer(x)?,
            self.pointer(&y)?,
            self.pointer(&table.cos)?,
            self.pointer(&table.sin)?,
            // Positions are indices in time.
            Arg::Pointer(0),
            Arg::U64(rows),
            Arg::I32(time as i32),
            Arg::I32(columns as i32),
            Arg::I32(rope.heads as i32),
            Arg::I32(rope.head_dim as i32),
            Arg::I32(rope.rotary_dim as i32),
            Arg::I32(rope.interleaved.into()),
            Arg::I32(direction),
        ];
        self.launch(&self.rope, kernel!(dtype, "rope"), Grid::linear(rows.div_ceil(ROWS), 256), &args)?;
        Ok(y)
    }

    /// A table of `time` positions or more, copied to the device when a call needs more of them than any before.
    fn rope_table(&self, rope: &Rope, time: usize) -> Result<Table> {
        let mut tables = self.rope_tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = tables.get(&rope.key()).filter(|table| table.positions >= time) {
            return Ok(table.clone());
        }
        let angles = rope.angles(time);
        // Uploads are of 32-bit numbers, whatever they mean.
        let upload = |values: &[f32]| self.upload(bytemuck::cast_slice(values));
        let table = Table { positions: angles.positions, cos: upload(&angles.cos)?, sin: upload(&angles.sin)? };
        tables.insert(rope.key(), table.clone());
        Ok(table)
    }
}
