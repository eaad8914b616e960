//! Gradient reduction: takes each gradient as it is finished, checks and measures it, and hands its group to the optimizer.
//!
//! The global norm must not depend on chunk size or on the order of arrival. So squares are summed row by row (a row is
//! never split between chunks) in a fixed order inside a row, and rows are summed in definition order at the end.

#![expect(unsafe_code, reason = "reads leased chunks by address")]

use std::sync::Arc;

use rayon::prelude::*;

use crate::adam::{StepScalars, sum_of_squares, sum_of_squares_bf16, sum_of_squares_fp16};
use crate::chunk::{Pass, Tile};
use crate::error::RuntimeError;
use crate::health::ActorName;
use crate::memory::Rows;
use crate::runtime::StepStart;
use crate::shared::{Lease, Shared};
use crate::table::{Access, Requester};
use crate::timeline::Track;
use crate::types::{Bytes, GroupId, Kind, Precision, Step, Tier};

/// A gradient is complete: all uses of the group have been accumulated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GradientReady {
    pub step: StepStart,
    pub group: GroupId,
}

/// Update this group now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepGroup {
    pub step: Step,
    pub group: GroupId,
    /// `None`: the gradients overflowed, so the group is left as it is.
    pub scalars: Option<StepScalars>,
}

/// Reduces gradients; see the module's page.
pub(crate) struct Reduction {
    shared: Arc<Shared>,
}

/// PyTorch's `clip_grad_norm_` adds this to the norm before dividing.
const CLIP_EPSILON: f64 = 1e-6;

impl Reduction {
    pub fn new(shared: Arc<Shared>) -> Self {
        Reduction { shared }
    }

    pub fn run(&mut self, message: GradientReady) -> Result<(), RuntimeError> {
        let index = message.group.0 as usize;
        if self.shared.ledger().partials[index].is_none() {
            let partials = self.measure(message.group)?;
            self.shared.health.fault_point(ActorName::Reduction);
            let finite = partials.iter().flatten().all(|sum| sum.is_finite());
            if !finite && !self.scales_loss() {
                return Err(RuntimeError::NonFinite { group: message.group, step: message.step.step });
            }
            let mut ledger = self.shared.ledger();
            ledger.overflow |= !finite;
            ledger.partials[index] = Some(partials);
        }
        self.shared.lock().group_mut(message.group).measured = true;
        let complete = self.shared.ledger().partials.iter().all(Option::is_some);
        let loss_scale = f64::from(message.step.loss_scale);
        if complete {
            self.finish_norm(loss_scale);
        }
        if !self.shared.steps_together() {
            self.hand_over(message, message.group, Some(1.0 / loss_scale));
        } else if complete {
            let (norm, overflow) = {
                let ledger = self.shared.ledger();
                (ledger.norm.unwrap_or(0.0), ledger.overflow)
            };
            let clip = self.shared.clip_norm;
            let clipped = if clip > 0.0 { (clip / (norm + CLIP_EPSILON)).min(1.0) } else { 1.0 };
            let scale = (!overflow).then_some(clipped / loss_scale);
            for group in 0..self.shared.layout.group_count() as u32 {
                self.hand_over(message, GroupId(group), scale);
            }
        }
        if complete {
            self.shared.ledger().finished = true;
            self.shared.changed.notify_all();
        }
        Ok(())
    }

    fn measure(&self, group: GroupId) -> Result<Vec<Vec<f64>>, RuntimeError> {
        let lease = self.lease_where_it_is(group)?;
        let start = self.shared.timeline.now();
        let sums = self.row_sums(&lease, self.shared.layout.group_tiles(group))?;
        self.shared.timeline.span(Track::Reduction, start, None, Bytes(0), || format!("reduce {group}"));
        lease.release(Pass::Backward)?;
        Ok(sums)
    }

    fn row_sums(&self, lease: &Lease, tiles: &[Tile]) -> Result<Vec<Vec<f64>>, RuntimeError> {
        let layout = &self.shared.layout;
        let precision = layout.precision();
        let size = if precision.is_half() { 2 } else { 4 };
        let rows: Vec<Rows> = tiles
            .iter()
            .map(|tile| Rows {
                gradient: lease.address(0).wrapping_add(tile.offset * size),
                rows: tile.rows,
                columns: layout.tensors()[tile.tensor.0 as usize].columns,
            })
            .collect();
        if let Some(math) = self.shared.math.as_deref().filter(|_| lease.tier() == Tier::Device) {
            // SAFETY: the layout puts the tiles inside the leased gradient chunk.
            return Ok(unsafe { math.row_sums(precision, &rows)? });
        }
        // SAFETY: as above.
        Ok(rows.iter().map(|rows| unsafe { row_sums_on_host(precision, rows) }).collect())
    }

    /// A gradient is measured in the tier where it lies, so that reducing never moves a chunk.
    fn lease_where_it_is(&self, group: GroupId) -> Result<Lease, RuntimeError> {
        let chunks: Vec<_> =
            self.shared.layout.group_chunks(group, Kind::Gradient).iter().map(|&chunk| (chunk, Access::Read)).collect();
        let tier = {
            let table = self.shared.lock();
            let chunk = chunks.first().map(|&(chunk, _)| chunk);
            let moving_to = chunk
                .and_then(|chunk| table.entry(chunk).moving)
                .and_then(|id| table.moves.get(&id))
                .map(|moving| moving.to.0);
            let valid = chunk.and_then(|chunk| table.nearest_valid(chunk)).map(|(tier, _)| tier);
            match moving_to.or(valid) {
                Some(Tier::Device) => Tier::Device,
                _ => Tier::Host,
            }
        };
        self.shared.lease(Requester::Reduction, tier, chunks)
    }

    fn scales_loss(&self) -> bool {
        self.shared.layout.precision().scales_loss()
    }

    /// Gradients are those of the loss times `loss_scale`.
    fn finish_norm(&self, loss_scale: f64) {
        let mut ledger = self.shared.ledger();
        // Tensors in definition order, their rows in order: tiles lie in this order within and across groups.
        let sum: f64 = ledger.partials.iter().flatten().flatten().flatten().fold(0.0, |sum, &row| sum + row);
        ledger.norm = Some(sum.sqrt() / loss_scale);
    }

    fn hand_over(&self, message: GradientReady, group: GroupId, scale: Option<f64>) {
        let StepStart { step, update, lr, .. } = message.step;
        let scalars = scale.map(|scale| StepScalars::new(&self.shared.adam, lr, update, scale as f32));
        self.shared.hand_over(StepGroup { step, group, scalars });
    }
}

/// # Safety
/// `gradient` must have `rows * columns` elements of `precision`, which nobody writes.
unsafe fn row_sums_on_host(precision: Precision, &Rows { gradient, rows, columns }: &Rows) -> Vec<f64> {
    let elements = rows * columns;
    match precision {
        Precision::Fp32 => {
            // SAFETY: by this function's contract.
            let gradient = unsafe { std::slice::from_raw_parts(gradient.cast::<f32>(), elements) };
            gradient.par_chunks(columns).map(sum_of_squares).collect()
        }
        Precision::Bf16 => {
            // SAFETY: as above.
            let gradient = unsafe { std::slice::from_raw_parts(gradient.cast::<u16>(), elements) };
            gradient.par_chunks(columns).map(sum_of_squares_bf16).collect()
        }
        Precision::Fp16 => {
            // SAFETY: as above.
            let gradient = unsafe { std::slice::from_raw_parts(gradient.cast::<u16>(), elements) };
            gradient.par_chunks(columns).map(sum_of_squares_fp16).collect()
        }
    }
}
