//! What a run records about itself: TensorBoard events, a trace, a report page, memory counters, metrics.

pub mod alloc;
pub mod build;
pub mod logging;
pub mod metrics;
pub mod peak;
pub(crate) mod periodic;
pub mod report;
pub mod tensorboard;
pub mod trace;
