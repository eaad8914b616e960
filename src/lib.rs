//! Training of transformers larger than the device: model states live in chunks that move while the model computes.
//!
//! # Layout
//! - [`cli`]: the commands, one file each.
//! - [`client`]: what `submit` and `jobs` say to a service.
//! - [`config`]: one typed configuration with the origin of every value.
//! - [`data`]: text to batches of tokens.
//! - [`model`]: blocks, parameters and the custom operations that consume weights.
//! - [`train`]: the engine and the session around it.
//! - [`plan`]: what a job will need, before anything is allocated.
//! - [`checkpoint`]: crash-safe files of model states.
//! - [`telemetry`]: TensorBoard events, traces, the report page, memory counters.

pub mod checkpoint;
pub mod cli;
pub mod client;
pub mod config;
pub mod data;
pub mod error;
pub mod model;
pub mod plan;
pub mod service;
pub mod telemetry;
pub mod train;

pub use config::Config;
pub use error::Error;
pub use model::block::{Block, Context, Init, ParameterSpec};
pub use model::param::Params;
pub use model::tape::Activation;
pub use train::{Batch, Engine, MicroBatch, StepReport};
