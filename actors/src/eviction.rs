//! The eviction actor's mind: which chunk moves where next.
//!
//! It is woken after every change and plans from the table alone, so that it keeps no state that a panic could lose. Moves
//! that it entered but could not hand over are handed over by its successor.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::error::RuntimeError;
use crate::health::ActorName;
use crate::schedule::{Candidate, Policy, choose_victim, plan_prefetch};
use crate::shared::{EvictionPolicy, Plan, Shared};
use crate::stats::Reason;
use crate::table::{Access, MoveId, MoveStatus, Request, Table};
use crate::types::{ChunkId, GroupId, Kind, Moment, Tier};

/// Where moves go: one queue a copy stream.
#[derive(Clone)]
pub(crate) struct Streams {
    pub host_to_device: flume::Sender<MoveId>,
    pub device_to_host: flume::Sender<MoveId>,
    pub disk: flume::Sender<MoveId>,
}

/// Plans moves and hands them to the copy streams.
pub(crate) struct Eviction {
    shared: Arc<Shared>,
    streams: Streams,
}

/// One planning pass over the locked table.
struct Planner<'a> {
    shared: &'a Shared,
    table: &'a mut Table,
    policy: EvictionPolicy,
    plan: Option<Plan>,
    /// Chunks that waiting requests need where they are.
    protected: BTreeSet<(Tier, ChunkId)>,
    /// Device slots that prefetching may fill.
    prefetch_budget: u32,
}

impl Eviction {
    pub fn new(shared: Arc<Shared>, streams: Streams) -> Self {
        Eviction { shared, streams }
    }

    /// One pass: budgets, waiting requests, offloads, prefetch; then hands over what was planned.
    pub fn run(&mut self) -> Result<(), RuntimeError> {
        let policy = self.shared.policies();
        let plan = self.shared.plan();
        let planned: Vec<(MoveId, Tier, Option<Tier>)> = {
            let mut guard = self.shared.lock();
            let table = &mut *guard;
            let budgets = self.shared.moment_budgets.read().ok().and_then(|budgets| budgets.clone());
            if let Some(budgets) = &budgets {
                table.budget[Tier::Device.index()] = lowest_budget(budgets, table.now, 1);
            }
            let prefetch_budget = budgets.as_ref().map_or(table.budget[Tier::Device.index()], |budgets| {
                lowest_budget(budgets, table.now, policy.prefetch)
            });
            let protected = BTreeSet::new();
            let mut planner = Planner { shared: &self.shared, table, policy, plan, protected, prefetch_budget };
            planner.run()?;
            guard
                .moves
                .iter()
                .filter(|(_, planned)| planned.status == MoveStatus::Planned)
                .map(|(&id, planned)| (id, planned.to.0, planned.from.map(|(tier, _)| tier)))
                .collect()
        };
        // Planned and not yet told to any stream: where a death would hurt most.
        self.shared.health.fault_point(ActorName::Eviction);
        // Budgets and drops may have freed a waiter.
        self.shared.changed.notify_all();
        for (id, to, from) in planned {
            let queue = match (from, to) {
                (Some(Tier::Disk), _) | (_, Tier::Disk) => &self.streams.disk,
                (_, Tier::Host) => &self.streams.device_to_host,
                (_, Tier::Device) => &self.streams.host_to_device,
            };
            // What does not fit the queue stays planned: the stream rings after every message. A move that is handed over
            // twice, because its planner died before it noted the first time, is harmless: streams claim moves.
            match queue.try_send(id) {
                Ok(()) => self.note_sent(id),
                Err(flume::TrySendError::Full(_)) => {}
                Err(flume::TrySendError::Disconnected(_)) => {
                    return Err(RuntimeError::Stopped("a copy stream is gone".into()));
                }
            }
        }
        Ok(())
    }

    fn note_sent(&self, id: MoveId) {
        if let Some(planned) = self.shared.lock().moves.get_mut(&id)
            && planned.status == MoveStatus::Planned
        {
            planned.status = MoveStatus::Sent;
        }
    }
}

/// The lowest budget from now to `ahead` moments later. One moment ahead, so that the compute thread finds its budget kept
/// when it gets there; as far as prefetching looks, so that nothing is fetched that a lower budget will throw out again.
fn lowest_budget(budgets: &[u32], now: Moment, ahead: u32) -> u32 {
    let moments = budgets.len().max(1);
    (0..=ahead as usize)
        .filter_map(|offset| budgets.get((now.0 as usize + offset) % moments))
        .copied()
        .min()
        .unwrap_or(0)
}

