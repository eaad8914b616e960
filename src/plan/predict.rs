//! What a step will hold and move, from a simulation of its accesses.

use std::collections::BTreeMap;

use patrickstar_actors::chunk::Layout;
use patrickstar_actors::schedule::{Event, Setup, Trace, TraceRecorder, simulate_observed};
use patrickstar_actors::types::{Bytes, ChunkId, Kind, Moment, Precision, Tier};
use patrickstar_actors::{Side, Split};

use super::split::Spread;
use super::{Plan, TierPlan, runtime_policy};
use crate::config::Config;
use crate::train::device::is_cuda;
use crate::train::program::Program;

impl Plan {
    pub(super) fn predict(&mut self, config: &Config, program: &Program, non_model: Bytes) {
        let (layout, sides) = (&self.layout, self.sides());
        let Spread { room, split: Split { resident, streamed }, .. } = self.spread;
        let (slots, persistent) = (room.slots, room.persistent);
        let lives_there = |chunk: ChunkId| {
            let info = layout.chunk(chunk);
            info.kind != Kind::Gradient && sides[info.group.0 as usize] == Side::Resident
        };
        let trace = synthetic_trace(program, layout, &lives_there);
        let writes = |_: Moment, chunk: ChunkId| layout.chunk(chunk).kind == Kind::Gradient;
        let setup = Setup {
            policy: runtime_policy(config.actors.eviction.policy),
            slots: slots.saturating_sub(persistent * resident) as usize,
            prefetch_depth: config.actors.eviction.prefetch as u32,
            steps: 2,
            writes: &writes,
        };
        let groups = layout.group_count() as u64;
        let away = groups - u64::from(resident);
        let mut peak = PeakByKind::default();
        let observed = simulate_observed(&trace, &setup, &mut |event| peak.observe(event, layout));
        // A working set that does not fit is one of the plan's problems already.
        if let Ok(report) = observed {
            let gradients = u64::from(program.groups_on_device(layout));
            let fetched_weights = (report.fetches / 2).saturating_sub(gradients);
            // Those that are summed in host memory do not have to go there.
            let away = away.saturating_sub(groups - gradients);
            let (streamed, persistent) = (u64::from(streamed), u64::from(persistent));
            self.host_to_device = Bytes((fetched_weights + streamed * (persistent - 1)) * self.chunk.0);
            self.device_to_host = Bytes((away - streamed.min(away) + streamed * persistent) * self.chunk.0);
            let mut peak_by_kind = peak.bytes(self.chunk);
            for &kind in layout.precision().persistent_kinds() {
                let bytes = u64::from(layout.parts(kind) * resident) * self.chunk.0;
                match peak_by_kind.iter_mut().find(|(other, _)| *other == kind) {
                    Some((_, sum)) => sum.0 += bytes,
                    None if bytes > 0 => peak_by_kind.push((kind, Bytes(bytes))),
                    None => {}
                }
            }
            let used = (report.peak_slots as u64 + u64::from(resident) * persistent).min(u64::from(slots));
            self.tiers.push(TierPlan {
                tier: Tier::Device,
                capacity: config.memory.device,
                chunk_budget: Bytes(u64::from(slots) * self.chunk.0),
                chunk_peak: Bytes(used * self.chunk.0),
                peak_by_kind,
                non_model,
            });
        }
        let per_kind = |kind: Kind, groups: u64| (kind, Bytes(u64::from(layout.parts(kind)) * groups * self.chunk.0));
        let gradients = per_kind(Kind::Gradient, u64::from(self.waiting_gradients(config)));
        let persistent_kinds = layout.precision().persistent_kinds().iter();
        let kinds: Vec<(Kind, Bytes)> =
            persistent_kinds.clone().map(|&kind| per_kind(kind, away)).chain([gradients]).collect();
        // A GPU draws what it keeps; other weights that stay on the device come by host memory, one group after the other, when
        // the states of those before them lie there.
        let before = u64::from(self.looked_up_groups);
        let passing =
            persistent_kinds.map(|&kind| per_kind(kind, before + u64::from(kind.is_weight())).1.0).sum::<u64>();
        let come_by_host = resident > 0 && (!is_cuda(&config.compute) || config.model.path.is_some());
        let total = kinds.iter().map(|(_, bytes)| bytes.0).sum::<u64>().max(if come_by_host { passing } else { 0 });
        let host_bytes = Bytes(u64::from(self.spread.slots.host) * self.chunk.0);
        self.tiers.push(TierPlan {
            tier: Tier::Host,
            capacity: Bytes(host_bytes.0 + self.activations_on_host.0),
            chunk_budget: host_bytes,
            chunk_peak: Bytes(total.min(host_bytes.0)),
            peak_by_kind: kinds,
            non_model: self.activations_on_host,
        });
        let disk_bytes = Bytes(u64::from(self.spread.slots.disk) * self.chunk.0);
        self.tiers.push(TierPlan {
            tier: Tier::Disk,
            capacity: config.memory.disk,
            chunk_budget: disk_bytes,
            chunk_peak: Bytes(total.saturating_sub(host_bytes.0).min(disk_bytes.0)),
            peak_by_kind: Vec::new(),
            non_model: Bytes(0),
        });
        let host_share = (away - u64::from(streamed).min(away)) as f64 / groups.max(1) as f64;
        self.optimizer_bytes = Bytes((self.parameters as f64 * update_bytes(layout.precision()) * host_share) as u64);
    }
}

