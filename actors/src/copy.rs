//! A copy stream: claims moves, copies without the lock, completes them.

#![expect(unsafe_code, reason = "copies between slots by address")]

use std::sync::Arc;

use crate::error::RuntimeError;
use crate::health::ActorName;
use crate::memory::{Backend, MemoryError, SlotIndex, Stream};
use crate::shared::Shared;
use crate::stats::Reason;
use crate::table::{Move, MoveId, MoveStatus};
use crate::timeline::Track;
use crate::types::Tier;

/// One direction of copying.
pub(crate) struct CopyStream {
    shared: Arc<Shared>,
    name: ActorName,
    backend: Arc<dyn Backend>,
    /// Made for the first move: an error then ends the training with its reason.
    stream: Option<Box<dyn Stream>>,
    /// The move in hand: a successor repeats it, which is harmless because the source stays valid until the end.
    claimed: Option<MoveId>,
}

impl CopyStream {
    pub fn new(shared: Arc<Shared>, name: ActorName, backend: Arc<dyn Backend>) -> Self {
        CopyStream { shared, name, backend, stream: None, claimed: None }
    }

    /// Executes one move; moves that another incarnation finished are passed over.
    pub fn run(&mut self, id: MoveId) -> Result<(), RuntimeError> {
        let Some(claimed) = self.claim(id) else {
            self.shared.ring(); // a place in the queue became free
            return Ok(());
        };
        let start = self.shared.timeline.now();
        self.copy(&claimed)?;
        self.shared.health.fault_point(self.name);
        let kind = self.shared.layout.chunk(claimed.chunk).kind;
        self.shared.timeline.span(self.track(), start, Some((claimed.chunk, kind)), self.shared.chunk_bytes(), || {
            format!("{} {kind}", verb(claimed.reason))
        });
        self.shared.lock().complete_move(id)?;
        self.claimed = None;
        self.shared.changed.notify_all();
        self.shared.ring();
        Ok(())
    }

    fn claim(&mut self, id: MoveId) -> Option<Move> {
        let mut table = self.shared.lock();
        let entry = table.moves.get_mut(&id)?;
        // Claimed by this very stream: its last incarnation died over it. No other stream serves this direction.
        if entry.status == MoveStatus::Claimed && self.claimed != Some(id) {
            tracing::debug!(move_id = id.0, "repeating a copy after a restart");
        }
        entry.status = MoveStatus::Claimed;
        self.claimed = Some(id);
        Some(*entry)
    }

    fn copy(&mut self, claimed: &Move) -> Result<(), RuntimeError> {
        let bytes = self.shared.chunk_bytes().0 as usize;
        let (to, slot) = claimed.to;
        let events = {
            let table = self.shared.lock();
            let from = claimed.from.and_then(|(tier, slot)| table.slot_event(tier, slot));
            [from, table.slot_event(to, slot)]
        };
        let order = |stream: &mut dyn Stream| events.iter().flatten().try_for_each(|event| stream.wait(event));
        match claimed.from {
            None => {
                let target = self.shared.address(to, slot);
                // SAFETY: the destination slot is marked `Filling` for this move, so nobody else reads or writes it.
                self.on_stream(|stream| order(stream).and_then(|()| unsafe { stream.zero(target, bytes) }))?;
            }
            Some((Tier::Disk, source)) => self.disk_read(source, slot, bytes)?,
            Some((_, source)) if to == Tier::Disk => self.disk_write(source, slot, bytes)?,
            Some((from, source)) => {
                let (source, target) = (self.shared.address(from, source), self.shared.address(to, slot));
                // SAFETY: two slots of two arenas never overlap; a moving chunk cannot be leased, so the source is not
                // written, and the destination is marked `Filling` for this move.
                self.on_stream(|stream| order(stream).and_then(|()| unsafe { stream.copy(source, target, bytes) }))?;
            }
        }
        Ok(())
    }

    /// Queues work and waits for it: the thread of this actor has nothing else to do.
    fn on_stream(
        &mut self,
        queue: impl FnOnce(&mut dyn Stream) -> Result<(), MemoryError>,
    ) -> Result<(), RuntimeError> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => self.stream.insert(self.backend.new_stream(self.name.name())?),
        };
        queue(stream.as_mut())?;
        Ok(stream.record()?.synchronize()?)
    }

    fn disk_read(&self, source: SlotIndex, slot: SlotIndex, bytes: usize) -> Result<(), RuntimeError> {
        let disk = self.shared.disk.as_ref().ok_or_else(|| RuntimeError::Stopped("there is no disk tier".into()))?;
        // SAFETY: the host slot is marked `Filling` for this move.
        let target = unsafe { std::slice::from_raw_parts_mut(self.shared.address(Tier::Host, slot), bytes) };
        Ok(disk.read(source, target)?)
    }

    fn disk_write(&self, source: SlotIndex, slot: SlotIndex, bytes: usize) -> Result<(), RuntimeError> {
        let disk = self.shared.disk.as_ref().ok_or_else(|| RuntimeError::Stopped("there is no disk tier".into()))?;
        // SAFETY: a moving chunk cannot be leased, so nobody writes the source.
        let source = unsafe { std::slice::from_raw_parts(self.shared.address(Tier::Host, source), bytes) };
        Ok(disk.write(slot, source)?)
    }

    fn track(&self) -> Track {
        match self.name {
            ActorName::HostToDevice => Track::HostToDevice,
            ActorName::DeviceToHost => Track::DeviceToHost,
            _ => Track::Disk,
        }
    }
}

fn verb(reason: Reason) -> &'static str {
    match reason {
        Reason::Demand => "fetch",
        Reason::Prefetch => "prefetch",
        Reason::Evict => "evict",
        Reason::Offload => "offload",
    }
}
