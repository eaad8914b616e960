//! What all actors and the compute thread share: the table behind its lock, the memory of the tiers, the policies.

#![expect(unsafe_code, reason = "sends leases, which hold addresses, to other threads")]

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use crate::adam::AdamConfig;
use crate::chunk::{Layout, Pass};
use crate::error::RuntimeError;
use crate::health::Health;
use crate::idle::IdleTime;
use crate::memory::{Backend, DeviceMath, DiskTier, Event, Slab, SlotIndex};
use crate::reduction::StepGroup;
use crate::schedule::{Policy, StaticSet, Trace};
use crate::stats::StallCause;
use crate::system::Ring;
use crate::table::{Access, Request, RequestId, Requester, Table};
use crate::timeline::{Timeline, Track};
use crate::types::{Bytes, ChunkId, Moment, Step, Tier};
use crate::updates::{UpdateDue, Updates};

/// Blocks that the model may queue before the device has finished the first of them: enough to hide what queuing costs, and
/// fewer than fill a driver's queue, in front of which its calls would spin.
const RUN_AHEAD: usize = 8;

/// Policies that may change while training runs; they never change the bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvictionPolicy {
    /// How victims are chosen.
    pub policy: Policy,
    /// Moments ahead that are fetched; 0 turns prefetching off.
    pub prefetch: u32,
}

/// The recorded step and what is derived from it.
#[derive(Clone)]
pub(crate) struct Plan {
    pub trace: Arc<Trace>,
    pub static_set: Arc<StaticSet>,
}

/// Progress of reducing one step: survives a panic of the actor that fills it.
#[derive(Default)]
pub(crate) struct StepLedger {
    /// Sum of squares per row of each tile, by group; `None` until reduced.
    pub partials: Vec<Option<Vec<Vec<f64>>>>,
    pub norm: Option<f64>,
    /// A gradient of a scaled loss was not finite: nothing is updated.
    pub overflow: bool,
    /// Every group has been handed to the optimizer.
    pub finished: bool,
}

/// For each group the step last worked on and its pieces that are done: stepping is not idempotent, so a successor must
/// not repeat them.
pub(crate) type SteppedPieces = Vec<(Step, Vec<bool>)>;

