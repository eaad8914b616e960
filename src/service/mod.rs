//! Training as a long-lived service: an HTTP interface, a database, and workers that are separate processes.
//!
//! A worker may run out of memory, lose its device or be killed; this process goes on, and so does the job from its last
//! checkpoint. This process may be killed too: what it has answered is in the database, and a new one goes on from there.
//!
//! # Layout
//! - [`store`]: what must not be forgotten.
//! - [`worker`]: the process that trains one job, and the words it exchanges with the service.
//! - [`supervisor`]: which job trains when.
//! - [`sampler`]: the process that writes texts with a trained model; `samplers` starts, shares and ends them.
//! - `child`: how both kinds of processes are started.
//! - `api`: the HTTP interface; `request`, `hyperparameters`, `presets` and `directories` make a client's wishes into a
//!   configuration, and `bounds` refuses those that are beyond reason.
//! - [`tokens`], [`settings`]: who may do what, and how much of it.
//! - `live`: the configuration that jobs begin with, and how it changes; `rate`: how much one client may ask.
//! - `notify`: what systemd is told.
//! - `serve`: start and end of it all.

mod api;
mod bounds;
mod child;
pub mod directories;
pub mod error;
mod hyperparameters;
mod live;
mod notify;
mod presets;
mod rate;
mod request;
pub mod sampler;
mod samplers;
mod serve;
pub mod settings;
pub mod store;
pub mod supervisor;
pub mod tokens;
pub mod worker;

pub use api::openapi;
pub(crate) use presets::preset_of_shape;
pub(crate) use request::is_reserved;
pub use serve::serve;
