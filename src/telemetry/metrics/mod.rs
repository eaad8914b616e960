//! Metrics for Prometheus: names, the registries that hold series, and what a training publishes.
//!
//! - [`names`]: every metric, one enum a kind.
//! - [`registry`]: series of a job or of the process, their upkeep (`upkeep`, `process`) and their end.
//! - [`listener`]: the endpoint of `train --metrics`.
//! - [`training`]: fills the series of a job after each step; `chunks` and `memory` are parts of it, `live` fills those that
//!   change within a step.
//! - `device`: fills those of a GPU, now and then.
//! - [`merge`](fn@merge): one text out of several registries'.
//! - [`docs`] writes `docs/METRICS.md`.

mod chunks;
#[cfg(any(test, feature = "cuda"))]
mod device;
pub mod docs;
pub mod listener;
mod live;
mod memory;
mod merge;
pub mod names;
mod process;
pub mod registry;
pub mod training;
mod upkeep;

#[cfg(feature = "cuda")]
pub(crate) use device::show_device;
pub use merge::merge;
pub use names::{Counter, Gauge, Histogram};
pub use registry::{Registry, count, count_with, install, installed, render};
pub use training::TrainingMetrics;
