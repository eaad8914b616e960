//! The memory monitor: measures what is not chunks, and publishes what chunks may use.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::capacity::resize;
use crate::chunk::Layout;
use crate::error::RuntimeError;
use crate::health::ActorName;
use crate::memory::limits::{Available, available_host_memory};
use crate::non_model::NonModel;
use crate::share::Share;
use crate::shared::{Plan, Shared};
use crate::stats::Pressure;
use crate::table::Table;
use crate::types::{Bytes, ChunkId, GroupId, Kind, Moment, Tier};

/// Gauge of the bytes of chunk slots in use, by `tier`. Whoever collects metrics describes it, and the next two.
pub const CHUNK_BYTES: &str = "patrickstar_chunk_bytes";
/// Gauge of device memory that is not chunks.
pub const NON_MODEL_BYTES: &str = "patrickstar_non_model_bytes";
/// Gauge of host memory that this process may still take.
pub const HOST_AVAILABLE_BYTES: &str = "patrickstar_host_available_bytes";

/// Measures non-model memory of the device: activations, workspaces, allocator slack.
pub trait MemoryProbe: Send + Sync {
    /// In use now.
    fn live(&self) -> Bytes;
    /// Highest use since the last call, which it resets.
    fn take_peak(&self) -> Bytes;
    /// Who else holds memory of the device, as was last found: for messages.
    fn neighbours(&self) -> Option<String> {
        None
    }
}

/// A probe for models whose temporaries do not count.
pub struct NoProbe;

impl MemoryProbe for NoProbe {
    fn live(&self) -> Bytes {
        Bytes(0)
    }

    fn take_peak(&self) -> Bytes {
        Bytes(0)
    }
}

/// Turns measurements into budgets.
pub(crate) struct Monitor {
    shared: Arc<Shared>,
    non_model: Arc<NonModel>,
    probe: Arc<dyn MemoryProbe>,
    given: Arc<Mutex<Given>>,
    /// What the budgets in force were computed from.
    published: Vec<u64>,
    /// Memory of slots is still to be given back, or to come.
    unsettled: bool,
    /// Chunks of the largest access or update.
    largest: Option<u32>,
    began: Instant,
}

/// What the monitor was given to share out: a successor goes on with what its predecessor was told last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Given {
    pub device: Bytes,
    /// What neighbours leave of `device`.
    pub left: Bytes,
    /// Memory beside chunks that is never theirs, where the two are apart.
    pub beside: Bytes,
    /// Chunks keep the rest, whatever is measured and whoever else takes memory.
    pub fixed: bool,
    pub share: Share,
    /// Fraction of the measured non-model memory kept free on top of it.
    pub headroom: f64,
}

impl Monitor {
    pub fn new(
        shared: Arc<Shared>,
        non_model: Arc<NonModel>,
        probe: Arc<dyn MemoryProbe>,
        given: Arc<Mutex<Given>>,
    ) -> Self {
        Monitor {
            shared,
            non_model,
            probe,
            given,
            published: Vec::new(),
            unsettled: true,
            largest: None,
            began: Instant::now(),
        }
    }

    fn given(&self) -> MutexGuard<'_, Given> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows what memory is in use, and publishes new budgets when a moment needed more than any step before it.
    pub fn sample(&mut self) -> Result<(), RuntimeError> {
        let slots_in_use = {
            let table = self.shared.lock();
            [Tier::Device, Tier::Host, Tier::Disk].map(|tier| (tier, table.slots[tier.index()].used()))
        };
        for (tier, slots) in slots_in_use {
            let bytes = u64::from(slots) * self.shared.chunk_bytes().0;
            metrics::gauge!(CHUNK_BYTES, "tier" => tier.to_string()).set(bytes as f64);
        }
        metrics::gauge!(NON_MODEL_BYTES).set(self.probe.live().0 as f64);
        if let Available::Known(left) = available_host_memory() {
            metrics::gauge!(HOST_AVAILABLE_BYTES).set(left.0 as f64);
        }
        if self.shared.plan().is_none() {
            return if self.unsettled { self.settle(self.slots()).map(drop) } else { Ok(()) };
        }
        if self.follow_neighbours()? || self.unsettled || self.published != self.non_model.needed() {
            self.publish()?;
        }
        Ok(())
    }

