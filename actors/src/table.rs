//! The shared table: where every chunk is, who leases it, what is on the way.
//!
//! One lock guards it and is held for microseconds. The compute thread takes a lease here without a message when the
//! chunks are in place, which is the normal case. Only the eviction actor plans moves; a copy stream claims a move,
//! copies without the lock, and completes it. Each transition is whole under the lock, so an actor that panics leaves a
//! table from which its successor goes on.

use std::collections::{BTreeMap, VecDeque};

use crate::ages::{Ages, Stay};
use crate::chunk::{ChunkEvent, ChunkState, Layout, Pass};
use crate::error::RuntimeError;
use crate::memory::{Event, SlotAllocator, SlotIndex};
use crate::moves::{Move, MoveId};
use crate::placement::Side;
use crate::stats::{StallCause, Stats};
use crate::types::{Bytes, ChunkId, GroupId, Kind, Moment, Step, Tier};

/// What a lease allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Others may read too, anywhere.
    Read,
    /// Nobody else; copies in other tiers become invalid.
    Write,
    /// As `Write`; a chunk without payload begins as zeros.
    Fresh,
}

/// A chunk's place in one tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Absent,
    /// A move is writing this slot.
    Filling(SlotIndex),
    Valid(SlotIndex),
}

impl Place {
    pub(crate) fn valid(self) -> Option<SlotIndex> {
        match self {
            Place::Valid(slot) => Some(slot),
            Place::Absent | Place::Filling(_) => None,
        }
    }
}

/// Everything known about one chunk.
#[derive(Debug)]
pub(crate) struct Entry {
    pub state: ChunkState,
    pub place: [Place; 3],
    pub leases: [u32; 3],
    pub write_leased: bool,
    pub last_use: u64,
    pub arrived: u64,
    /// While it is on the device.
    pub stay: Option<Stay>,
    /// Brought by prefetch and not used since.
    pub prefetched: bool,
    pub moving: Option<MoveId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RequestId(pub u64);

/// Who asks, the most urgent first: decides what a request has to wait for, and who gets a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Requester {
    /// Waits for pending updates of the groups it reads.
    Compute,
    /// Reads gradients.
    Reduction,
    /// Reads a group before its next update.
    Checkpoint,
    /// Applies updates; waits for a checkpoint that still has to read the group.
    Optimizer,
}

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub id: RequestId,
    pub tier: Tier,
    pub chunks: Vec<(ChunkId, Access)>,
    pub requester: Requester,
}

/// Flags of a group within a step.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GroupState {
    /// The step whose gradient is complete and whose update is not applied yet: nobody may use its weights.
    pub pending_update: Option<Step>,
    /// A checkpoint has to read it before the next update.
    pub save_wanted: bool,
    /// The gradient has been measured in this step.
    pub measured: bool,
    /// Where it is stepped.
    pub side: Side,
    /// Backward uses still to come in this step.
    pub gradient_uses_left: u32,
}

/// The table itself. See the module's page.
pub(crate) struct Table {
    pub entries: Vec<Entry>,
    pub groups: Vec<GroupState>,
    pub slots: [SlotAllocator; 3],
    /// Device slots that have memory: the first ones.
    pub backed: u32,
    /// Slots that may be used now; at most the capacity.
    pub budget: [u32; 3],
    pub moves: BTreeMap<MoveId, Move>,
    pub requests: VecDeque<Request>,
    pub step: Step,
    pub now: Moment,
    /// The moments are those of a forward pass that no backward follows: nobody will need gradients.
    pub forward_only: bool,
    pub tick: u64,
    pub stats: Stats,
    pub ages: Ages,
    pub peak: [u32; 3],
    /// Device slots in use at most since the moment began.
    pub moment_peak: u32,
    /// The compute thread waits, for something else than a lease.
    pub compute_waits: bool,
    pub failed: Option<RuntimeError>,
    /// For each device slot the end of the last work that the model queued on it: the model runs behind the thread that
    /// queues it, so a slot may still be read when its chunk is not leased any more.
    device_events: Vec<Option<Event>>,
    pub chunk_bytes: Bytes,
    next_id: u64,
}

impl Table {
    pub fn new(layout: &Layout, slots: [SlotAllocator; 3]) -> Self {
        let entries = layout.chunks().iter().map(|_| Entry {
            state: ChunkState::Free,
            place: [Place::Absent; 3],
            leases: [0; 3],
            write_leased: false,
            last_use: 0,
            arrived: 0,
            stay: None,
            prefetched: false,
            moving: None,
        });
        Table {
            entries: entries.collect(),
            groups: vec![GroupState::default(); layout.group_count()],
            budget: std::array::from_fn(|tier| slots[tier].capacity()),
            backed: slots[Tier::Device.index()].capacity(),
            device_events: vec![None; slots[Tier::Device.index()].capacity() as usize],
            slots,
            moves: BTreeMap::new(),
            requests: VecDeque::new(),
            step: Step(0),
            now: Moment(0),
            forward_only: false,
            tick: 0,
            stats: Stats::default(),
            ages: Ages::default(),
            peak: [0; 3],
            moment_peak: 0,
            compute_waits: false,
            failed: None,
            chunk_bytes: layout.chunk_bytes(),
            next_id: 0,
        }
    }