pub(crate) struct Shared {
    pub layout: Layout,
    pub table: Mutex<Table>,
    pub changed: Condvar,
    pub backend: Arc<dyn Backend>,
    /// Ends of the blocks that the model has queued, oldest first.
    pub queued: Mutex<VecDeque<Event>>,
    /// Arithmetic on device chunks, where the host cannot do it there.
    pub math: Option<Box<dyn DeviceMath>>,
    pub device: Box<dyn Slab>,
    pub host: Box<dyn Slab>,
    pub disk: Option<DiskTier>,
    pub policies: RwLock<EvictionPolicy>,
    pub plan: RwLock<Option<Plan>>,
    /// Device slots the budget allows per moment, once non-model memory is known.
    pub moment_budgets: RwLock<Option<Vec<u32>>>,
    pub ledger: Mutex<StepLedger>,
    pub stepped: Mutex<SteppedPieces>,
    pub updates: Updates,
    pub idle: IdleTime,
    pub adam: AdamConfig,
    pub clip_norm: f64,
    pub timeline: Arc<Timeline>,
    pub health: Health,
    /// Rings the eviction actor. Capacity 1: a second ring before the first is heard adds nothing.
    pub bell: flume::Sender<Ring>,
    /// Rings of the two sides of the optimizer, device and host.
    pub update_bells: [flume::Sender<UpdateDue>; 2],
}

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, Table> {
        // A panicking actor holds the lock only between whole transitions; see the page of `table`.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn ledger(&self) -> MutexGuard<'_, StepLedger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn stepped(&self) -> MutexGuard<'_, SteppedPieces> {
        self.stepped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn policies(&self) -> EvictionPolicy {
        *self.policies.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn plan(&self) -> Option<Plan> {
        self.plan.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn chunk_bytes(&self) -> Bytes {
        self.layout.chunk_bytes()
    }

    /// Wakes the eviction actor.
    pub fn ring(&self) {
        // Full means a ring is waiting to be heard; closed means the runtime is going down.
        let _ = self.bell.try_send(Ring);
    }

    /// Ends the training with `error`: everybody who waits gets it. The first error wins.
    pub fn fail(&self, error: RuntimeError) {
        // Whoever waits gets it as its error; it is not logged a second time as one.
        tracing::debug!(%error, "runtime failed");
        self.lock().failed.get_or_insert(error);
        self.changed.notify_all();
    }

    pub fn check(&self) -> Result<(), RuntimeError> {
        self.lock().failed.clone().map_or(Ok(()), Err)
    }

    /// Address of a slot in a tier that is memory.
    pub fn address(&self, tier: Tier, slot: SlotIndex) -> *mut u8 {
        match tier {
            Tier::Device => self.device.slot(slot).as_ptr(),
            Tier::Host | Tier::Disk => self.host.slot(slot).as_ptr(),
        }
    }

    /// Waits until all `chunks` can be leased in `tier` together. Whoever calls this holds no other lease, which is what
    /// makes waiting free of deadlock: whatever it waits for is held by someone who does not wait.
    pub fn lease(
        self: &Arc<Self>,
        requester: Requester,
        tier: Tier,
        chunks: Vec<(ChunkId, Access)>,
    ) -> Result<Lease, RuntimeError> {
        self.lease_at(None, requester, tier, chunks)
    }

    /// As [`Shared::lease`], at a moment of the step.
    pub fn lease_at(
        self: &Arc<Self>,
        moment: Option<Moment>,
        requester: Requester,
        tier: Tier,
        chunks: Vec<(ChunkId, Access)>,
    ) -> Result<Lease, RuntimeError> {
        let is_compute = requester == Requester::Compute;
        let mut table = self.lock();
        // Under the same lock as the request is entered or granted: chunks of a moment that has begun would else look like
        // chunks that are not needed any more.
        table.now = moment.unwrap_or(table.now);
        let request = Request { id: RequestId(table.next_id()), tier, chunks, requester };
        let mut queued = false;
        let mut waited_since = self.timeline.now();
        let mut last_cause = None;
        if is_compute {
            table.count_access(&request);
        }
        let slots = loop {
            if let Some(error) = &table.failed {
                let error = error.clone();
                table.requests.retain(|other| other.id != request.id);
                return Err(error);
            }
            let obstacle = table.obstacle(&request, &self.layout);
            if let Some(cause) = last_cause.take().filter(|_| is_compute) {
                self.timeline.span(Track::Stall, waited_since, None, Bytes(0), || cause_name(cause));
                // Behind the end of what was drawn.
                let now = self.timeline.now();
                self.idle.waited(cause, now - waited_since);
                waited_since = now;
            }
            let Some(cause) = obstacle else { break table.grant(&request) };
            if !queued {
                if is_compute {
                    count_late(&mut table, &request);
                }
                table.requests.push_back(request.clone());
                queued = true;
                self.ring();
            }
            last_cause = Some(cause);
            let (guard, _) =
                self.changed.wait_timeout(table, Duration::from_millis(100)).unwrap_or_else(PoisonError::into_inner);
            table = guard;
        };
        drop(table);
        let slots = match slots {
            Ok(slots) => slots,
            Err(error) => {
                self.fail(error.clone());
                return Err(error);
            }
        };
        if queued || is_compute {
            self.ring();
        }
        let mut lease = Lease {
            addresses: slots.iter().map(|&slot| self.address(tier, slot)).collect(),
            shared: Arc::clone(self),
            is_compute,
            tier,
            chunks: request.chunks,
            pass: Pass::Forward,
            released: false,
            began: None,
            drawn_as: None,
        };
        // Held already: what fails here gives the chunks back.
        if is_compute {
            lease.began = self.backend.compute_event()?;
            self.idle.begin(lease.began.clone());
        } else {
            self.wait_for_model(tier, &slots)?;
        }
        Ok(lease)
    }

    /// Notes the end of a queued block, and waits for an older one where too many are queued: a thread that fills the
    /// device's queue would burn a core waiting for room in it.
    fn pace(&self, event: &Event) -> Result<(), RuntimeError> {
        let oldest = {
            let mut queued = self.queued.lock().unwrap_or_else(PoisonError::into_inner);
            queued.push_back(Arc::clone(event));
            // Half of them at once: every wait costs the thread a sleep.
            if queued.len() >= RUN_AHEAD { queued.drain(..RUN_AHEAD / 2).next_back() } else { None }
        };
        oldest.map_or(Ok(()), |event| Ok(event.synchronize()?))
    }

    /// Waits until the model is done with what it queued on `slots`.
    fn wait_for_model(&self, tier: Tier, slots: &[SlotIndex]) -> Result<(), RuntimeError> {
        let events: Vec<_> = {
            let table = self.lock();
            slots.iter().filter_map(|&slot| table.slot_event(tier, slot)).collect()
        };
        events.iter().try_for_each(|event| Ok(event.synchronize()?))
    }

    /// Whether all gradients must be known before any group is updated: their norm, or that none overflowed.
    pub fn steps_together(&self) -> bool {
        self.clip_norm > 0.0 || self.layout.precision().scales_loss()
    }

    /// Enters an update in the queue of its side.
    pub fn hand_over(&self, update: StepGroup) {
        let tier = {
            // Under the table's lock, as whoever waits for an update looks under it.
            let table = self.lock();
            let tier = table.group(update.group).side.tier();
            self.updates.enter(tier, update);
            tier
        };
        self.changed.notify_all();
        // Full means that a ring is waiting to be heard; closed that the runtime is going down.
        let _ = self.update_bells[usize::from(tier != Tier::Device)].try_send(UpdateDue);
        // Its chunks may have to be brought.
        self.ring();
    }

    /// Device slots in the moment of a step that leaves least to chunks.
    pub fn lowest_budget(&self) -> u32 {
        let budgets = self.moment_budgets.read().unwrap_or_else(PoisonError::into_inner);
        let lowest = budgets.as_ref().and_then(|budgets| budgets.iter().copied().min());
        lowest.unwrap_or_else(|| self.lock().budget[Tier::Device.index()])
    }

    /// What the device waited for since the start.
    pub fn count_idle_time(&self) -> Result<(), RuntimeError> {
        let waits = self.idle.take()?;
        let mut table = self.lock();
        table.stats.stalls.iter_mut().zip(waits).for_each(|(sum, more)| *sum += more);
        Ok(())
    }
}

fn cause_name(cause: StallCause) -> String {
    cause.name().to_owned()
}

fn count_late(table: &mut Table, request: &Request) {
    for &(chunk, _) in &request.chunks {
        let entry = table.entry_mut(chunk);
        if entry.prefetched && entry.moving.is_some() {
            entry.prefetched = false;
            table.stats.prefetch_late += 1;
        }
    }
}

/// The right to use resident chunks. While it lives they cannot move; dropping it gives them back.
pub struct Lease {
    shared: Arc<Shared>,
    tier: Tier,
    chunks: Vec<(ChunkId, Access)>,
    addresses: Vec<*mut u8>,
    is_compute: bool,
    pass: Pass,
    released: bool,
    /// Where on the device the work on it begins, if it is queued.
    began: Option<Event>,
    /// What the work is called in the trace.
    drawn_as: Option<String>,
}

// SAFETY: the addresses point into arenas that `shared` keeps alive, and the table gives each chunk either to one writer
// or to readers.
unsafe impl Send for Lease {}

impl Lease {
    /// Address of the `index`-th chunk of the request.
    pub fn address(&self, index: usize) -> *mut u8 {
        self.addresses[index]
    }

    /// The chunks, in the order of the request.
    pub fn chunks(&self) -> &[(ChunkId, Access)] {
        &self.chunks
    }

    /// Address of `chunk`.
    pub fn address_of(&self, chunk: ChunkId) -> Option<*mut u8> {
        self.chunks.iter().position(|&(leased, _)| leased == chunk).map(|index| self.addresses[index])
    }

    /// The tier in which the chunks lie.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// Draws what was done with the chunks since `start`: where it was queued, as long as it takes the device.
    pub fn draw(&mut self, start: Duration, name: impl FnOnce() -> String) {
        if self.began.is_none() {
            self.shared.timeline.span(Track::Compute, start, None, Bytes(0), name);
        } else if self.shared.timeline.is_enabled() {
            self.drawn_as = Some(name());
        }
    }

    /// Gives the chunks back, noting which pass used them.
    pub fn release(self, pass: Pass) -> Result<(), RuntimeError> {
        self.release_and(pass, |_| Ok(()))
    }

    /// Gives the chunks back and changes the table before anybody else can see them unleased.
    pub(crate) fn release_and(
        mut self,
        pass: Pass,
        then: impl FnOnce(&mut Table) -> Result<(), RuntimeError>,
    ) -> Result<(), RuntimeError> {
        self.pass = pass;
        self.give_back(then)
    }

    fn give_back(&mut self, then: impl FnOnce(&mut Table) -> Result<(), RuntimeError>) -> Result<(), RuntimeError> {
        if std::mem::replace(&mut self.released, true) {
            return Ok(());
        }
        // The chunks are given back even where the device does not answer any more.
        let until = if self.is_compute { self.shared.backend.compute_event() } else { Ok(None) };
        let result = {
            let mut table = self.shared.lock();
            let event = until.as_ref().ok().and_then(Option::as_ref);
            if let Some(end) = event {
                self.shared.idle.end(end);
            }
            table.release(self.tier, &self.chunks, self.pass, event).and_then(|()| then(&mut table))
        };
        self.shared.changed.notify_all();
        self.shared.ring();
        result?;
        let Some(end) = until? else { return Ok(()) };
        if let (Some(name), Some(began)) = (self.drawn_as.take(), self.began.take()) {
            self.shared.timeline.queued_span(Track::Compute, name, Bytes(0), began, Event::clone(&end))?;
        }
        self.shared.pace(&end)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Err(error) = self.give_back(|_| Ok(())) {
            self.shared.fail(error);
        }
    }
}
