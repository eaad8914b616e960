//! Training: the engine that drives blocks through leases, and the session around it.

pub(crate) mod device;
mod drill;
pub mod engine;
mod inference;
pub mod loss_scale;
pub mod lr;
pub mod model;
mod observer;
pub mod pace;
pub(crate) mod passes;
pub mod phases;
pub mod program;
pub mod sample;
pub mod save;
pub mod session;
mod start;
mod stash;
mod states;
pub mod validation;
mod warmup;
#[cfg(feature = "cuda")]
mod watch;

pub use engine::{Batch, Engine, MicroBatch, StepReport};
