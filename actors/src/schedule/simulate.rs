//! What a policy costs on a trace: one tier, run without copying anything.

use std::collections::BTreeMap;

use super::policy::{Candidate, Policy, StaticSet, choose_victim};
use super::prefetch::plan_prefetch;
use super::trace::Trace;
use crate::types::{ChunkId, Moment};

/// What to simulate.
#[derive(Clone, Copy)]
pub struct Setup<'a> {
    /// How victims are chosen.
    pub policy: Policy,
    /// Slots of the tier.
    pub slots: usize,
    /// Moments to look ahead; 0 fetches on demand only.
    pub prefetch_depth: u32,
    /// Steps to run, the first from an empty tier.
    pub steps: u32,
    /// Whether an access changes the chunk.
    pub writes: &'a dyn Fn(Moment, ChunkId) -> bool,
}

/// What a simulation counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SimulationReport {
    /// Accesses whose chunk was not there.
    pub misses: u64,
    /// Chunks brought in, on demand or before.
    pub fetches: u64,
    /// Chunks dropped, since a valid copy exists elsewhere.
    pub drops: u64,
    /// Chunks copied out.
    pub write_backs: u64,
    /// Most slots in use at once.
    pub peak_slots: usize,
    /// Misses of every moment of every step, in order.
    pub misses_by_moment: Vec<u32>,
}

/// Something that a simulation did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A chunk left.
    Evict {
        /// The chunk.
        chunk: ChunkId,
        /// Whether it had to be copied out.
        write_back: bool,
    },
    /// A chunk came.
    Fetch(ChunkId),
    /// All chunks of a moment are there and leased.
    Serve(Moment),
}

/// Why a trace cannot run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimulationError {
    /// A moment needs more chunks at once than there are slots.
    #[error("moment {} needs {need} chunks at once, the tier has {have} slots: raise its budget or use smaller chunks", moment.0)]
    WorkingSet {
        /// The moment.
        moment: Moment,
        /// Chunks it needs.
        need: usize,
        /// Slots there are.
        have: usize,
    },
}

struct Tier<'a> {
    trace: &'a Trace,
    setup: &'a Setup<'a>,
    static_set: StaticSet,
    resident: BTreeMap<ChunkId, Candidate>,
    report: SimulationReport,
    tick: u64,
    observer: &'a mut dyn FnMut(Event),
}

/// Runs `trace` and counts.
pub fn simulate(trace: &Trace, setup: &Setup<'_>) -> Result<SimulationReport, SimulationError> {
    simulate_observed(trace, setup, &mut |_| {})
}

/// Runs `trace`, counts, and tells `observer` everything that happens.
pub fn simulate_observed(
    trace: &Trace,
    setup: &Setup<'_>,
    observer: &mut dyn FnMut(Event),
) -> Result<SimulationReport, SimulationError> {
    let moments = || (0..trace.moments() as u32).map(Moment);
    if let Some(moment) = moments().find(|&moment| trace.at(moment).len() > setup.slots) {
        return Err(SimulationError::WorkingSet { moment, need: trace.at(moment).len(), have: setup.slots });
    }
    let static_set = StaticSet::new(trace, setup.slots);
    let (resident, report) = (BTreeMap::new(), SimulationReport::default());
    let mut tier = Tier { trace, setup, static_set, resident, report, tick: 0, observer };
    for _ in 0..setup.steps {
        for moment in moments() {
            tier.serve(moment);
            tier.prefetch(moment);
        }
    }
    Ok(tier.report)
}

impl Tier<'_> {
    fn serve(&mut self, now: Moment) {
        let wanted = self.trace.at(now);
        let missing: Vec<_> = wanted.iter().copied().filter(|chunk| !self.resident.contains_key(chunk)).collect();
        self.report.misses += missing.len() as u64;
        self.report.misses_by_moment.push(missing.len() as u32);
        for chunk in missing {
            if self.resident.len() >= self.setup.slots
                && let Some(victim) = self.victim(now, &[], None)
            {
                self.evict(victim);
            }
            self.fetch(chunk);
        }
        self.tick += 1;
        for &chunk in wanted {
            if let Some(entry) = self.resident.get_mut(&chunk) {
                entry.last_use = self.tick;
                entry.clean &= !(self.setup.writes)(now, chunk);
            }
        }
        (self.observer)(Event::Serve(now));
    }

    /// Runs while the moment computes: its chunks are leased and stay.
    fn prefetch(&mut self, now: Moment) {
        let mut taken = Vec::new();
        let mut victims = |distance| {
            let victim = self.victim(now, &taken, Some(distance));
            taken.extend(victim);
            victim
        };
        let resident = |chunk| self.resident.contains_key(&chunk);
        let free = self.setup.slots - self.resident.len();
        let depth = self.setup.prefetch_depth;
        for action in plan_prefetch(self.trace, now, depth, &resident, &|_| true, free, &mut victims) {
            if let Some(victim) = action.evict {
                self.evict(victim);
            }
            self.fetch(action.chunk);
        }
    }

    fn victim(&self, now: Moment, taken: &[ChunkId], need_within: Option<u32>) -> Option<ChunkId> {
        let leased = self.trace.at(now);
        let free = |c: &&Candidate| !leased.contains(&c.chunk) && !taken.contains(&c.chunk);
        let candidates: Vec<_> = self.resident.values().filter(free).copied().collect();
        choose_victim(self.setup.policy, Some(self.trace), now, &self.static_set, &candidates, need_within)
    }

    fn evict(&mut self, chunk: ChunkId) {
        let write_back = self.resident.remove(&chunk).is_some_and(|entry| !entry.clean);
        if write_back {
            self.report.write_backs += 1;
        } else {
            self.report.drops += 1;
        }
        (self.observer)(Event::Evict { chunk, write_back });
    }

    fn fetch(&mut self, chunk: ChunkId) {
        self.tick += 1;
        // The copy it came from stays valid until an access changes it.
        self.resident.insert(chunk, Candidate { chunk, clean: true, last_use: self.tick, arrived: self.tick });
        self.report.fetches += 1;
        self.report.peak_slots = self.report.peak_slots.max(self.resident.len());
        (self.observer)(Event::Fetch(chunk));
    }
}

#[cfg(test)]
#[path = "simulate_tests.rs"]
mod tests;
