//! Training of transformers larger than the device: model states live in chunks that move while the model computes.
//!
//! # Layout
//! - [`config`]: one typed configuration with the origin of every value.
//! - [`data`]: text to batches of tokens.
//! - [`model`]: blocks, parameters and the custom operations that consume weights.
//! - [`checkpoint`]: crash-safe files of model states.
//! - [`telemetry`]: TensorBoard events, traces, the report page, memory counters.

pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod data;
pub mod model;
pub mod telemetry;
