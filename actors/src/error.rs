//! What can go wrong in the runtime. Every message says what to do.

use thiserror::Error;

use crate::chunk::{IllegalTransition, LayoutError};
use crate::memory::MemoryError;
use crate::types::{Bytes, ChunkId, GroupId, Step, Tier};

/// Errors of the chunk runtime.
#[derive(Debug, Error, Clone)]
pub enum RuntimeError {
    /// The model does not fit the chunk size.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A tier could not be set up or read.
    #[error("{0}")]
    Memory(String),
    /// No slot can be freed for a request.
    #[error(
        "{tier} memory is exhausted: {need} more slots of {slot} are needed, {have} can be freed; raise memory.{tier} or lower memory.chunk"
    )]
    OutOfSlots {
        /// Tier that is full.
        tier: Tier,
        /// Slots missing.
        need: u32,
        /// Slots that could be freed.
        have: u32,
        /// Size of a slot.
        slot: Bytes,
    },
    /// A state machine was violated: a bug, reported instead of corrupting a chunk.
    #[error("{chunk}: {source}; please report this")]
    Transition {
        /// The chunk concerned.
        chunk: ChunkId,
        /// The transition refused.
        source: IllegalTransition,
    },
    /// A request named a chunk that holds nothing.
    #[error("{0} holds no data: initialise it before the first step")]
    NoPayload(ChunkId),
    /// Gradients overflowed; nothing was stepped with them.
    #[error(
        "the gradient of {group} is not finite in step {}: lower train.lr or set train.clip_norm, and resume from the last checkpoint",
        step.0
    )]
    NonFinite {
        /// Group whose gradient is not finite.
        group: GroupId,
        /// Step in which it happened.
        step: Step,
    },
    /// An actor kept failing after restarts.
    #[error("actor {actor} failed {times} times in a row, last with: {message}")]
    ActorFailed {
        /// Actor's name.
        actor: &'static str,
        /// Restarts in a row.
        times: u32,
        /// Last panic message.
        message: String,
    },
    /// A call came at the wrong time.
    #[error("{0}")]
    Misuse(String),
    /// The operating system refused a thread or a channel was closed.
    #[error("the runtime stopped: {0}")]
    Stopped(String),
}

impl From<MemoryError> for RuntimeError {
    fn from(error: MemoryError) -> Self {
        RuntimeError::Memory(error.to_string())
    }
}