    pub fn entry(&self, chunk: ChunkId) -> &Entry {
        &self.entries[chunk.0 as usize]
    }

    pub fn entry_mut(&mut self, chunk: ChunkId) -> &mut Entry {
        &mut self.entries[chunk.0 as usize]
    }

    pub fn used(&self, tier: Tier) -> u32 {
        self.slots[tier.index()].used()
    }

    /// Slots that may still be allocated under the budget.
    pub fn room(&self, tier: Tier) -> u32 {
        let slots = &self.slots[tier.index()];
        self.budget[tier.index()].saturating_sub(slots.used()).min(slots.available())
    }

    pub fn has_payload(&self, chunk: ChunkId) -> bool {
        self.entry(chunk).place.iter().any(|place| place.valid().is_some())
    }

    pub fn nearest_valid(&self, chunk: ChunkId) -> Option<(Tier, SlotIndex)> {
        let entry = self.entry(chunk);
        Tier::ALL.into_iter().find_map(|tier| Some((tier, entry.place[tier.index()].valid()?)))
    }

    pub fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub fn apply(&mut self, chunk: ChunkId, event: ChunkEvent) -> Result<(), RuntimeError> {
        let entry = self.entry_mut(chunk);
        entry.state = entry.state.apply(event).map_err(|source| RuntimeError::Transition { chunk, source })?;
        Ok(())
    }

    pub fn allocate(&mut self, tier: Tier) -> Result<SlotIndex, RuntimeError> {
        let slot = self.slots[tier.index()].alloc()?;
        self.peak[tier.index()] = self.peak[tier.index()].max(self.used(tier));
        self.moment_peak = self.moment_peak.max(self.used(Tier::Device));
        Ok(slot)
    }

    /// Highest use of the device since the last call.
    pub fn take_moment_peak(&mut self) -> u32 {
        let now = self.used(Tier::Device);
        std::mem::replace(&mut self.moment_peak, now).max(now)
    }

    /// Frees the copy of `chunk` in `tier`, which must be valid and unleased.
    pub fn discard(&mut self, chunk: ChunkId, tier: Tier) -> Result<(), RuntimeError> {
        self.free(chunk, tier, false)
    }

    /// As [`Table::discard`], for the sake of another chunk.
    pub fn make_way(&mut self, chunk: ChunkId, tier: Tier) -> Result<(), RuntimeError> {
        self.free(chunk, tier, true)
    }

    /// As [`Table::discard`]; `evicted` if it left for another chunk.
    pub fn free(&mut self, chunk: ChunkId, tier: Tier, evicted: bool) -> Result<(), RuntimeError> {
        if let Place::Valid(slot) = self.entry(chunk).place[tier.index()] {
            self.slots[tier.index()].free(slot)?;
            self.entry_mut(chunk).place[tier.index()] = Place::Absent;
            if tier == Tier::Device
                && let Some(stay) = self.entry_mut(chunk).stay.take()
            {
                stay.end(evicted, &mut self.ages);
            }
        }
        Ok(())
    }

    /// Counts what an access of the model finds in its tier, and what has to be brought first.
    pub fn count_access(&mut self, request: &Request) {
        for &(chunk, _) in &request.chunks {
            match self.entry(chunk).place[request.tier.index()] {
                Place::Valid(_) => self.stats.hits += 1,
                Place::Absent | Place::Filling(_) => self.stats.misses += 1,
            }
        }
    }

    /// Whether the world allows `request` at all: pending updates and checkpoints come first.
    pub fn is_eligible(&self, request: &Request, layout: &Layout) -> bool {
        request.chunks.iter().all(|&(chunk, _)| {
            let info = layout.chunk(chunk);
            let group = &self.groups[info.group.0 as usize];
            match request.requester {
                Requester::Compute => group.pending_update.is_none(),
                // A group that is still to be saved is not updated before: what lies there is the state to save, even
                // if the next gradient is complete already.
                Requester::Checkpoint => group.save_wanted || group.pending_update.is_none(),
                Requester::Optimizer => !group.save_wanted,
                Requester::Reduction => true,
            }
        })
    }

    /// What the update of a group leases: all its chunks, on its side.
    pub fn update_request(&self, group: GroupId, layout: &Layout) -> Request {
        let of_kind =
            |kind: Kind, access: Access| layout.group_chunks(group, kind).iter().map(move |&chunk| (chunk, access));
        let states = layout.precision().persistent_kinds().iter().flat_map(|&kind| of_kind(kind, Access::Write));
        Request {
            id: RequestId(0),
            tier: self.group(group).side.tier(),
            chunks: states.chain(of_kind(Kind::Gradient, Access::Read)).collect(),
            requester: Requester::Optimizer,
        }
    }

