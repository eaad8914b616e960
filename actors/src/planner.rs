//! One pass of planning over the locked table: which chunk moves where next.
//!
//! Waiting requests come in the order of who waits: the compute thread first, then whoever reads, then updates. A later one
//! may take nothing that an earlier one was brought, so the compute thread always gets on, and whatever it waits for gets
//! on once it waits. Prefetching fills what they leave.

use std::collections::BTreeSet;

use crate::error::RuntimeError;
use crate::moves::Urgency;
use crate::placement::Side;
use crate::schedule::{Candidate, Policy, StaticSet, choose_victim, plan_prefetch};
use crate::shared::{EvictionPolicy, Plan, Shared};
use crate::stats::{Pressure, Reason};
use crate::table::{Access, Place, Request, Requester, Table};
use crate::types::{ChunkId, GroupId, Kind, Moment, Tier};

/// Updates a side whose chunks are brought: while one is computed the next one comes.
const UPDATES_AHEAD: usize = 2;

pub(crate) struct Planner<'a> {
    shared: &'a Shared,
    table: &'a mut Table,
    policy: EvictionPolicy,
    plan: Option<Plan>,
    /// Chunks that any waiting request needs where they are.
    wanted: BTreeSet<(Tier, ChunkId)>,
    /// Of them those of the request in hand and of more urgent ones.
    protected: BTreeSet<(Tier, ChunkId)>,
    /// Device slots that prefetching may fill.
    prefetch_budget: u32,
}

