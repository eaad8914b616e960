//! Counters of what chunks did: moves, evictions, prefetches, updates; and the times that went with them.

use std::time::Duration;

use patrickstar_actors::ages::Ages;
use patrickstar_actors::schedule::Policy;
use patrickstar_actors::stats::{Direction, Pressure, Reason, StallCause, Stats};
use patrickstar_actors::types::Tier;

use super::names::{Counter, Histogram};
use super::registry::Registry;
use crate::train::Engine;

/// Counts what is new since the last step.
pub(super) fn count(registry: &Registry, engine: &Engine, new: &Stats) {
    for direction in Direction::ALL {
        let (moves, bytes) = (new.moves[direction as usize], new.bytes[direction as usize]);
        match ends(direction) {
            Some(ends) => {
                registry.counter(Counter::ChunkMoves, &ends).increment(moves);
                registry.counter(Counter::ChunkMovedBytes, &ends).increment(bytes);
            }
            None => registry.counter(Counter::ChunkZeroFills, &[]).increment(moves),
        }
    }
    for (reason, name) in [
        (Reason::Demand, "demand"),
        (Reason::Prefetch, "prefetch"),
        (Reason::Evict, "evict"),
        (Reason::Offload, "offload"),
    ] {
        registry.counter(Counter::ChunkPlacements, &[name]).increment(new.reasons[reason as usize]);
    }
    let policy = policy_name(engine.runtime().policies().policy);
    for (outcome, count) in [("copied", new.reasons[Reason::Evict as usize]), ("dropped", new.dropped)] {
        registry.counter(Counter::ChunkEvictions, &[policy, outcome]).increment(count);
    }
    for (result, count) in [("hit", new.hits), ("miss", new.misses)] {
        registry.counter(Counter::ChunkAccesses, &[result]).increment(count);
    }
    for (outcome, count) in
        [("useful", new.prefetch_useful), ("late", new.prefetch_late), ("wasted", new.prefetch_wasted)]
    {
        registry.counter(Counter::ChunkPrefetches, &[outcome]).increment(count);
    }
    for (tier, counts) in Tier::ALL.into_iter().zip(new.pressure) {
        for (action, count) in Pressure::ALL.into_iter().zip(counts) {
            registry.counter(Counter::MemoryPressure, &[&tier.to_string(), action.name()]).increment(count);
        }
    }
    for (side, count) in [("device", new.stepped_on_device), ("host", new.stepped_on_host)] {
        registry.counter(Counter::AdamParameters, &[side]).increment(count);
    }
}

/// Records the times of the last step, those of 0 too: sums of parts are compared with the sum of steps.
pub(super) fn record_times(registry: &Registry, new: &Stats) {
    let record = |metric, labels: &[&str], time: Duration| registry.histogram(metric, labels).record(time);
    for cause in StallCause::ALL {
        record(Histogram::StallDuration, &[cause.name()], new.stalls[cause as usize]);
    }
    for direction in Direction::ALL {
        if let Some(ends) = ends(direction) {
            record(Histogram::CopyDuration, &ends, new.busy[direction as usize]);
        }
    }
    record(Histogram::AdamHostDuration, &[], new.stepping_on_host);
}

/// Records how long chunks stayed on the device.
pub(super) fn record_ages(registry: &Registry, engine: &Engine) {
    let Ages { residency, idle, reuse } = engine.runtime().take_ages();
    for (metric, samples) in
        [(Histogram::ChunkResidency, residency), (Histogram::ChunkIdle, idle), (Histogram::ChunkReuseGap, reuse)]
    {
        let histogram = registry.histogram(metric, &[]);
        samples.into_iter().for_each(|sample| histogram.record(sample));
    }
}

/// The tiers at the ends of a move; `None` where nothing crosses a link.
fn ends(direction: Direction) -> Option<[&'static str; 2]> {
    match direction {
        Direction::HostToDevice => Some(["host", "device"]),
        Direction::DeviceToHost => Some(["device", "host"]),
        Direction::DiskToHost => Some(["disk", "host"]),
        Direction::HostToDisk => Some(["host", "disk"]),
        Direction::Zero => None,
    }
}

fn policy_name(policy: Policy) -> &'static str {
    match policy {
        Policy::Opt => "opt",
        Policy::Lru => "lru",
        Policy::Static => "static",
    }
}
