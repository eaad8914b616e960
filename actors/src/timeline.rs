//! What happened when: spans of work on each track, and where every chunk was at each moment of a step.
//!
//! Recording is off until somebody asks for it, so that a long run pays one relaxed load per span.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::memory::{Event, MemoryError};
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
    /// Inputs of blocks on their way to host memory.
    ActivationsOut,
    /// Inputs of blocks on their way back.
    ActivationsBack,
    /// Reads and writes of the disk tier.
    Disk,
    /// Gradient reduction.
    Reduction,
    /// Optimizer steps in host memory.
    Optimizer,
    /// Optimizer steps on the device, beside those.
    DeviceOptimizer,
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

/// Work that the device may not have done yet, between two points of its stream.
struct QueuedSpan {
    track: Track,
    name: String,
    bytes: Bytes,
    begin: Event,
    end: Event,
}

/// Collects spans and snapshots; shared by all actors.
pub struct Timeline {
    origin: Instant,
    enabled: AtomicBool,
    spans: Mutex<Vec<Span>>,
    queued: Mutex<Queued>,
    snapshots: Mutex<Vec<ResidencySnapshot>>,
}

/// Spans in the device's time, and where on the timeline one of its events lies.
#[derive(Default)]
struct Queued {
    anchor: Option<(Duration, Event)>,
    spans: Vec<QueuedSpan>,
}

/// Spans kept at most: about 200 MB of trace; later ones are dropped so that a forgotten switch cannot eat the machine.
const MAX_SPANS: usize = 1_000_000;

impl Default for Timeline {
    fn default() -> Self {
        Timeline {
            origin: Instant::now(),
            enabled: AtomicBool::new(false),
            spans: Mutex::default(),
            queued: Mutex::default(),
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

    /// Records a span that lasts on the device from `begin` to `end`. The first one waits for its end, so that the device's
    /// time is known in the timeline's.
    pub fn queued_span(
        &self,
        track: Track,
        name: String,
        bytes: Bytes,
        begin: Event,
        end: Event,
    ) -> Result<(), MemoryError> {
        let mut queued = lock(&self.queued);
        if queued.anchor.is_none() {
            end.synchronize()?;
            queued.anchor = Some((self.now(), Event::clone(&end)));
        }
        if queued.spans.len() < MAX_SPANS {
            queued.spans.push(QueuedSpan { track, name, bytes, begin, end });
        }
        Ok(())
    }

    /// The spans of the device's time, once it has passed them.
    fn resolve(&self, queued: Queued) -> Result<Vec<Span>, MemoryError> {
        let Some((at, anchor)) = queued.anchor else { return Ok(Vec::new()) };
        let mut spans = Vec::with_capacity(queued.spans.len());
        for QueuedSpan { track, name, bytes, begin, end } in queued.spans {
            end.synchronize()?;
            let (Some(since), Some(time)) = (end.elapsed_since(&anchor)?, end.elapsed_since(&begin)?) else { continue };
            let end = at + since;
            spans.push(Span { track, name, chunk: None, kind: None, bytes, start: end.saturating_sub(time), end });
        }
        Ok(spans)
    }

    /// Records where the chunks are.
    pub fn snapshot(&self, snapshot: ResidencySnapshot) {
        if self.is_enabled() {
            lock(&self.snapshots).push(snapshot);
        }
    }

    /// Takes what was recorded so far, after waiting for it.
    pub fn take(&self) -> Result<(Vec<Span>, Vec<ResidencySnapshot>), MemoryError> {
        let queued = std::mem::take(&mut *lock(&self.queued));
        let mut spans = self.resolve(queued)?;
        spans.append(&mut lock(&self.spans));
        spans.sort_by_key(|span| span.start);
        Ok((spans, std::mem::take(&mut lock(&self.snapshots))))
    }
}

/// The lists stay well-formed whatever a panicking thread was doing, so poisoning carries no information.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::any::Any;
    use std::sync::Arc;

    use super::*;
    use crate::memory::DeviceEvent;

    /// An event at a time of the device's own.
    struct At(Duration);

    impl DeviceEvent for At {
        fn is_complete(&self) -> Result<bool, MemoryError> {
            Ok(true)
        }

        fn synchronize(&self) -> Result<(), MemoryError> {
            Ok(())
        }

        fn elapsed_since(&self, earlier: &Event) -> Result<Option<Duration>, MemoryError> {
            let earlier: &dyn Any = earlier.as_ref();
            Ok(earlier.downcast_ref::<At>().map(|earlier| self.0.saturating_sub(earlier.0)))
        }
    }

    #[test]
    fn queued_work_is_drawn_where_the_device_did_it() {
        let at = |ms: u64| -> Event { Arc::new(At(Duration::from_millis(5_000 + ms))) };
        let timeline = Timeline::default();
        timeline.set_enabled(true);
        let before = timeline.now();
        // Both are queued at once; the device does the second one long after the first.
        timeline.queued_span(Track::Compute, "first".into(), Bytes(0), at(0), at(10)).unwrap();
        timeline.queued_span(Track::Compute, "second".into(), Bytes(7), at(50), at(80)).unwrap();
        let after = timeline.now();
        let (spans, _) = timeline.take().unwrap();
        let [first, second] = &spans[..] else { panic!("{spans:?}") };
        assert_eq!((first.name.as_str(), second.name.as_str()), ("first", "second"));
        assert!((before..=after).contains(&first.end), "{first:?}");
        assert_eq!(second.start - first.end, Duration::from_millis(40));
        assert_eq!((second.end - second.start, second.bytes), (Duration::from_millis(30), Bytes(7)));
        assert!(timeline.take().unwrap().0.is_empty());
    }
}
