//! The chunk runtime of patrickstar: fixed-size chunks of model state move between tiers while a model computes.
//!
//! # Layout
//! - [`types`]: sizes, identities, tiers and kinds.
//! - [`chunk`]: where tensors lie in chunks, and the states of a chunk. Pure.
//! - [`schedule`]: moments, trace, eviction policies, prefetch. Pure.
//! - [`memory`]: arenas and slots of each tier.
//! - [`adam`]: the optimizer's arithmetic, with the same bits on every instruction set.
//! - [`timeline`]: what happened when.
//! - `table`, `moves`, `shared`: where every chunk is, what is on the way, and who leases it.
//! - `monitor`, `eviction`, `copy`, `reduction`, `optimizer`, `supervisor`: one actor a file; `shell` is the thin actix
//!   part that they have in common, `system` starts them. `planner` is the mind of `eviction`, `updates` the queue of
//!   `optimizer`.
//! - [`neighbours`]: who else uses the device, and how it is.
//! - `idle`: how long the device had nothing to do, and why.
//! - [`view`]: what observers on other threads see.
//! - [`runtime`]: the handle that a model uses.

pub mod adam;
pub mod ages;
mod capacity;
pub mod chunk;
mod copy;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod error;
mod eviction;
mod fill;
pub mod health;
mod idle;
pub mod memory;
pub mod monitor;
mod moves;
pub mod neighbours;
mod non_model;
mod optimizer;
mod placement;
mod planner;
mod reader;
mod reduction;
pub mod runtime;
pub mod schedule;
mod share;
mod shared;
mod shell;
mod split;
pub mod stats;
mod step;
mod supervisor;
mod system;
mod table;
pub mod timeline;
pub mod types;
mod untraced;
mod updates;
pub mod view;

pub use placement::{Side, Split, SplitCosts, SplitRoom, SplitWork, spread_sides};
pub use reader::ChunkReader;
pub use shared::{EvictionPolicy, Lease};
pub use system::Retune;
pub use table::Access;
