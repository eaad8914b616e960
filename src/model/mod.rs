//! Models as sequences of blocks, and the operations their blocks are made of.
//!
//! A block is the unit that is leased, recomputed and traced. Its weights are never autograd leaves: the
//! operations in [`ops`] read them from chunk memory and write their gradients straight into gradient chunks.

pub mod block;
pub mod compute;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod gpt2;
pub mod hf;
pub mod ops;
pub mod param;
pub mod rng;
pub mod tape;
