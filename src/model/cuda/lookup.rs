//! Tables that lie in host memory: rows are gathered there and come to the device through pinned memory, gradients go there
//! and are summed in the order of `embedding.cu`.

#![expect(unsafe_code, reason = "takes the only slice of a gradient")]

use candle_core::{DType, Result, Tensor};
use half::{bf16, f16};
use patrickstar_actors::adam::widen_fp16;
use rayon::prelude::*;

use super::embedding::{SEGMENT, dtype_of};
use super::ops::CudaOps;
use crate::model::ops::lookup::{self, ByToken};
use crate::model::param::{Param, ParamTile};

/// Bytes that are worth a task of their own.
const GRAIN: usize = 64 << 10;

impl CudaOps {
    /// Rows of `table` for `ids`, of shape `dims` and the width of the table.
    pub(super) fn gather(&self, ids: &[u32], dims: &[usize], table: &Param) -> Result<Tensor> {
        let rows = self.uninitialised([dims, &[table.columns()]].concat(), dtype_of(table.precision()))?;
        let bytes = rows.elem_count() * rows.dtype().size_in_bytes();
        // SAFETY: the tensor was just made for these rows; its memory is freed in the order of the stream.
        unsafe {
            self.bring(bytes, self.address(&rows)?, |place| {
                lookup::gather(table, ids, place, |row, place| place.copy_from_slice(row.bytes()))
            })?;
        }
        Ok(rows)
    }

    /// Adds the rows of `dy` to the gradient of `table` in host memory, when the device has computed them.
    pub(super) fn add_gathered(&self, dy: &Tensor, by_token: &ByToken, table: &Param) -> Result<()> {
        let (dtype, bytes) = (dy.dtype(), dy.elem_count() * dy.dtype().size_in_bytes());
        // SAFETY: a contiguous tensor of so many bytes.
        unsafe {
            self.fetch(self.address(dy)?, bytes, |bytes| match dtype {
                DType::BF16 => {
                    lookup::add_by_token(table, by_token, SEGMENT, bytemuck::cast_slice(bytes), |value: &bf16| {
                        value.to_f32()
                    })
                }
                DType::F16 => {
                    lookup::add_by_token(table, by_token, SEGMENT, bytemuck::cast_slice(bytes), |value: &f16| {
                        widen_fp16(value.to_bits())
                    })
                }
                _ => lookup::add_by_token(table, by_token, SEGMENT, bytemuck::cast_slice(bytes), |&value: &f32| value),
            })
        }
    }

    /// The first rows of `table` on a visit to the device, with the tensor that holds them.
    pub(super) fn visiting_rows(&self, rows: usize, table: &Param) -> Result<(Tensor, ParamTile)> {
        let ids: Vec<u32> = (0..rows as u32).collect();
        let visiting = self.gather(&ids, &[rows], table)?;
        let weight = self.address(&visiting)? as *const u8;
        Ok((visiting, ParamTile { row_start: 0, rows, weight, gradient: std::ptr::null_mut() }))
    }

    /// Passes the gradient of the first rows of `table` to `add`, on a visit to the device.
    pub(super) fn visit_gradient(
        &self,
        rows: usize,
        table: &Param,
        add: impl FnOnce(&ParamTile) -> Result<()>,
    ) -> Result<()> {
        let (width, dtype) = (table.columns(), dtype_of(table.precision()));
        let visiting = self.uninitialised((rows, width), dtype)?;
        let (address, row_bytes) = (self.address(&visiting)?, width * dtype.size_in_bytes());
        let bytes = rows * row_bytes;
        // The rows of each tile: where they lie in the window.
        let windows: Vec<std::ops::Range<usize>> = (table.tiles().iter())
            .map(|tile| tile.row_start.min(rows) * row_bytes..(tile.row_start + tile.rows).min(rows) * row_bytes)
            .collect();
        let mut wanted = false;
        let each = |copy: &mut dyn FnMut(std::ops::Range<usize>, &mut [u8])| -> Result<()> {
            for (tile, window) in windows.iter().enumerate() {
                // SAFETY: this is the only slice of the tile's gradient: operations run one after another on the compute
                // thread.
                if let Some(gradient) = unsafe { table.gradient(tile)? } {
                    let length = window.len();
                    copy(window.clone(), &mut gradient.bytes()[..length]);
                }
            }
            Ok(())
        };
        // SAFETY: the tensor was just made for these rows; its memory is freed in the order of the stream.
        unsafe {
            self.bring(bytes, address, |place| {
                each(&mut |window, gradient| {
                    wanted = true;
                    copy(gradient, &mut place[window]);
                })
            })?;
        }
        if !wanted {
            return Ok(());
        }
        add(&ParamTile { row_start: 0, rows, weight: std::ptr::null(), gradient: address as *mut u8 })?;
        // SAFETY: as above.
        unsafe {
            self.fetch(address, bytes, |window_bytes| {
                each(&mut |window, gradient| copy(&window_bytes[window], gradient))
            })
        }
    }
}

/// As `copy_from_slice`, by all cores.
fn copy(from: &[u8], to: &mut [u8]) {
    to.par_chunks_mut(GRAIN).zip(from.par_chunks(GRAIN)).for_each(|(to, from)| to.copy_from_slice(from));
}
