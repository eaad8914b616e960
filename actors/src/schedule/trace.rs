//! The accesses of a step, recorded once; every step repeats them.

use std::collections::BTreeMap;

use crate::types::{ChunkId, Moment};

/// A step's accesses; cyclic, since the next step repeats them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    accesses: Vec<Vec<ChunkId>>,
    uses: BTreeMap<ChunkId, Vec<u32>>,
    /// Of what is read where it lies in host memory.
    uses_on_host: BTreeMap<ChunkId, Vec<u32>>,
}

/// Builds a [`Trace`] while a step runs.
#[derive(Clone, Debug, Default)]
pub struct TraceRecorder {
    trace: Trace,
}

impl TraceRecorder {
    /// An empty recorder.
    pub fn new() -> TraceRecorder {
        TraceRecorder::default()
    }

    /// Records that `chunks` are needed together; a chunk named twice counts once.
    pub fn access(&mut self, chunks: &[ChunkId]) -> Moment {
        let moment = self.trace.accesses.len() as u32;
        let mut access = Vec::with_capacity(chunks.len());
        for &chunk in chunks {
            let uses = self.trace.uses.entry(chunk).or_default();
            if uses.last() != Some(&moment) {
                uses.push(moment);
                access.push(chunk);
            }
        }
        self.trace.accesses.push(access);
        Moment(moment)
    }

    /// Records a moment that needs `chunks` in host memory, and nothing on the device.
    pub fn access_on_host(&mut self, chunks: &[ChunkId]) -> Moment {
        let moment = self.access(&[]);
        for &chunk in chunks {
            self.trace.uses_on_host.entry(chunk).or_default().push(moment.0);
        }
        moment
    }

    /// The trace of everything recorded.
    pub fn finish(self) -> Trace {
        self.trace
    }
}

impl Trace {
    /// Moments of a step.
    pub fn moments(&self) -> usize {
        self.accesses.len()
    }

    /// The chunks needed at `moment`; nothing past the end.
    pub fn at(&self, moment: Moment) -> &[ChunkId] {
        self.accesses.get(moment.0 as usize).map_or(&[], Vec::as_slice)
    }

    /// Moments until `chunk` is next needed, into the next step if it must be; `None` if it never is. With `inclusive`
    /// an access at `now` is at distance 0.
    pub fn distance_to_next_use(&self, chunk: ChunkId, now: Moment, inclusive: bool) -> Option<u32> {
        self.distance(self.uses.get(&chunk)?, now, inclusive)
    }

    /// As [`Trace::distance_to_next_use`], on the device or in host memory.
    pub fn distance_to_any_use(&self, chunk: ChunkId, now: Moment) -> Option<u32> {
        let uses = [&self.uses, &self.uses_on_host].into_iter().filter_map(|uses| uses.get(&chunk));
        uses.filter_map(|uses| self.distance(uses, now, false)).min()
    }

    fn distance(&self, uses: &[u32], now: Moment, inclusive: bool) -> Option<u32> {
        let index = uses.partition_point(|&moment| moment < now.0 || (!inclusive && moment == now.0));
        let wrapped = uses.first().map(|first| first + self.accesses.len() as u32);
        uses.get(index).copied().or(wrapped).map(|next| next.saturating_sub(now.0))
    }

    /// The first moment of a step that needs `chunk`.
    pub fn first_use(&self, chunk: ChunkId) -> Option<Moment> {
        self.uses.get(&chunk)?.first().copied().map(Moment)
    }

    /// All chunks of the trace, in order of number.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkId> + '_ {
        self.uses.keys().copied()
    }

    /// Chunks that are needed in host memory.
    pub fn chunks_on_host(&self) -> impl Iterator<Item = ChunkId> + '_ {
        self.uses_on_host.keys().copied()
    }

    /// The most chunks that one moment needs.
    pub fn largest_moment(&self) -> usize {
        self.accesses.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// The chunks of the next `depth` moments after `now`, each once, in order of use, with the distance.
    pub fn upcoming(&self, now: Moment, depth: u32) -> impl Iterator<Item = (u32, ChunkId)> + '_ {
        let moments = self.accesses.len() as u32;
        // Past one full step everything repeats.
        (1..=depth.min(moments)).flat_map(move |distance| {
            let chunks = self.at(Moment((now.0 + distance) % moments)).iter().copied();
            let first = move |chunk: &ChunkId| self.distance_to_next_use(*chunk, now, false) == Some(distance);
            chunks.filter(first).map(move |chunk| (distance, chunk))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_wrap_into_the_next_step() {
        let mut recorder = TraceRecorder::new();
        for moment in [&[0, 1][..], &[2, 2], &[0]] {
            recorder.access(&moment.iter().copied().map(ChunkId).collect::<Vec<_>>());
        }
        let trace = recorder.finish();
        let distance = |chunk, now, inclusive| trace.distance_to_next_use(ChunkId(chunk), Moment(now), inclusive);
        assert_eq!((distance(0, 0, true), distance(0, 0, false), distance(0, 2, false)), (Some(0), Some(2), Some(1)));
        assert_eq!((distance(1, 0, false), distance(1, 1, false), distance(9, 0, true)), (Some(3), Some(2), None));
        assert_eq!(trace.at(Moment(1)), &[ChunkId(2)]);
        assert_eq!(trace.first_use(ChunkId(2)), Some(Moment(1)));
        let upcoming: Vec<_> = trace.upcoming(Moment(1), 9).map(|(distance, chunk)| (distance, chunk.0)).collect();
        assert_eq!(upcoming, [(1, 0), (2, 1), (3, 2)]);
        assert_eq!(TraceRecorder::new().finish().upcoming(Moment(0), 5).count(), 0);
    }

    #[test]
    fn what_is_read_in_host_memory_is_not_needed_on_the_device() {
        let mut recorder = TraceRecorder::new();
        recorder.access_on_host(&[ChunkId(0), ChunkId(1)]);
        recorder.access(&[ChunkId(1)]);
        recorder.access(&[ChunkId(2)]);
        let trace = recorder.finish();
        assert_eq!((trace.moments(), trace.at(Moment(0)), trace.chunks().count()), (3, &[][..], 2));
        assert_eq!(trace.chunks_on_host().collect::<Vec<_>>(), [ChunkId(0), ChunkId(1)]);
        assert_eq!(trace.distance_to_next_use(ChunkId(0), Moment(1), false), None);
        assert_eq!(trace.distance_to_any_use(ChunkId(0), Moment(1)), Some(2));
        assert_eq!(trace.distance_to_any_use(ChunkId(1), Moment(0)), Some(1));
        assert_eq!(trace.distance_to_any_use(ChunkId(2), Moment(0)), Some(2));
    }
}