/// Bytes that the update of a parameter moves in host memory: Adam reads weight, momentum, variance and gradient and writes
/// the first three; with a master weight, that is read and written, and the 16-bit one written.
pub(super) fn update_bytes(precision: Precision) -> f64 {
    match precision {
        Precision::Fp32 | Precision::Fp16 => 28.0,
        Precision::Bf16 => 26.0,
    }
}

/// Resident chunks of each kind, now and when most were resident at once.
#[derive(Default)]
struct PeakByKind {
    now: BTreeMap<Kind, u64>,
    peak: BTreeMap<Kind, u64>,
}

impl PeakByKind {
    fn observe(&mut self, event: Event, layout: &Layout) {
        match event {
            Event::Fetch(chunk) => {
                *self.now.entry(layout.chunk(chunk).kind).or_default() += 1;
                if self.now.values().sum::<u64>() > self.peak.values().sum::<u64>() {
                    self.peak.clone_from(&self.now);
                }
            }
            Event::Evict { chunk, .. } => {
                if let Some(count) = self.now.get_mut(&layout.chunk(chunk).kind) {
                    *count -= 1;
                }
            }
            Event::Serve(_) => {}
        }
    }

    fn bytes(self, chunk: Bytes) -> Vec<(Kind, Bytes)> {
        self.peak.into_iter().map(|(kind, count)| (kind, Bytes(count * chunk.0))).collect()
    }
}

/// The accesses of a step, as the engine will make them, without chunks that never move.
fn synthetic_trace(program: &Program, layout: &Layout, lives_there: &dyn Fn(ChunkId) -> bool) -> Trace {
    let mut recorder = TraceRecorder::new();
    let last = program.uses.len() - 1;
    let ids = |access: Vec<(ChunkId, patrickstar_actors::Access)>| -> Vec<ChunkId> {
        access.into_iter().map(|(chunk, _)| chunk).filter(|&chunk| !lives_there(chunk)).collect()
    };
    let passes = (0..last).map(|block| (block, program.forward_access(layout, block)));
    for (block, access) in passes.chain((0..=last).rev().map(|block| (block, program.backward_access(layout, block)))) {
        match program.tiers[block] {
            Tier::Device => recorder.access(&ids(access)),
            Tier::Host | Tier::Disk => recorder.access_on_host(&ids(access)),
        };
    }
    recorder.finish()
}
