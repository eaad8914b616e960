//! A copy stream: claims moves, copies without the lock, completes them.

#![expect(unsafe_code, reason = "copies between slots by address")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::RuntimeError;
use crate::health::ActorName;
use crate::memory::{Backend, Event, MemoryError, SlotIndex, Stream};
use crate::moves::{Move, MoveId};
use crate::shared::Shared;
use crate::stats::Reason;
use crate::timeline::Track;
use crate::types::Tier;

/// There is something to copy. Which is in the table: of what is planned a stream takes the most urgent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MovesPlanned;

/// One direction of copying.
pub(crate) struct CopyStream {
    shared: Arc<Shared>,
    name: ActorName,
    backend: Arc<dyn Backend>,
    /// Made for the first move: an error then ends the training with its reason.
    stream: Option<Box<dyn Stream>>,
}

impl CopyStream {
    pub fn new(shared: Arc<Shared>, name: ActorName, backend: Arc<dyn Backend>) -> Self {
        CopyStream { shared, name, backend, stream: None }
    }

    /// Copies until nothing is planned. A move that a predecessor died over is repeated, which is harmless because its
    /// source stays valid until the end.
    pub fn run(&mut self) -> Result<(), RuntimeError> {
        while let Some((id, claimed)) = self.claim()? {
            let time = self.copy(&claimed)?;
            self.shared.health.fault_point(self.name);
            let kind = self.shared.layout.chunk(claimed.chunk).kind;
            let start = self.shared.timeline.now().saturating_sub(time);
            self.shared.timeline.span(
                self.track(),
                start,
                Some((claimed.chunk, kind)),
                self.shared.chunk_bytes(),
                || format!("{} {kind}", verb(claimed.reason)),
            );
            self.shared.lock().complete_move(id, time)?;
            self.shared.changed.notify_all();
            self.shared.ring();
        }
        Ok(())
    }

    fn claim(&self) -> Result<Option<(MoveId, Move)>, RuntimeError> {
        self.shared.lock().claim_move(self.name)
    }

    /// Does one move and says how long its stream copied.
    fn copy(&mut self, claimed: &Move) -> Result<Duration, RuntimeError> {
        let bytes = self.shared.chunk_bytes().0 as usize;
        let (to, slot) = claimed.to;
        let began = Instant::now();
        match claimed.from {
            None => {
                let target = self.shared.address(to, slot);
                // SAFETY: the destination slot is marked `Filling` for this move, so nobody else reads or writes it.
                self.on_stream(claimed, |stream| unsafe { stream.zero(target, bytes) })
            }
            Some((Tier::Disk, source)) => self.disk_read(source, slot, bytes).map(|()| began.elapsed()),
            Some((_, source)) if to == Tier::Disk => self.disk_write(source, slot, bytes).map(|()| began.elapsed()),
            Some((from, source)) => {
                let (source, target) = (self.shared.address(from, source), self.shared.address(to, slot));
                // SAFETY: two slots never overlap; a moving chunk cannot be leased, so the source is not
                // written, and the destination is marked `Filling` for this move.
                self.on_stream(claimed, |stream| unsafe { stream.copy(source, target, bytes) })
            }
        }
    }

    /// Queues work behind what the model still does with the slots, and waits for it: the thread of this actor has nothing
    /// else to do. Returns how long the work took without that.
    fn on_stream(
        &mut self,
        claimed: &Move,
        queue: impl FnOnce(&mut dyn Stream) -> Result<(), MemoryError>,
    ) -> Result<Duration, RuntimeError> {
        let events: Vec<Event> = {
            let table = self.shared.lock();
            claimed
                .from
                .into_iter()
                .chain([claimed.to])
                .filter_map(|(tier, slot)| table.slot_event(tier, slot))
                .collect()
        };
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => self.stream.insert(self.backend.new_stream(self.name.name())?),
        };
        events.iter().try_for_each(|event| stream.wait(event))?;
        let (start, began) = (stream.record()?, Instant::now());
        queue(stream.as_mut())?;
        let end = stream.record()?;
        end.synchronize()?;
        Ok(end.elapsed_since(&start)?.unwrap_or_else(|| began.elapsed()))
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
