//! What a running session tells whoever started it, and when it asks.

use std::path::Path;
use std::time::Duration;

use patrickstar_actors::types::{Bytes, Step};

use super::engine::{Engine, StepReport};
use crate::error::Error;

/// What a caller sees of a running session.
pub trait Observer {
    /// A step is done.
    fn step(&mut self, report: &StepReport, session: &Progress);
    /// Something worth a line.
    fn message(&mut self, text: &str);
    /// A step is about to begin: the moment for new policies.
    fn before_step(&mut self, _engine: &Engine) -> Result<(), Error> {
        Ok(())
    }
    /// The states after the last step are about to be saved: a run that goes on from them will not repeat its steps.
    fn before_save(&mut self) -> Result<(), Error> {
        Ok(())
    }
    /// The states after `step` are safe on disk.
    fn saved(&mut self, _step: Step, _path: &Path) {}
}

/// Numbers for a progress line.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Tokens a second in this step.
    pub tokens_per_second: f64,
    /// Device memory in use, chunks and non-model.
    pub device_used: Bytes,
    /// Device memory given.
    pub device_budget: Bytes,
    /// Host memory in use by chunks.
    pub host_used: Bytes,
    /// Until all steps are done, at the pace of the latest ones; unknown after the first.
    pub time_left: Option<Duration>,
    /// Loss on validation data with the weights after this step, where it was due.
    pub valid_loss: Option<f64>,
}
