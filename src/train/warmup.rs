//! Activations of a user's own blocks. Nobody knows their sizes before a step has run, so the first one computes everything
//! again and is measured. From then on as many layers keep theirs as fit in what was set aside for activations, in steps of
//! batches that are no larger.

use patrickstar_actors::types::Bytes;

use super::engine::{Batch, Engine};
use crate::config::{Boundaries, Config, Recompute};
use crate::plan::Plan;

/// How much a step has to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    micro_batches: usize,
    /// Elements of the largest input, and those of its longest sequence or row.
    largest: usize,
    longest: usize,
}

impl Size {
    fn of(batch: &Batch) -> Self {
        let inputs = || batch.micro.iter().map(|micro| &micro.input);
        Size {
            micro_batches: batch.micro.len(),
            largest: inputs().map(|input| input.elem_count()).max().unwrap_or(0),
            longest: inputs().map(|input| input.dims().iter().skip(1).product()).max().unwrap_or(0),
        }
    }

    fn is_within(self, other: Size) -> bool {
        self.micro_batches <= other.micro_batches && self.largest <= other.largest && self.longest <= other.longest
    }
}

/// What the first step shows.
#[derive(Debug)]
pub(super) enum Warmup {
    /// It was not asked: activations are known, or nothing may be kept.
    Unasked,
    /// So far: the most that the passes of one block keep for their backward, all micro-batches together, and what those of the
    /// block at hand do.
    Measuring { most: u64, block: u64 },
    /// Layers keep activations of batches up to this size.
    Measured(Size),
}

impl Warmup {
    /// For a model that may keep activations and whose are not known. Buffers that are kept would hide what a block needs.
    pub fn of(config: &Config, plan: &Plan) -> Self {
        let may_keep = config.train.recompute == Recompute::Auto && config.train.boundaries != Boundaries::Host;
        if may_keep && !plan.knows_activations() && plan.buffers == Bytes(0) {
            Warmup::Measuring { most: 0, block: 0 }
        } else {
            Warmup::Unasked
        }
    }

    /// Whether passes are to be measured.
    pub fn is_measuring(&self) -> bool {
        matches!(self, Warmup::Measuring { .. })
    }

    /// A pass of the block keeps what lives after it and did not before.
    pub fn pass(&mut self, before: Bytes, after: Bytes) {
        if let Warmup::Measuring { block, .. } = self {
            *block += after.0.saturating_sub(before.0);
        }
    }

    /// The block's passes are over.
    pub fn end_block(&mut self) {
        if let Warmup::Measuring { most, block } = self {
            *most = (*most).max(std::mem::take(block));
        }
    }

    /// Whether the layers that keep activations may keep those of `batch`.
    pub fn may_keep(&self, batch: &Batch) -> bool {
        match self {
            Warmup::Unasked => true,
            Warmup::Measuring { .. } => false,
            Warmup::Measured(size) => Size::of(batch).is_within(*size),
        }
    }
}

impl Engine {
    /// After the passes of the first step, and before budgets follow what it was measured to need.
    pub(super) fn keep_what_fits(&mut self, batch: &Batch) {
        let Warmup::Measuring { most, .. } = self.warmup else { return };
        self.warmup = Warmup::Measured(Size::of(batch));
        let peak = Bytes(self.runtime.non_model_by_moment().into_iter().max().unwrap_or(0));
        let blocks = self.plan.keep_measured(&self.config, Bytes(most), peak);
        if blocks > 0 {
            self.runtime.expect_non_model(Bytes(most * u64::from(blocks)));
            tracing::info!(
                "{blocks} blocks keep their activations, {} each; the others compute them again",
                Bytes(most)
            );
        }
    }
}