impl Planner<'_> {
    fn run(&mut self) -> Result<(), RuntimeError> {
        let active = self.active_requests();
        for request in &active {
            for &(chunk, _) in &request.chunks {
                self.protected.insert((request.tier, chunk));
                // On its way from disk a chunk stops in host memory: dropping it there would undo the work.
                if request.tier == Tier::Device {
                    self.protected.insert((Tier::Host, chunk));
                }
            }
        }
        for tier in [Tier::Host, Tier::Device] {
            self.keep_budget(tier)?;
        }
        let mut unmet = false;
        for request in &active {
            unmet |= self.serve(request)?;
        }
        self.offload_gradients()?;
        if !unmet {
            self.prefetch()?;
        }
        Ok(())
    }

    /// The oldest eligible request of each tier. Only these may hold on to slots they were brought, so that two waiting
    /// requests never starve each other.
    fn active_requests(&self) -> Vec<Request> {
        Tier::ALL
            .into_iter()
            .filter_map(|tier| {
                self.table
                    .requests
                    .iter()
                    .find(|request| request.tier == tier && self.table.is_eligible(request, &self.shared.layout))
            })
            .cloned()
            .collect()
    }

    fn keep_budget(&mut self, tier: Tier) -> Result<(), RuntimeError> {
        let budget = self.table.budget[tier.index()];
        let mut excess = self.table.used(tier).saturating_sub(budget).saturating_sub(self.leaving(tier));
        while excess > 0 && self.evict_one(tier, None)? {
            excess -= 1;
        }
        Ok(())
    }

    /// Starts what `request` misses; true while something is missing.
    fn serve(&mut self, request: &Request) -> Result<bool, RuntimeError> {
        let tier = request.tier;
        let missing: Vec<(ChunkId, Access)> = request
            .chunks
            .iter()
            .copied()
            .filter(|&(chunk, _)| {
                let entry = self.table.entry(chunk);
                entry.place[tier.index()].valid().is_none() && entry.moving.is_none()
            })
            .collect();
        let waiting = request.chunks.iter().any(|&(chunk, _)| {
            let entry = self.table.entry(chunk);
            entry.moving.is_some() || entry.place[tier.index()].valid().is_none()
        });
        let mut short = 0;
        for &(chunk, access) in &missing {
            if !self.bring(chunk, tier, access, Reason::Demand)? {
                short += 1;
            }
        }
        if short > 0 {
            let mut making_room = self.leaving(tier);
            while making_room < short && self.evict_one(tier, None)? {
                making_room += 1;
            }
            // Drops freed slots at once.
            for &(chunk, access) in &missing {
                self.bring(chunk, tier, access, Reason::Demand)?;
            }
            self.check_progress(request, short)?;
        }
        Ok(waiting)
    }

    /// Nothing moves, nobody holds a lease that could end, and still no slot: it will never fit.
    fn check_progress(&self, request: &Request, short: u32) -> Result<(), RuntimeError> {
        let leased = self.table.entries.iter().any(|entry| entry.leases.iter().any(|&leases| leases > 0));
        let placeable = request.chunks.iter().any(|&(chunk, _)| self.table.entry(chunk).moving.is_some());
        if leased || placeable || !self.table.moves.is_empty() {
            return Ok(());
        }
        let missing = request
            .chunks
            .iter()
            .filter(|&&(chunk, _)| self.table.entry(chunk).place[request.tier.index()].valid().is_none())
            .count() as u32;
        if missing == 0 {
            return Ok(());
        }
        // The tier that is full may be the one below, into which nothing can be evicted.
        let tier =
            if self.table.room(request.tier) == 0 && request.tier == Tier::Device && self.table.room(Tier::Host) == 0 {
                Tier::Host
            } else {
                request.tier
            };
        Err(RuntimeError::OutOfSlots {
            tier,
            need: missing.max(short.min(missing)),
            have: self.table.room(tier),
            slot: self.shared.chunk_bytes(),
        })
    }

    /// Slots of `tier` that moves under way will free.
    fn leaving(&self, tier: Tier) -> u32 {
        self.table
            .moves
            .values()
            .filter(|moving| moving.drop_source && moving.from.is_some_and(|(from, _)| from == tier))
            .count() as u32
    }

    /// Starts bringing `chunk` to `tier`; false when there is no room or nothing to bring yet.
    fn bring(&mut self, chunk: ChunkId, tier: Tier, access: Access, reason: Reason) -> Result<bool, RuntimeError> {
        let entry = self.table.entry(chunk);
        if entry.moving.is_some() || entry.place[tier.index()].valid().is_some() {
            return Ok(true);
        }
        // A leased chunk cannot move; its holder's release rings again.
        if entry.leases.iter().any(|&leases| leases > 0) {
            return Ok(true);
        }
        let source = self.table.nearest_valid(chunk).map(|(tier, _)| tier);
        let (from, to) = match (source, tier) {
            (None, _) if access == Access::Fresh => (None, tier),
            (None, _) => return Err(RuntimeError::NoPayload(chunk)),
            // Device and disk have no direct way: by host.
            (Some(Tier::Disk), _) => (Some(Tier::Disk), Tier::Host),
            (Some(Tier::Device), Tier::Disk) => (Some(Tier::Device), Tier::Host),
            (from, to) => (from, to),
        };
        if self.table.room(to) == 0 && !(to != tier && self.evict_now(to)?) {
            return Ok(false);
        }
        if self.table.room(to) == 0 {
            return Ok(false);
        }
        let is_gradient = self.shared.layout.chunk(chunk).kind == Kind::Gradient;
        let drop_source = is_gradient && from.is_some();
        self.table.start_move(chunk, from, to, drop_source, reason)?;
        Ok(true)
    }

    /// Evicts one chunk of `tier` so that a slot is free at once, if a clean copy can be dropped; otherwise starts a
    /// write-back and says false.
    fn evict_now(&mut self, tier: Tier) -> Result<bool, RuntimeError> {
        if self.leaving(tier) == 0 {
            self.evict_one(tier, None)?;
        }
        Ok(self.table.room(tier) > 0)
    }

    fn candidates(&self, tier: Tier, pinned: bool) -> Vec<Candidate> {
        let index = tier.index();
        self.table
            .entries
            .iter()
            .enumerate()
            .filter(|(_, entry)| {
                entry.place[index].valid().is_some()
                    && entry.moving.is_none()
                    && entry.leases.iter().all(|&leases| leases == 0)
                    && (tier != Tier::Device || entry.pinned == pinned)
            })
            .map(|(id, entry)| Candidate {
                chunk: ChunkId(id as u32),
                clean: entry.place.iter().enumerate().any(|(other, place)| other != index && place.valid().is_some()),
                last_use: entry.last_use,
                arrived: entry.arrived,
            })
            .filter(|candidate| !self.protected.contains(&(tier, candidate.chunk)))
            .collect()
    }

    fn victim(&self, tier: Tier, need_within: Option<u32>) -> Option<ChunkId> {
        let candidates = self.candidates(tier, false);
        let trace = self.plan.as_ref().map(|plan| &*plan.trace);
        let empty = crate::schedule::StaticSet::default();
        let static_set = self.plan.as_ref().map_or(&empty, |plan| &*plan.static_set);
        if tier == Tier::Host {
            return host_victim(&candidates, trace, self.table.now);
        }
        let policy = if trace.is_some() { self.policy.policy } else { Policy::Lru };
        choose_victim(policy, trace, self.table.now, static_set, &candidates, need_within).or_else(|| {
            // A pinned chunk is better evicted than a request left waiting, but never for a prefetch.
            let pinned = need_within.is_none().then(|| self.candidates(tier, true))?;
            choose_victim(Policy::Lru, None, self.table.now, static_set, &pinned, None)
        })
    }

    /// Frees one slot of `tier`, now (a clean copy is dropped) or when the write-back is done; false: nothing to evict.
    fn evict_one(&mut self, tier: Tier, need_within: Option<u32>) -> Result<bool, RuntimeError> {
        let Some(victim) = self.victim(tier, need_within) else { return Ok(false) };
        self.evict(victim, tier)
    }

    fn evict(&mut self, victim: ChunkId, tier: Tier) -> Result<bool, RuntimeError> {
        let entry = self.table.entry(victim);
        let clean = Tier::ALL.into_iter().any(|other| other != tier && entry.place[other.index()].valid().is_some());
        if entry.prefetched && tier == Tier::Device {
            self.table.stats.prefetch_wasted += 1;
            self.table.entry_mut(victim).prefetched = false;
        }
        if clean {
            self.table.discard(victim, tier)?;
            self.table.stats.dropped += 1;
            return Ok(true);
        }
        let target = match tier {
            Tier::Device => Tier::Host,
            Tier::Host | Tier::Disk => Tier::Disk,
        };
        if self.table.room(target) == 0 && !(target == Tier::Host && self.evict_now(Tier::Host)?) {
            return Ok(false);
        }
        self.table.start_move(victim, Some(tier), target, true, Reason::Evict)?;
        Ok(true)
    }

    /// Gradients whose groups are stepped on the host leave the device as soon as they are complete.
    fn offload_gradients(&mut self) -> Result<(), RuntimeError> {
        for index in 0..self.table.groups.len() {
            let group = self.table.groups[index];
            if group.pending_update.is_none() || group.on_device {
                continue;
            }
            for &chunk in self.shared.layout.group_chunks(GroupId(index as u32), Kind::Gradient) {
                let entry = self.table.entry(chunk);
                let on_device_alone = entry.place[Tier::Device.index()].valid().is_some()
                    && entry.place[Tier::Host.index()].valid().is_none();
                let idle = entry.moving.is_none() && entry.leases.iter().all(|&leases| leases == 0);
                if on_device_alone && idle && self.table.room(Tier::Host) > 0 {
                    self.table.start_move(chunk, Some(Tier::Device), Tier::Host, true, Reason::Offload)?;
                }
            }
        }
        Ok(())
    }

    fn prefetch(&mut self) -> Result<(), RuntimeError> {
        let Some(plan) = self.plan.clone().filter(|_| self.policy.prefetch > 0) else { return Ok(()) };
        let device = Tier::Device.index();
        let layout = &self.shared.layout;
        let actions = {
            let this = &*self;
            let table = &*this.table;
            let resident = |chunk: ChunkId| {
                let entry = table.entry(chunk);
                entry.place[device] != crate::table::Place::Absent
            };
            let eligible = |chunk: ChunkId| {
                let entry = table.entry(chunk);
                let info = layout.chunk(chunk);
                let known = table.has_payload(chunk) || info.kind == Kind::Gradient;
                entry.moving.is_none()
                    && known
                    && table.group(info.group).pending_update.is_none()
                    && entry.leases.iter().all(|&leases| leases == 0)
            };
            let free = self.prefetch_budget.min(table.budget[device]).saturating_sub(table.used(Tier::Device)) as usize;
            let mut taken = BTreeSet::new();
            let mut victims = |distance: u32| {
                let candidates: Vec<Candidate> = this
                    .candidates(Tier::Device, false)
                    .into_iter()
                    .filter(|candidate| !taken.contains(&candidate.chunk))
                    .collect();
                let policy = this.policy.policy;
                let victim =
                    choose_victim(policy, Some(&plan.trace), table.now, &plan.static_set, &candidates, Some(distance))?;
                taken.insert(victim);
                Some(victim)
            };
            plan_prefetch(&plan.trace, table.now, this.policy.prefetch, &resident, &eligible, free, &mut victims)
        };
        for action in actions {
            if let Some(victim) = action.evict
                && !self.evict(victim, Tier::Device)?
            {
                break;
            }
            if !self.bring(action.chunk, Tier::Device, Access::Fresh, Reason::Prefetch)? {
                break;
            }
        }
        Ok(())
    }
}

/// In the host tier a copy that the device also has costs nothing to drop; otherwise the state that the compute thread
/// needs last (optimizer states it never needs) goes to disk, least recently used first.
fn host_victim(candidates: &[Candidate], trace: Option<&crate::schedule::Trace>, now: Moment) -> Option<ChunkId> {
    let distance =
        |chunk: ChunkId| trace.and_then(|trace| trace.distance_to_next_use(chunk, now, false)).unwrap_or(u32::MAX);
    candidates
        .iter()
        .max_by_key(|candidate| (candidate.clean, distance(candidate.chunk), std::cmp::Reverse(candidate.last_use)))
        .map(|candidate| candidate.chunk)
}
