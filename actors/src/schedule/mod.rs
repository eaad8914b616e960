//! Moments, trace, eviction policies and prefetch. Pure: no I/O, no threads.
//!
//! - [`Trace`]: the accesses of a step, which repeats.
//! - [`choose_victim`]: which chunk leaves a full tier.
//! - [`plan_prefetch`]: which chunks to bring before they are asked for.
//! - [`simulate`]: what a policy costs on a trace.

mod policy;
mod prefetch;
mod simulate;
mod trace;

pub use policy::{Candidate, Policy, StaticSet, choose_victim};
pub use prefetch::{PrefetchAction, plan_prefetch};
pub use simulate::{Event, Setup, SimulationError, SimulationReport, simulate, simulate_observed};
pub use trace::{Trace, TraceRecorder};
