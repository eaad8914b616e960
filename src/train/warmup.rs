//! Activations of a user's own blocks. Nobody knows their sizes before a step has run, so the first one computes everything
//! again and is measured. From then on as many layers keep theirs as fit in what was set aside for activations.

use patrickstar_actors::types::Bytes;

use super::engine::Engine;
use crate::config::{Boundaries, Config, Recompute};
use crate::plan::Plan;

/// What the first step shows.
#[derive(Default)]
pub(super) struct Warmup {
    /// The most that the passes of one block keep for their backward, all micro-batches together.
    most: u64,
    /// Of the block at hand, so far.
    block: u64,
}

impl Warmup {
    /// For a model that may keep activations and whose are not known.
    pub fn of(config: &Config, plan: &Plan) -> Option<Self> {
        let may_keep = config.train.recompute == Recompute::Auto && config.train.boundaries != Boundaries::Host;
        (may_keep && !plan.knows_activations()).then(Warmup::default)
    }

    /// A pass of the block keeps what lives after it and did not before.
    pub fn pass(&mut self, before: Bytes, after: Bytes) {
        self.block += after.0.saturating_sub(before.0);
    }

    /// The block's passes are over.
    pub fn end_block(&mut self) {
        self.most = self.most.max(std::mem::take(&mut self.block));
    }
}

impl Engine {
    /// After the passes of the first step, and before budgets follow what it was measured to need.
    pub(super) fn keep_what_fits(&mut self) {
        let Some(warmup) = self.warmup.take() else { return };
        let each = Bytes(warmup.most);
        let peak = Bytes(self.runtime.non_model_by_moment().into_iter().max().unwrap_or(0));
        let layers = self.plan.keep_measured(&self.config, each, peak);
        if layers > 0 {
            self.runtime.expect_non_model(Bytes(each.0 * u64::from(layers)));
            tracing::info!("{layers} layers keep their activations, {each} each; the others compute them again");
        }
    }
}
