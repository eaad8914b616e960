//! Where tensors lie in chunks, and the states a chunk goes through. Pure: no I/O, no threads.
//!
//! - [`layout`](Layout): packs tensors into groups of equally sized chunks.
//! - [`search`](search_chunk_size): picks the chunk size for a model.
//! - [`state`](ChunkState): which transitions a chunk may make.

mod layout;
mod search;
mod state;

pub use layout::{CHUNK_ALIGNMENT, ChunkInfo, Layout, LayoutError, TILE_ALIGNMENT, TensorSpec, Tile};
pub use search::{Candidate, SearchLimits, SearchReport, search_chunk_size};
pub use state::{ChunkEvent, ChunkState, HeldState, IllegalTransition, Pass};
