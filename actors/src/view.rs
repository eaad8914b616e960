//! What an observer on another thread sees of a running training: where every chunk is, and how the actors are.

use std::sync::{Arc, Weak};

use serde::Serialize;

use crate::ages::Ages;
use crate::health::ActorStatus;
use crate::memory::{Event, MemoryError};
use crate::monitor::MemoryProbe;
use crate::runtime::Runtime;
use crate::shared::{EvictionPolicy, Shared};
use crate::stats::TierUse;
use crate::table::Table;
use crate::timeline::Timeline;
use crate::types::{Bytes, ChunkId, GroupId, Kind, Moment, Step, Tier};

/// Looks at a runtime from any thread. It keeps nothing alive: when the runtime has gone there is nothing to see.
#[derive(Clone)]
pub struct RuntimeView {
    pub(crate) shared: Weak<Shared>,
    pub(crate) probe: Arc<dyn MemoryProbe>,
}

/// All chunks at one instant.
#[derive(Clone, Debug, Serialize)]
pub struct Residency {
    /// The step that runs, or ran last.
    pub step: Step,
    /// How far it has got.
    pub moment: Moment,
    /// By `Tier::index`.
    pub tiers: [TierUse; 3],
    /// Bytes in each, by `Tier::index` and `Kind::index`: a chunk with copies in two tiers counts in both.
    pub by_kind: [[u64; 6]; 3],
    /// Device memory that is not chunks.
    pub non_model: Bytes,
    /// Size of every chunk.
    pub chunk_bytes: Bytes,
    /// By `ChunkId`.
    pub chunks: Vec<ChunkView>,
}

/// One chunk.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ChunkView {
    /// Which.
    pub id: ChunkId,
    /// What it holds.
    pub kind: Kind,
    /// Whose.
    pub group: GroupId,
    /// The nearest tier with a valid copy; `None` for a chunk without contents, or on its first way.
    pub tier: Option<Tier>,
    /// As [`crate::chunk::ChunkState::name`].
    pub state: &'static str,
}

impl Runtime {
    /// What another thread may look at while training goes on.
    pub fn view(&self) -> RuntimeView {
        RuntimeView { shared: Arc::downgrade(&self.shared), probe: Arc::clone(&self.probe) }
    }

    /// State of the actors.
    pub fn actors(&self) -> Vec<ActorStatus> {
        self.shared.health.status()
    }

    /// How long chunks stayed on the device and lay idle there, since the last call.
    pub fn take_ages(&self) -> Ages {
        std::mem::take(&mut self.shared.lock().ages)
    }

    /// The end of what the model has queued so far; `None` where it computes while it is called.
    pub fn mark(&self) -> Result<Option<Event>, MemoryError> {
        self.shared.backend.compute_event()
    }

    /// The policies in force.
    pub fn policies(&self) -> EvictionPolicy {
        self.shared.policies()
    }
}

impl RuntimeView {
    /// Where every chunk is. The table is locked for microseconds: nobody has to wait for an observer.
    pub fn residency(&self) -> Option<Residency> {
        let shared = self.shared.upgrade()?;
        let non_model = self.probe.live();
        let chunk_bytes = shared.chunk_bytes();
        let table = shared.lock();
        let chunks = shared.layout.chunks().iter().map(|info| ChunkView {
            id: info.id,
            kind: info.kind,
            group: info.group,
            tier: table.nearest_valid(info.id).map(|(tier, _)| tier),
            state: table.entry(info.id).state.name(),
        });
        Some(Residency {
            step: table.step,
            moment: table.now,
            tiers: Tier::ALL.map(|tier| table.tier_use(tier)),
            by_kind: table.use_by_kind(&shared.layout),
            non_model,
            chunk_bytes,
            chunks: chunks.collect(),
        })
    }

    /// What is recorded of its work.
    pub fn timeline(&self) -> Option<Arc<Timeline>> {
        Some(Arc::clone(&self.shared.upgrade()?.timeline))
    }

    /// The actors.
    pub fn actors(&self) -> Option<Vec<ActorStatus>> {
        Some(self.shared.upgrade()?.health.status())
    }

    /// A number that grows as long as chunks are used or move: if it stands still, so does the training.
    pub fn progress(&self) -> Option<u64> {
        Some(self.shared.upgrade()?.lock().tick)
    }
}

impl Table {
    /// Use of a tier.
    pub fn tier_use(&self, tier: Tier) -> TierUse {
        let bytes = |slots: u32| Bytes(u64::from(slots) * self.chunk_bytes.0);
        TierUse {
            used: bytes(self.used(tier)),
            peak: bytes(self.peak[tier.index()]),
            budget: bytes(self.budget[tier.index()]),
            capacity: bytes(match tier {
                Tier::Device => self.backed,
                Tier::Host | Tier::Disk => self.slots[tier.index()].capacity(),
            }),
        }
    }
}
