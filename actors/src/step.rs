//! What a step is done with, and what it cost.

use std::time::Duration;

use serde::Serialize;

use crate::stats::{Stats, TierUse};
use crate::types::{Bytes, Step};

/// What a step is done with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepStart {
    /// Which.
    pub step: Step,
    /// The update that it makes, counted without steps whose gradients overflowed: what Adam's corrections depend on.
    pub update: Step,
    /// Learning rate.
    pub lr: f64,
    /// Gradients are those of the loss times this, a power of two; 1 where the precision needs none.
    pub loss_scale: f32,
}

impl StepStart {
    /// A step of an unscaled loss.
    pub fn new(step: Step, lr: f64) -> Self {
        StepStart { step, update: step, lr, loss_scale: 1.0 }
    }
}

/// What a step cost.
#[derive(Clone, Debug, Serialize)]
pub struct StepStats {
    /// Which step.
    pub step: Step,
    /// Wall time from begin to end.
    pub elapsed: Duration,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Gradients of the scaled loss overflowed: nothing was updated.
    pub overflow: bool,
    /// Counters of this step.
    pub stats: Stats,
    /// Device memory: chunks and budget.
    pub device: TierUse,
    /// Host memory.
    pub host: TierUse,
    /// Highest non-model memory seen so far.
    pub non_model_peak: Bytes,
}