    /// Whether neighbours on the device took or left memory.
    fn follow_neighbours(&mut self) -> Result<bool, RuntimeError> {
        if self.given().fixed {
            return Ok(false);
        }
        let (Some(room), Some(plan)) = (self.shared.backend.room()?, self.shared.plan()) else { return Ok(false) };
        let chunks = u64::from(self.shared.lock().backed) * self.shared.chunk_bytes().0;
        let least = u64::from(self.least_slots(&plan)) * self.shared.chunk_bytes().0;
        let mut given = self.given();
        // What the pool has and what it may still take are both ours.
        let reachable = room.free.0 + chunks + room.pool.0;
        let (asked, before, least) = (given.device, given.left.min(given.device), least + given.beside.0);
        let left = given.share.follow(asked, before, Bytes(least), Bytes(reachable), self.began.elapsed());
        given.left = left;
        if left != before {
            let who = self.probe.neighbours().map(|who| format!(": {who}")).unwrap_or_default();
            tracing::info!("neighbours leave {left} of the {asked} of the device that were asked for{who}");
        }
        drop(given);
        if left < before {
            self.trim_non_model()?;
        }
        Ok(left != before)
    }

    /// Others get what the pool holds beyond what steps were measured to need: of an evaluation, or in pieces.
    fn trim_non_model(&self) -> Result<(), RuntimeError> {
        let (peak, headroom) = (self.non_model.peak(), self.given().headroom);
        // Before the first step nothing is known.
        if peak > Bytes(0) {
            self.shared.backend.trim_non_model(Bytes((peak.0 as f64 * (1.0 + headroom)).ceil() as u64))?;
        }
        Ok(())
    }

    /// Device slots without which the work cannot go on: no access and no update would fit beside the next one, or beside
    /// the chunks that find no place below the device.
    fn least_slots(&mut self, plan: &Plan) -> u32 {
        let layout = &self.shared.layout;
        let table = self.shared.lock();
        let largest = *self.largest.get_or_insert_with(|| {
            let groups = (0..layout.group_count() as u32).map(GroupId);
            let update = groups.map(|group| table.update_request(group, layout).chunks.len()).max();
            plan.trace.largest_moment().max(update.unwrap_or(0)) as u32
        });
        // What an access holds on the device may have its place in host memory all the same: neither counts for the other.
        largest + largest.max(homeless_chunks(layout, plan, self.shared.steps_together(), &table))
    }

    /// Device slots that may be used, in a moment without any non-model memory.
    fn slots(&self) -> u32 {
        let given = *self.given();
        let left = given.device.min(given.left).0.saturating_sub(given.beside.0);
        let capacity = self.shared.lock().slots[Tier::Device.index()].capacity();
        capacity.min((left / self.shared.chunk_bytes().0).min(u64::from(u32::MAX)) as u32)
    }

    /// Device slots beside so much `non_model` memory and what is kept free for its growth, which is not taken from an
    /// `access` of so many chunks.
    fn slots_beside(&self, non_model: Bytes, access: u32) -> u32 {
        let given = *self.given();
        if given.fixed || self.shared.backend.separates_non_model() {
            // Neither can use what the other leaves.
            return u32::MAX;
        }
        let beside = |bytes: u64| {
            let left = given.device.min(given.left).0.saturating_sub(bytes);
            (left / self.shared.chunk_bytes().0).min(u64::from(u32::MAX)) as u32
        };
        let with_headroom = (non_model.0 as f64 * (1.0 + given.headroom)).ceil() as u64;
        beside(with_headroom).max(beside(non_model.0).min(access))
    }

    /// The memory of the slots follows, as far as it can by now.
    fn settle(&mut self, wanted: u32) -> Result<u32, RuntimeError> {
        let backed = resize(&self.shared, wanted)?;
        self.unsettled = backed != self.shared.device.region_end(wanted);
        if self.unsettled {
            self.shared.ring();
        }
        Ok(backed)
    }