/// The chunks of a request and the tiers in which it needs them. On its way from disk a chunk stops in host memory: dropping
/// it there would undo the work.
fn in_place(request: &Request) -> impl Iterator<Item = (Tier, ChunkId)> {
    let on_the_way = (request.tier == Tier::Device).then_some(Tier::Host);
    let tiers = [Some(request.tier), on_the_way];
    let chunks: Vec<ChunkId> = request.chunks.iter().map(|&(chunk, _)| chunk).collect();
    tiers.into_iter().flatten().flat_map(move |tier| chunks.clone().into_iter().map(move |chunk| (tier, chunk)))
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

impl<'a> Planner<'a> {
    pub fn new(shared: &'a Shared, table: &'a mut Table) -> Self {
        let policy = shared.policies();
        let budgets = shared.moment_budgets.read().ok().and_then(|budgets| budgets.clone());
        let now = table.now;
        let plan = shared.plan();
        let budget = &mut table.budget[Tier::Device.index()];
        if let Some(budgets) = &budgets {
            // What the moment needs it gets, even if the next one makes do with less.
            let access = plan.as_ref().map_or(0, |plan| plan.trace.at(now).len()) as u32;
            let own = budgets.get(now.0 as usize).map_or(0, |&own| own.min(access));
            *budget = lowest_budget(budgets, now, 1).max(own);
        }
        let prefetch_budget = budgets.map_or(*budget, |budgets| lowest_budget(&budgets, now, policy.prefetch));
        let (wanted, protected) = (BTreeSet::new(), BTreeSet::new());
        Planner { shared, table, policy, plan, wanted, protected, prefetch_budget }
    }

    pub fn run(&mut self) -> Result<(), RuntimeError> {
        let active = self.active_requests();
        self.wanted = active.iter().flat_map(in_place).collect();
        for tier in [Tier::Host, Tier::Device] {
            self.keep_budget(tier)?;
        }
        self.clear_high_end()?;
        let mut short = Vec::with_capacity(active.len());
        for request in &active {
            self.protected.extend(in_place(request));
            short.push(self.serve(request)?);
        }
        self.offload()?;
        let on_device = active.iter().zip(&short).filter(|(request, _)| request.tier == Tier::Device);
        if on_device.clone().all(|(request, &short)| request.requester != Requester::Compute || short == 0) {
            self.prefetch(on_device.map(|(_, &short)| short).sum())?;
        }
        self.check_progress(&active, &short)
    }

    /// The oldest eligible request of each requester and tier, and the first updates that are due and wait for chunks.
    fn active_requests(&self) -> Vec<Request> {
        let layout = &self.shared.layout;
        let mut active: Vec<Request> = Vec::new();
        for request in &self.table.requests {
            let seen = active.iter().any(|other| (other.requester, other.tier) == (request.requester, request.tier));
            if !seen && self.table.is_eligible(request, layout) {
                active.push(request.clone());
            }
        }
        for tier in [Tier::Device, Tier::Host] {
            let mut due: Vec<Request> =
                self.due(tier).filter(|request| self.table.is_eligible(request, layout)).collect();
            // What has begun to come goes first, or each new update would throw out what the last one was brought. One that
            // could begin stays in the list: until it is leased somebody else might take its place.
            due.sort_by_key(|request| std::cmp::Reverse(self.states_in_place(request)));
            active.extend(due.into_iter().take(UPDATES_AHEAD));
        }
        active.sort_by_key(|request| request.requester);
        active
    }

    /// How many chunks of an update are where it needs them, but for what the model may have left there.
    fn states_in_place(&self, request: &Request) -> usize {
        let states = request
            .chunks
            .iter()
            .filter(|&&(chunk, _)| !matches!(self.shared.layout.chunk(chunk).kind, Kind::Weight | Kind::Gradient));
        states.filter(|&&(chunk, _)| self.table.entry(chunk).place[request.tier.index()] != Place::Absent).count()
    }

    /// What the updates that are due on one side will lease.
    fn due(&self, tier: Tier) -> impl Iterator<Item = Request> {
        let due = self.shared.updates.due(tier).into_iter();
        // One that is applied stays in the queue for a moment.
        due.filter(|update| self.table.group(update.group).pending_update == Some(update.step))
            .map(|update| self.table.update_request(update.group, &self.shared.layout))
    }

    fn keep_budget(&mut self, tier: Tier) -> Result<(), RuntimeError> {
        let budget = self.table.budget[tier.index()];
        let mut excess = self.table.used(tier).saturating_sub(budget).saturating_sub(self.leaving(tier));
        while excess > 0 && self.evict_one(tier, None, Urgency::Later)? {
            excess -= 1;
            self.table.stats.count_pressure(tier, Pressure::Evict);
        }
        Ok(())
    }

    /// Chunks in device slots that are to lose their memory go to lower ones: under its budget the device has room for them.
    fn clear_high_end(&mut self) -> Result<(), RuntimeError> {
        for chunk in self.table.stragglers() {
            if self.table.slots[Tier::Device.index()].available() == 0 {
                break;
            }
            self.table.relocate(chunk)?;
        }
        Ok(())
    }

    /// Starts what `request` misses; returns for how many of its chunks there is no slot yet.
    fn serve(&mut self, request: &Request) -> Result<u32, RuntimeError> {
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
        let urgency = if request.requester == Requester::Compute { Urgency::Now } else { Urgency::Later };
        let short = self.bring_all(&missing, tier, urgency)?;
        if short == 0 {
            return Ok(0);
        }
        let mut making_room = self.leaving(tier);
        while making_room < short && self.evict_one(tier, None, urgency)? {
            making_room += 1;
        }
        // Drops freed slots at once.
        self.bring_all(&missing, tier, urgency)
    }

    /// Starts bringing those that find a slot; returns how many do not.
    fn bring_all(&mut self, chunks: &[(ChunkId, Access)], tier: Tier, urgency: Urgency) -> Result<u32, RuntimeError> {
        let mut short = 0;
        for &(chunk, access) in chunks {
            if !self.bring(chunk, tier, access, (Reason::Demand, urgency))? {
                short += 1;
            }
        }
        Ok(short)
    }

    /// An error if everybody waits, nothing moves, and still somebody is short of a slot: it will never fit.
    fn check_progress(&self, active: &[Request], short: &[u32]) -> Result<(), RuntimeError> {
        let layout = &self.shared.layout;
        let leased = || self.table.entries.iter().any(|entry| entry.leases.iter().any(|&leases| leases > 0));
        let somebody_waits = self.table.compute_waits || !self.table.requests.is_empty();
        let Some(first) = active.first().filter(|_| somebody_waits && self.table.moves.is_empty()) else {
            return Ok(());
        };
        let update_can_begin = || {
            let due = [Tier::Device, Tier::Host].into_iter().flat_map(|tier| self.due(tier));
            due.into_iter().any(|request| self.table.obstacle(&request, layout).is_none())
        };
        // Above its budget a tier grants nothing, even to who has all chunks in place.
        let excess = |tier: Tier| self.table.used(tier).saturating_sub(self.table.budget[tier.index()]);
        let complete = active.iter().zip(short).any(|(request, &short)| short == 0 && excess(request.tier) == 0);
        if complete || leased() || update_can_begin() || self.gradients_will_go(Tier::Device) {
            return Ok(());
        }
        let missing = first
            .chunks
            .iter()
            .filter(|&&(chunk, _)| self.table.entry(chunk).place[first.tier.index()].valid().is_none())
            .count() as u32;
        let missing = missing.max(excess(first.tier));
        // The tier that is full may be the one below, into which nothing can be evicted.
        let below_is_full =
            self.table.room(first.tier) == 0 && first.tier == Tier::Device && self.table.room(Tier::Host) == 0;
        let tier = if below_is_full { Tier::Host } else { first.tier };
        Err(RuntimeError::OutOfSlots {
            tier,
            need: missing,
            have: self.table.room(tier),
            slot: self.shared.chunk_bytes(),
        })
    }

    /// Slots of `tier` that moves under way will free.
    fn leaving(&self, tier: Tier) -> u32 {
        self.table
            .moves
            .values()
            .filter(|moving| {
                moving.drop_source && moving.relocates().is_none() && moving.from.is_some_and(|(from, _)| from == tier)
            })
            .count() as u32
    }

    /// Starts bringing `chunk` to `tier`; false when there is no room or nothing to bring yet.
    fn bring(
        &mut self,
        chunk: ChunkId,
        tier: Tier,
        access: Access,
        (reason, urgency): (Reason, Urgency),
    ) -> Result<bool, RuntimeError> {
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
        if self.table.room(to) == 0 && !(to != tier && self.evict_now(to, urgency)?) {
            return Ok(false);
        }
        if self.table.room(to) == 0 {
            return Ok(false);
        }
        let is_gradient = self.shared.layout.chunk(chunk).kind == Kind::Gradient;
        let drop_source = is_gradient && from.is_some();
        self.table.start_move(chunk, from, to, drop_source, (reason, urgency))?;
        Ok(true)
    }

    /// Evicts one chunk of `tier` so that a slot is free at once, if a clean copy can be dropped; otherwise starts a
    /// write-back and says false.
    fn evict_now(&mut self, tier: Tier, urgency: Urgency) -> Result<bool, RuntimeError> {
        if self.leaving(tier) == 0 {
            self.evict_one(tier, None, urgency)?;
        }
        Ok(self.table.room(tier) > 0)
    }

    /// Chunks of `tier` that may leave, but for those `kept`.
    fn candidates(&self, tier: Tier, pinned: bool, kept: &BTreeSet<(Tier, ChunkId)>) -> Vec<Candidate> {
        let index = tier.index();
        self.table
            .entries
            .iter()
            .enumerate()
            .filter(|(_, entry)| {
                entry.place[index].valid().is_some()
                    && entry.moving.is_none()
                    && entry.leases.iter().all(|&leases| leases == 0)
            })
            .filter(|&(id, _)| tier != Tier::Device || self.is_pinned(ChunkId(id as u32)) == pinned)
            .map(|(id, entry)| Candidate {
                chunk: ChunkId(id as u32),
                clean: entry.place.iter().enumerate().any(|(other, place)| other != index && place.valid().is_some()),
                last_use: entry.last_use,
                arrived: entry.arrived,
            })
            .filter(|candidate| !kept.contains(&(tier, candidate.chunk)))
            .collect()
    }

    /// The chunk whose place somebody else gets. For a prefetch only one that is needed later than `need_within`; for a
    /// request, where nothing else is left, what a later one was brought, and then what lives on the device.
    fn victim(&self, tier: Tier, need_within: Option<u32>) -> Option<ChunkId> {
        let unwanted = self.choose(tier, &self.candidates(tier, false, &self.wanted), need_within);
        if unwanted.is_some() || need_within.is_some() {
            return unwanted;
        }
        self.choose(tier, &self.candidates(tier, false, &self.protected), None).or_else(|| {
            // The compute thread runs ahead of the device: it would drive out states that the next updates need.
            if self.gradients_will_go(tier) {
                return None;
            }
            let pinned = self.candidates(tier, true, &self.protected);
            choose_victim(Policy::Lru, None, self.table.now, &StaticSet::default(), &pinned, None)
        })
    }

    /// Whether a gradient on the device is about to be used up there, by an update that waits for no chunk.
    fn gradients_will_go(&self, tier: Tier) -> bool {
        let layout = &self.shared.layout;
        let in_place = |group: GroupId| {
            let state = self.table.group(group);
            let chunks = || self.table.update_request(group, layout).chunks.into_iter();
            let here = |chunk: ChunkId| {
                let entry = self.table.entry(chunk);
                entry.moving.is_none() && entry.place[Tier::Device.index()].valid().is_some()
            };
            state.pending_update.is_some() && !state.save_wanted && chunks().all(|(chunk, _)| here(chunk))
        };
        // Above its budget a tier grants nothing, not even what would free it.
        if tier != Tier::Device || self.table.used(tier) > self.table.budget[tier.index()] {
            return false;
        }
        if self.shared.steps_together() {
            return self
                .due(Tier::Device)
                .any(|request| request.chunks.first().is_some_and(|&(chunk, _)| in_place(layout.chunk(chunk).group)));
        }
        let mut groups = (0..self.table.groups.len() as u32).map(GroupId);
        groups.any(|group| self.table.group(group).side == Side::Resident && in_place(group))
    }

    fn choose(&self, tier: Tier, candidates: &[Candidate], need_within: Option<u32>) -> Option<ChunkId> {
        let trace = self.plan.as_ref().map(|plan| &*plan.trace);
        if tier == Tier::Host {
            return host_victim(candidates, trace, self.table.now);
        }
        let empty = StaticSet::default();
        let static_set = self.plan.as_ref().map_or(&empty, |plan| &*plan.static_set);
        let policy = if trace.is_some() { self.policy.policy } else { Policy::Lru };
        choose_victim(policy, trace, self.table.now, static_set, candidates, need_within)
    }

    /// Frees one slot of `tier`, now (a clean copy is dropped) or when the write-back is done; false: nothing to evict.
    fn evict_one(&mut self, tier: Tier, need_within: Option<u32>, urgency: Urgency) -> Result<bool, RuntimeError> {
        let Some(victim) = self.victim(tier, need_within) else { return Ok(false) };
        self.evict(victim, tier, urgency)
    }

    fn evict(&mut self, victim: ChunkId, tier: Tier, urgency: Urgency) -> Result<bool, RuntimeError> {
        let entry = self.table.entry(victim);
        let clean = Tier::ALL.into_iter().any(|other| other != tier && entry.place[other.index()].valid().is_some());
        if entry.prefetched && tier == Tier::Device {
            self.table.stats.prefetch_wasted += 1;
            self.table.entry_mut(victim).prefetched = false;
        }
        if clean {
            self.table.make_way(victim, tier)?;
            self.table.stats.dropped += 1;
            return Ok(true);
        }
        let target = match tier {
            Tier::Device => Tier::Host,
            Tier::Host | Tier::Disk => Tier::Disk,
        };
        if self.table.room(target) == 0 && !(target == Tier::Host && self.evict_now(Tier::Host, urgency)?) {
            return Ok(false);
        }
        self.table.start_move(victim, Some(tier), target, true, (Reason::Evict, urgency))?;
        Ok(true)
    }

    /// What is done on the device and needed in host memory leaves at once: complete gradients of groups that are stepped
    /// there, and the states of updates that passed through the device.
    fn offload(&mut self) -> Result<(), RuntimeError> {
        let layout = &self.shared.layout;
        for index in 0..self.table.groups.len() {
            let (group, state) = (GroupId(index as u32), self.table.groups[index]);
            let (kinds, urgency): (Vec<Kind>, Urgency) = match (state.side, state.pending_update) {
                // Measured first: a device does that in passing.
                (Side::Host, Some(_)) if state.measured => (vec![Kind::Gradient], Urgency::Soon),
                (Side::Streamed, None) => {
                    let kinds = layout.precision().persistent_kinds().iter().copied();
                    // The model needs the weight again; where its slot is needed, it is written back then.
                    (kinds.filter(|&kind| kind != Kind::Weight).collect(), Urgency::Later)
                }
                _ => continue,
            };
            for &chunk in kinds.iter().flat_map(|&kind| layout.group_chunks(group, kind)) {
                let entry = self.table.entry(chunk);
                let on_device_alone = entry.place[Tier::Device.index()].valid().is_some()
                    && entry.place[Tier::Host.index()].valid().is_none();
                let idle = entry.moving.is_none() && entry.leases.iter().all(|&leases| leases == 0);
                if on_device_alone && idle && self.table.room(Tier::Host) > 0 {
                    self.table.start_move(chunk, Some(Tier::Device), Tier::Host, true, (Reason::Offload, urgency))?;
                }
            }
        }
        Ok(())
    }

    /// Evicted only when nothing else is left: states of a group that lives on the device, and a complete gradient that the
    /// device has yet to measure or to step.
    fn is_pinned(&self, chunk: ChunkId) -> bool {
        let info = self.shared.layout.chunk(chunk);
        let group = self.table.group(info.group);
        if info.kind == Kind::Gradient {
            return group.pending_update.is_some() && (group.side != Side::Host || !group.measured);
        }
        group.side == Side::Resident
    }

    /// Brings what the coming moments need into slots that nobody is `short` of.
    fn prefetch(&mut self, short: u32) -> Result<(), RuntimeError> {
        let Some(plan) = self.plan.clone().filter(|_| self.policy.prefetch > 0) else { return Ok(()) };
        let device = Tier::Device.index();
        let layout = &self.shared.layout;
        let actions = {
            let this = &*self;
            let table = &*this.table;
            let resident = |chunk: ChunkId| {
                let entry = table.entry(chunk);
                entry.place[device] != Place::Absent
            };
            let eligible = |chunk: ChunkId| {
                let entry = table.entry(chunk);
                let info = layout.chunk(chunk);
                let known = table.has_payload(chunk) || (info.kind == Kind::Gradient && !table.forward_only);
                entry.moving.is_none()
                    && known
                    && table.group(info.group).pending_update.is_none()
                    && entry.leases.iter().all(|&leases| leases == 0)
                    // A gradient is in one place: whoever waits for it in host memory would never see it there.
                    && !this.wanted.contains(&(Tier::Host, chunk))
            };
            let budget = self.prefetch_budget.min(table.budget[device]);
            let free = budget.saturating_sub(table.used(Tier::Device) + short) as usize;
            let mut taken = BTreeSet::new();
            let mut victims = |distance: u32| {
                let candidates: Vec<Candidate> = this
                    .candidates(Tier::Device, false, &this.wanted)
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
                && !self.evict(victim, Tier::Device, Urgency::Soon)?
            {
                break;
            }
            if !self.bring(action.chunk, Tier::Device, Access::Fresh, (Reason::Prefetch, Urgency::Soon))? {
                break;
            }
        }
        Ok(())
    }
}

/// In the host tier a copy that the device also has costs nothing to drop; otherwise the state that the compute thread
/// needs last (optimizer states it never needs) goes to disk, least recently used first.
fn host_victim(candidates: &[Candidate], trace: Option<&crate::schedule::Trace>, now: Moment) -> Option<ChunkId> {
    let distance = |chunk: ChunkId| trace.and_then(|trace| trace.distance_to_any_use(chunk, now)).unwrap_or(u32::MAX);
    candidates
        .iter()
        .max_by_key(|candidate| (candidate.clean, distance(candidate.chunk), std::cmp::Reverse(candidate.last_use)))
        .map(|candidate| candidate.chunk)
}