    /// Why `request` cannot be granted now; `None` when it can.
    pub fn obstacle(&self, request: &Request, layout: &Layout) -> Option<StallCause> {
        if !self.is_eligible(request, layout) {
            let to_save = request.chunks.iter().any(|&(chunk, _)| self.group(layout.chunk(chunk).group).save_wanted);
            return Some(if to_save { StallCause::Checkpoint } else { StallCause::Optimizer });
        }
        let tier = request.tier.index();
        for &(chunk, access) in &request.chunks {
            let entry = self.entry(chunk);
            if entry.moving.is_some() {
                return Some(StallCause::Copy);
            }
            if entry.place[tier].valid().is_none() {
                return Some(StallCause::Slot);
            }
            let leased = entry.leases.iter().any(|&leases| leases > 0);
            if entry.write_leased || (access != Access::Read && leased) {
                return Some(StallCause::Optimizer);
            }
        }
        if self.slots[tier].used() > self.budget[tier] {
            return Some(StallCause::Budget);
        }
        None
    }

    /// Takes the leases of a request without obstacle; slots in the order of its chunks.
    pub fn grant(&mut self, request: &Request) -> Result<Vec<SlotIndex>, RuntimeError> {
        let tier = request.tier;
        let mut slots = Vec::with_capacity(request.chunks.len());
        for &(chunk, access) in &request.chunks {
            self.apply(chunk, ChunkEvent::Lease)?;
            self.tick += 1;
            let tick = self.tick;
            let entry = self.entry_mut(chunk);
            entry.leases[tier.index()] += 1;
            entry.last_use = tick;
            let was_prefetched = std::mem::take(&mut entry.prefetched);
            let slot = entry.place[tier.index()].valid().ok_or(RuntimeError::NoPayload(chunk))?;
            slots.push(slot);
            if was_prefetched && tier == Tier::Device {
                self.stats.prefetch_useful += 1;
            }
            if tier == Tier::Device
                && let Some(stay) = &mut self.entries[chunk.0 as usize].stay
            {
                stay.used(&mut self.ages);
            }
            if access != Access::Read {
                self.entry_mut(chunk).write_leased = true;
                for other in Tier::ALL.into_iter().filter(|&other| other != tier) {
                    self.discard(chunk, other)?;
                }
            }
        }
        self.requests.retain(|queued| queued.id != request.id);
        Ok(slots)
    }

    /// What must be over before anybody but the model touches a slot.
    pub fn slot_event(&self, tier: Tier, slot: SlotIndex) -> Option<Event> {
        (tier == Tier::Device).then(|| self.device_events.get(slot.0 as usize)?.clone()).flatten()
    }

    /// Gives leases back; `until` is the end of what was queued on the chunks.
    pub fn release(
        &mut self,
        tier: Tier,
        chunks: &[(ChunkId, Access)],
        pass: Pass,
        until: Option<&Event>,
    ) -> Result<(), RuntimeError> {
        for &(chunk, access) in chunks {
            if let (Some(event), Some(slot)) = (until, self.entry(chunk).place[tier.index()].valid())
                && tier == Tier::Device
                && let Some(place) = self.device_events.get_mut(slot.0 as usize)
            {
                *place = Some(event.clone());
            }
            let entry = self.entry_mut(chunk);
            entry.leases[tier.index()] = entry.leases[tier.index()].saturating_sub(1);
            if access != Access::Read {
                entry.write_leased = false;
            }
            self.apply(chunk, ChunkEvent::ReleaseAfter(pass))?;
        }
        Ok(())
    }

    /// Forgets the payload of an unleased chunk: a gradient that was applied.
    pub fn drop_payload(&mut self, chunk: ChunkId) -> Result<(), RuntimeError> {
        for tier in Tier::ALL {
            self.discard(chunk, tier)?;
        }
        self.apply(chunk, ChunkEvent::Release)
    }

    /// State of a group.
    pub fn group(&self, group: GroupId) -> &GroupState {
        &self.groups[group.0 as usize]
    }

    /// Group state for change.
    pub fn group_mut(&mut self, group: GroupId) -> &mut GroupState {
        &mut self.groups[group.0 as usize]
    }

    /// Chunk bytes in use per tier and kind.
    pub fn use_by_kind(&self, layout: &Layout) -> [[u64; 6]; 3] {
        let mut bytes = [[0; 6]; 3];
        for (entry, info) in self.entries.iter().zip(layout.chunks()) {
            for tier in Tier::ALL {
                if entry.place[tier.index()] != Place::Absent {
                    bytes[tier.index()][info.kind.index()] += self.chunk_bytes.0;
                }
            }
        }
        bytes
    }
}
