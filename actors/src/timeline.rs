//! What happened when: spans of work on each track, and where every chunk was at each moment of a step.
//!
//! Recording is off until somebody asks for it, so that a long run pays one relaxed load per span.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::types::{Bytes, ChunkId, Kind, Moment, Tier};

/// The line of the trace on which a span is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Track {
    /// Forward and backward of blocks.
    Compute,
    /// The compute thread waiting for a lease.
    Stall,
    /// Copies from host to device.
    HostToDevice,
    /// Copies from device to host.
    DeviceToHost,
    /// Reads and writes of the disk tier.
    Disk,
    /// Gradient reduction.
    Reduction,
    /// Optimizer steps.
    Optimizer,
}

/// One piece of work: `start` and `end` count from the timeline's origin.
#[derive(Clone, Debug, Serialize)]
pub struct Span {
    /// Where it is drawn.
    pub track: Track,
    /// What was done, such as `forward h.3` or `fetch weight`.
    pub name: String,
    /// The chunk concerned, where there is one.
    pub chunk: Option<ChunkId>,
    /// The kind of that chunk.
    pub kind: Option<Kind>,
    /// Bytes moved, 0 for compute.
    pub bytes: Bytes,
    /// Begin.
    pub start: Duration,
    /// End.
    pub end: Duration,
}

/// Where every chunk was at one moment of the recorded step.
#[derive(Clone, Debug, Serialize)]
pub struct ResidencySnapshot {
    /// The moment.
    pub moment: Moment,
    /// What the compute thread was about to do, such as `backward h.3`.
    pub label: String,
    /// Nearest tier with a valid copy, indexed by `ChunkId`; `None` for a chunk without payload.
    pub tiers: Vec<Option<Tier>>,
    /// Chunk bytes in use per tier, indexed by `Tier::index`.
    pub used: [Bytes; 3],
    /// Non-model memory on the device.
    pub non_model: Bytes,
}

/// Collects spans and snapshots; shared by all actors.
pub struct Timeline {
    origin: Instant,
    enabled: AtomicBool,
    spans: Mutex<Vec<Span>>,
    snapshots: Mutex<Vec<ResidencySnapshot>>,
}

/// Spans kept at most: about 200 MB of trace; later ones are dropped so that a forgotten switch cannot eat the machine.
const MAX_SPANS: usize = 1_000_000;

impl Default for Timeline {
    fn default() -> Self {
        Timeline {
            origin: Instant::now(),
            enabled: AtomicBool::new(false),
            spans: Mutex::default(),
            snapshots: Mutex::default(),
        }
    }
}

impl Timeline {
    /// Turns recording on or off.
    pub fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::Relaxed);
    }

    /// Whether spans are recorded now.
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Time since the origin.
    pub fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Records a span that began at `start` and ends now; `name` is only built while recording.
    pub fn span(
        &self,
        track: Track,
        start: Duration,
        chunk: Option<(ChunkId, Kind)>,
        bytes: Bytes,
        name: impl FnOnce() -> String,
    ) {
        if !self.is_enabled() {
            return;
        }
        let end = self.now();
        let mut spans = lock(&self.spans);
        if spans.len() < MAX_SPANS {
            spans.push(Span {
                track,
                name: name(),
                chunk: chunk.map(|(id, _)| id),
                kind: chunk.map(|(_, kind)| kind),
                bytes,
                start,
                end,
            });
        }
    }

    /// Records where the chunks are.
    pub fn snapshot(&self, snapshot: ResidencySnapshot) {
        if self.is_enabled() {
            lock(&self.snapshots).push(snapshot);
        }
    }

    /// Takes what was recorded so far.
    pub fn take(&self) -> (Vec<Span>, Vec<ResidencySnapshot>) {
        (std::mem::take(&mut lock(&self.spans)), std::mem::take(&mut lock(&self.snapshots)))
    }
}

/// The lists stay well-formed whatever a panicking thread was doing, so poisoning carries no information.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
