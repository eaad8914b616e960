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
        if resident(chunk) || !eligible(chunk) {
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
