//! Copies between tiers as the table has them: planned, claimed by a stream, and done.

use std::time::Duration;

use crate::ages::Stay;
use crate::chunk::ChunkEvent;
use crate::error::RuntimeError;
use crate::health::ActorName;
use crate::memory::SlotIndex;
use crate::stats::{Direction, Reason};
use crate::table::{Place, Table};
use crate::types::{ChunkId, Tier};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MoveId(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MoveStatus {
    /// Waits for its stream.
    Planned,
    /// Its stream works on it.
    Claimed,
}

/// In which order a stream takes its moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Urgency {
    /// The compute thread waits for it.
    Now,
    /// The compute thread will need it, or a side of the optimizer can begin with it.
    Soon,
    /// It makes room, or brings states for an update that nobody waits for.
    Later,
}

/// One copy between tiers, or a zero fill (`from == None`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Move {
    pub chunk: ChunkId,
    pub from: Option<(Tier, SlotIndex)>,
    pub to: (Tier, SlotIndex),
    /// The source slot is freed at the end: an eviction.
    pub drop_source: bool,
    pub reason: Reason,
    pub urgency: Urgency,
    pub status: MoveStatus,
}

impl Move {
    /// The actor whose stream it is for.
    pub fn stream(&self) -> ActorName {
        match (self.from.map(|(tier, _)| tier), self.to.0) {
            (Some(Tier::Disk), _) | (_, Tier::Disk) => ActorName::Disk,
            (_, Tier::Host) => ActorName::DeviceToHost,
            (_, Tier::Device) => ActorName::HostToDevice,
        }
    }

    /// The slot that a chunk leaves for another one on the device.
    pub fn relocates(&self) -> Option<SlotIndex> {
        self.from.filter(|&(tier, _)| tier == Tier::Device && self.to.0 == Tier::Device).map(|(_, slot)| slot)
    }

    pub fn direction(&self) -> Direction {
        match (self.from.map(|(tier, _)| tier), self.to.0) {
            (None, _) => Direction::Zero,
            (Some(Tier::Device), _) => Direction::DeviceToHost,
            (Some(Tier::Disk), _) => Direction::DiskToHost,
            (Some(Tier::Host), Tier::Disk) => Direction::HostToDisk,
            (Some(Tier::Host), _) => Direction::HostToDevice,
        }
    }
}

impl Table {
    /// Enters a move. The destination slot is allocated here; room must have been checked.
    pub fn start_move(
        &mut self,
        chunk: ChunkId,
        from: Option<Tier>,
        to: Tier,
        drop_source: bool,
        (reason, urgency): (Reason, Urgency),
    ) -> Result<MoveId, RuntimeError> {
        let source = match from {
            Some(tier) => {
                Some((tier, self.entry(chunk).place[tier.index()].valid().ok_or(RuntimeError::NoPayload(chunk))?))
            }
            None => {
                self.apply(chunk, ChunkEvent::Allocate)?;
                None
            }
        };
        self.apply(chunk, ChunkEvent::StartMove)?;
        let slot = self.allocate(to)?;
        let id = MoveId(self.next_id());
        let entry = self.entry_mut(chunk);
        entry.place[to.index()] = Place::Filling(slot);
        entry.moving = Some(id);
        entry.prefetched = reason == Reason::Prefetch && to == Tier::Device;
        let to = (to, slot);
        self.moves
            .insert(id, Move { chunk, from: source, to, drop_source, reason, urgency, status: MoveStatus::Planned });
        Ok(id)
    }

    /// Enters the copy of a device chunk to a lower slot, so that its own may lose its memory.
    pub fn relocate(&mut self, chunk: ChunkId) -> Result<(), RuntimeError> {
        let device = Tier::Device.index();
        let from = self.entry(chunk).place[device].valid().ok_or(RuntimeError::NoPayload(chunk))?;
        self.apply(chunk, ChunkEvent::StartMove)?;
        let slot = self.allocate(Tier::Device)?;
        let id = MoveId(self.next_id());
        let entry = self.entry_mut(chunk);
        entry.place[device] = Place::Filling(slot);
        entry.moving = Some(id);
        let relocation = Move {
            chunk,
            from: Some((Tier::Device, from)),
            to: (Tier::Device, slot),
            drop_source: true,
            reason: Reason::Evict,
            urgency: Urgency::Soon,
            status: MoveStatus::Planned,
        };
        self.moves.insert(id, relocation);
        Ok(())
    }

    /// Device chunks in slots that are not handed out any more, and that nobody uses.
    pub fn stragglers(&self) -> Vec<ChunkId> {
        let device = Tier::Device.index();
        let limit = self.slots[device].limit();
        if self.slots[device].available() == 0 || self.slots[device].end() <= limit {
            return Vec::new();
        }
        let above = self.entries.iter().enumerate().filter(|(_, entry)| {
            entry.place[device].valid().is_some_and(|slot| slot.0 >= limit)
                && entry.moving.is_none()
                && entry.leases.iter().all(|&leases| leases == 0)
        });
        above.map(|(index, _)| ChunkId(index as u32)).collect()
    }

    /// The next move of a stream: what a predecessor died over, then the most urgent that the model has left the slots of;
    /// if it is still at all of them, the most urgent.
    pub fn claim_move(&mut self, stream: ActorName) -> Result<Option<(MoveId, Move)>, RuntimeError> {
        if self.failed.is_some() {
            return Ok(None);
        }
        let mut best: Option<((bool, bool, Urgency), MoveId)> = None;
        for (&id, planned) in self.moves.iter().filter(|(_, planned)| planned.stream() == stream) {
            let mut busy = false;
            for (tier, slot) in planned.from.into_iter().chain([planned.to]) {
                busy |= self.slot_event(tier, slot).map_or(Ok(false), |event| event.is_complete().map(|done| !done))?;
            }
            let order = (planned.status != MoveStatus::Claimed, busy, planned.urgency);
            if best.is_none_or(|(first, _)| order < first) {
                best = Some((order, id));
            }
        }
        let claimed = best.and_then(|(_, id)| Some((id, self.moves.get_mut(&id)?)));
        Ok(claimed.map(|(id, claimed)| {
            claimed.status = MoveStatus::Claimed;
            (id, *claimed)
        }))
    }

    /// Ends a move whose copy is done; it took `time` of its stream.
    pub fn complete_move(&mut self, id: MoveId, time: Duration) -> Result<(), RuntimeError> {
        let Some(done) = self.moves.remove(&id) else { return Ok(()) };
        self.tick += 1;
        let tick = self.tick;
        let entry = self.entry_mut(done.chunk);
        entry.place[done.to.0.index()] = Place::Valid(done.to.1);
        entry.moving = None;
        if let Some(from) = done.relocates() {
            self.slots[Tier::Device.index()].free(from)?;
            self.stats.relocated += 1;
            return self.apply(done.chunk, ChunkEvent::EndMove);
        }
        entry.arrived = tick;
        if done.to.0 == Tier::Device {
            entry.stay = Some(Stay::begin());
        }
        self.apply(done.chunk, ChunkEvent::EndMove)?;
        if let (Some((tier, _)), true) = (done.from, done.drop_source) {
            self.free(done.chunk, tier, done.reason == Reason::Evict)?;
        }
        let direction = done.direction() as usize;
        self.stats.moves[direction] += 1;
        self.stats.bytes[direction] += if done.from.is_some() { self.chunk_bytes.0 } else { 0 };
        self.stats.busy[direction] += time;
        self.stats.reasons[done.reason as usize] += 1;
        Ok(())
    }
}
