//! The chunk runtime of patrickstar: fixed-size chunks of model state move between tiers while a model computes.
//!
//! # Layout
//! - [`types`]: sizes, identities, tiers and kinds.
//! - [`chunk`]: where tensors lie in chunks, and the states of a chunk. Pure.
//! - [`schedule`]: moments, trace, eviction policies, prefetch. Pure.
//! - [`memory`]: arenas and slots of each tier.
//! - [`adam`]: the optimizer's arithmetic, with the same bits on every instruction set.
//! - [`timeline`]: what happened when.

pub mod adam;
pub mod chunk;
pub mod memory;
pub mod schedule;
pub mod timeline;
pub mod types;
