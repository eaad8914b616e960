//! Which chunks to bring before they are asked for.

use super::trace::Trace;
use crate::types::{ChunkId, Moment};

/// A chunk to bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefetchAction {
    /// The chunk.
    pub chunk: ChunkId,
    /// Moments until it is needed.
    pub distance: u32,
    /// The chunk that makes room; `None` when a free slot is used.
    pub evict: Option<ChunkId>,
}

/// Plans, in order of need, what to bring for the next `depth` moments. `victims(distance)` must hand out each chunk
/// once, and only one whose next use is farther than `distance`. Stops at the first chunk it cannot place: a later one
/// must not take the slot that an earlier one waits for.
pub fn plan_prefetch(
    trace: &Trace,
    now: Moment,
    depth: u32,
    resident: &dyn Fn(ChunkId) -> bool,
    eligible: &dyn Fn(ChunkId) -> bool,
    mut free_slots: usize,
    victims: &mut dyn FnMut(u32) -> Option<ChunkId>,
) -> Vec<PrefetchAction> {
    let mut plan = Vec::new();
    for (distance, chunk) in trace.upcoming(now, depth) {
        if resident(chunk) {
            continue;
        }
        if !eligible(chunk) {
            // It will need a place all the same.
            free_slots = free_slots.saturating_sub(1);
            continue;
        }
        let evict = if free_slots > 0 {
            free_slots -= 1;
            None
        } else {
            match victims(distance) {
                Some(victim) => Some(victim),
                None => break,
            }
        };
        plan.push(PrefetchAction { chunk, distance, evict });
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::TraceRecorder;

    #[test]
    fn what_may_not_be_brought_yet_keeps_its_place() {
        let mut recorder = TraceRecorder::new();
        for chunk in 0..6 {
            recorder.access(&[ChunkId(chunk)]);
        }
        let trace = recorder.finish();
        let bring = |blocked: &[u32], free| {
            let plan = plan_prefetch(
                &trace,
                Moment(0),
                5,
                &|chunk| chunk.0 == 0,
                &|chunk| !blocked.contains(&chunk.0),
                free,
                &mut |_| None,
            );
            plan.iter().map(|action| action.chunk.0).collect::<Vec<u32>>()
        };
        assert_eq!(bring(&[], 3), [1, 2, 3]);
        // The second chunk is being updated: the fourth must not take the slot that it will need.
        assert_eq!(bring(&[2], 3), [1, 3]);
        assert_eq!(bring(&[1, 2, 3], 3), [0u32; 0]);
    }
}