    /// Publishes the slots that chunks may use at each moment of the recorded step.
    pub fn publish(&mut self) -> Result<(), RuntimeError> {
        self.shared.health.fault_point(ActorName::Monitor);
        let Some(plan) = self.shared.plan() else { return Ok(()) };
        let peaks = self.non_model.needed();
        let (wanted, backed) = (self.slots(), self.shared.lock().backed);
        // Memory comes before budgets that use it, and goes after those that do not.
        let slots = if wanted > backed { wanted.min(self.settle(wanted)?) } else { wanted };
        let budgets = (0..plan.trace.moments())
            .map(|moment| {
                let access = plan.trace.at(Moment(moment as u32)).len() as u32;
                slots.min(self.slots_beside(Bytes(peaks.get(moment).copied().unwrap_or(0)), access))
            })
            .collect::<Vec<u32>>();
        self.published = peaks;
        let shrinks = |old: &Vec<u32>| old.iter().zip(&budgets).any(|(old, new)| new < old);
        let shrunk = {
            let mut published = self.shared.moment_budgets.write().unwrap_or_else(PoisonError::into_inner);
            let shrunk = published.as_ref().is_some_and(shrinks);
            *published = Some(budgets);
            shrunk
        };
        if shrunk {
            self.shared.lock().stats.count_pressure(Tier::Device, Pressure::Shrink);
        }
        if wanted <= backed {
            self.settle(wanted)?;
        }
        self.shared.ring();
        Ok(())
    }

    /// More or less of the device is kept free.
    pub fn set_headroom(&mut self, headroom: f64) -> Result<(), RuntimeError> {
        self.given().headroom = headroom;
        self.publish()
    }

    /// The device's memory changed hands: a neighbour took some, or gave it back.
    pub fn set_device(&mut self, device: Bytes) -> Result<(), RuntimeError> {
        let others = self.shared.backend.room()?.is_some();
        let before = self.given().device;
        if device < before {
            let neighbours = self.probe.neighbours().map(|who| format!(": {who}")).unwrap_or_default();
            tracing::warn!("the device's budget shrinks from {before} to {device}{neighbours}");
        }
        {
            let mut given = self.given();
            given.device = device;
            // Where neighbours are, the next looks show whether they left it.
            given.left = if others { given.left.min(device) } else { device };
        }
        let slots = self.slots();
        self.shared.lock().budget[Tier::Device.index()] = slots;
        if self.shared.plan().is_none() {
            self.settle(slots)?;
        }
        if device < before {
            self.trim_non_model()?;
        }
        self.publish()?;
        self.shared.ring();
        Ok(())
    }
}

/// Chunks that find no place in host memory or on disk while as many exist as ever do: states, gradients that wait, and
/// what moves need to get past each other.
fn homeless_chunks(layout: &Layout, plan: &Plan, together: bool, table: &Table) -> u32 {
    let is_gradient = |chunk: ChunkId| layout.chunk(chunk).kind == Kind::Gradient;
    let all = (0..layout.chunk_count() as u32).map(ChunkId);
    let (gradients, states): (Vec<ChunkId>, Vec<ChunkId>) = all.partition(|&chunk| is_gradient(chunk));
    let waiting = if together {
        gradients.len()
    } else {
        // Others are used up as they come; those of rows that are looked up in host memory come there at once.
        let moments = (0..plan.trace.moments()).map(|moment| plan.trace.at(Moment(moment as u32)));
        let at_once = moments.map(|chunks| chunks.iter().filter(|&&chunk| is_gradient(chunk)).count());
        let looked_up = plan.trace.chunks_on_host().filter(|&chunk| is_gradient(chunk)).count();
        at_once.max().unwrap_or(0).max(looked_up)
    };
    // A chunk on its way out while another is on its way in, and a group that a checkpoint reads.
    let spare = 2 + states.len().div_ceil(layout.group_count().max(1));
    let below = [Tier::Host, Tier::Disk].map(|tier| table.budget[tier.index()]);
    ((states.len() + waiting + spare) as u32).saturating_sub(below.into_iter().sum())
}
