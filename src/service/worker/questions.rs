//! What the service may ask a worker while it trains, and what the worker says.

use patrickstar_actors::types::{Kind, Tier};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Asked at any time; the answer does not wait for the step that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// Where is every chunk?
    Chunks,
    /// How are the actors?
    Actors,
    /// What do Prometheus' metrics say?
    Metrics,
    /// Record what happens from now on.
    StartTrace,
    /// Write what was recorded to [`super::TRACE_FILE`].
    StopTrace,
}

/// What a worker says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The model is still being set up.
    NotReady,
    /// Every chunk.
    Chunks(ChunkMap),
    /// The actors.
    Actors(Vec<ActorState>),
    /// All series of the job, as Prometheus reads them.
    Metrics(String),
    /// A recording began, or was written.
    Traced {
        /// Pieces of work in it.
        spans: u64,
    },
    /// It did not work.
    Failed(String),
}

/// All chunks of a job at one instant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChunkMap {
    /// The step that runs.
    pub step: u64,
    /// How far it has got.
    pub moment: u32,
    /// Device, host and disk.
    pub tiers: Vec<TierState>,
    /// In the order of the layout.
    pub chunks: Vec<ChunkPlace>,
}

/// One tier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TierState {
    /// Which.
    #[schema(value_type = String, example = "device")]
    pub tier: Tier,
    /// Bytes of its slots.
    pub capacity_bytes: u64,
    /// Bytes of slots that chunks may use now.
    pub budget_bytes: u64,
    /// Bytes of slots in use.
    pub used_bytes: u64,
    /// Bytes in use by what is not chunks, where that is measured.
    pub non_model_bytes: u64,
}

/// One chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ChunkPlace {
    /// Its number in the layout.
    pub id: u32,
    /// What it holds.
    #[schema(value_type = String, example = "weight")]
    pub kind: Kind,
    /// The group whose states it holds.
    pub group: u32,
    /// The nearest tier with a valid copy, if there is one.
    #[schema(value_type = Option<String>)]
    pub tier: Option<Tier>,
    /// Its size.
    pub bytes: u64,
    /// Free, compute, hold, hold_after_forward, hold_after_backward, move or released.
    pub state: String,
}

/// One actor of a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ActorState {
    /// Which.
    pub name: String,
    /// Running, restoring or failed.
    pub state: String,
    /// Messages that wait for it.
    pub mailbox: u64,
    /// Times that it was restored after a panic.
    pub restarts: u64,
    /// Messages that it has handled.
    pub processed: u64,
    /// What its last panic said.
    pub last_fault: Option<String>,
}
