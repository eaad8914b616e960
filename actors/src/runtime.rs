//! The handle that a model uses: begin a step, access chunks, release them, end the step.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::adam::AdamConfig;
use crate::chunk::{Layout, Pass};
use crate::error::RuntimeError;
use crate::health::{ActorName, Health};
use crate::idle::IdleTime;
use crate::memory::{Arena, Backend, DiskTier, SlotAllocator};
use crate::monitor::MemoryProbe;
use crate::non_model::NonModel;
use crate::placement::{Side, SplitCosts, SplitRoom};
use crate::reader::ChunkReader;
use crate::reduction::GradientReady;
use crate::schedule::{StaticSet, Trace, TraceRecorder};
use crate::shared::{EvictionPolicy, Lease, Plan, Shared, StepLedger};
use crate::split::{Splitter, check_sides};
use crate::stats::{StallCause, Stats, TierUse};
pub use crate::step::{StepStart, StepStats};
use crate::system::{ActorSystem, MonitorMessage, Parts, Retune};
use crate::table::{Access, Requester, Table};
use crate::timeline::{ResidencySnapshot, Timeline, Track};
use crate::types::{Bytes, ChunkId, GroupId, Kind, Moment, Step, Tier};
use crate::updates::Updates;

/// Everything a runtime needs to know.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// Device memory, for chunks and for what is not chunks.
    pub device: Bytes,
    /// Device memory assumed to be needed beside chunks until it has been measured.
    pub non_model: Bytes,
    /// Slots in host memory.
    pub host_slots: u32,
    /// Slots on disk; 0 for no disk tier.
    pub disk_slots: u32,
    /// File of the disk tier.
    pub disk_path: PathBuf,
    /// Policies that may change later.
    pub eviction: EvictionPolicy,
    /// Where each group is stepped.
    pub sides: Vec<Side>,
    /// For groups that may change sides while training: device slots and working set as planned, and what the parts of a
    /// step are estimated to cost until they have been measured.
    pub split: Option<(SplitRoom, SplitCosts)>,
    /// Adam's constants.
    pub adam: AdamConfig,
    /// Global-norm clipping; 0 for none.
    pub clip_norm: f64,
    /// Messages an inbox holds before its senders wait.
    pub mailbox: usize,
    /// Threads of the optimizer; 0 for all cores.
    pub optimizer_threads: usize,
    /// Chunks keep what `non_model` leaves, whatever is measured and whoever takes memory of the device.
    pub fixed_share: bool,
    /// Fraction of the measured non-model memory kept free on top of it.
    pub headroom: f64,
    /// Time between two looks of the monitor.
    pub monitor_interval: Duration,
}

/// The chunk runtime. One thread, the compute thread, drives it.
pub struct Runtime {
    system: ActorSystem,
    pub(crate) shared: Arc<Shared>,
    pub(crate) probe: Arc<dyn MemoryProbe>,
    pub(crate) non_model: Arc<NonModel>,
    /// Backward uses of each group in a step.
    gradient_uses: Vec<u32>,
    step: StepState,
    recorder: Option<TraceRecorder>,
    splitter: Option<Splitter>,
    /// Sides that groups take once no update of theirs is pending.
    sides: Vec<Side>,
    /// Sides that somebody asked for, from the next step on.
    wanted_sides: Mutex<Option<Vec<Side>>>,
    device: Bytes,
    device_peak: Bytes,
}

impl Drop for Runtime {
    fn drop(&mut self) {
        // Whoever waits for a chunk would wait for actors that are about to stop.
        self.shared.fail(RuntimeError::Stopped("it is shutting down".into()));
    }
}

struct StepState {
    start: StepStart,
    moment: u32,
    began: Instant,
    before: Stats,
}

impl Runtime {
    /// Sets up the tiers and starts the actors. `gradient_uses[g]` says how many blocks accumulate into group `g`.
    pub fn start(
        layout: Layout,
        config: RuntimeConfig,
        gradient_uses: Vec<u32>,
        backend: Arc<dyn Backend>,
        probe: Arc<dyn MemoryProbe>,
        timeline: Arc<Timeline>,
    ) -> Result<Self, RuntimeError> {
        let chunk = layout.chunk_bytes();
        let all = layout.chunk_count() as u32;
        // No more slots than there are chunks: a device larger than the model leaves the rest to others.
        let beside = if config.fixed_share || backend.separates_non_model() { config.non_model.0 } else { 0 };
        let fitting = config.device.0.saturating_sub(beside) / chunk.0;
        let device_slots = (fitting.min(u64::from(u32::MAX)) as u32).min(all);
        let slots = [
            SlotAllocator::new(Tier::Device, device_slots),
            SlotAllocator::new(Tier::Host, config.host_slots),
            SlotAllocator::new(Tier::Disk, config.disk_slots),
        ];
        let mut table = Table::new(&layout, slots);
        let left = config.device.0.saturating_sub(config.non_model.0) / chunk.0;
        table.budget[Tier::Device.index()] = device_slots.min(left.min(u64::from(u32::MAX)) as u32);
        let groups = layout.group_count();
        check_sides(&config.sides, groups)?;
        if gradient_uses.len() != groups {
            let given = gradient_uses.len();
            return Err(RuntimeError::Misuse(format!("gradient uses are given for {given} groups of {groups}")));
        }
        for (group, &side) in table.groups.iter_mut().zip(&config.sides) {
            group.side = side;
        }
        let disk = (config.disk_slots > 0)
            .then(|| DiskTier::create(&config.disk_path, config.disk_slots, chunk))
            .transpose()?;
        let (bell, bell_rx) = flume::bounded(1);
        let ((device_bell, device_bell_rx), (host_bell, host_bell_rx)) = (flume::bounded(1), flume::bounded(1));
        let shared = Arc::new(Shared {
            device: backend.device_slab(device_slots, chunk)?,
            host: backend.host_slab(Arena::new(Tier::Host, config.host_slots, chunk)?)?,
            disk,
            table: Mutex::new(table),
            changed: Condvar::new(),
            backend: Arc::clone(&backend),
            queued: Mutex::default(),
            math: backend.math()?,
            policies: RwLock::new(config.eviction),
            plan: RwLock::new(None),
            moment_budgets: RwLock::new(None),
            ledger: Mutex::new(StepLedger::default()),
            stepped: Mutex::new(vec![(Step(0), Vec::new()); groups]),
            updates: Updates::default(),
            idle: IdleTime::default(),
            adam: config.adam,
            clip_norm: config.clip_norm,
            timeline,
            health: Health::default(),
            bell,
            update_bells: [device_bell, host_bell],
            layout,
        });
        backend.cap_non_model(Bytes(config.device.0.saturating_sub(u64::from(device_slots) * chunk.0)))?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(config.optimizer_threads)
            .thread_name(|index| format!("ps-adam-{index}"))
            .build()
            .map_err(|error| RuntimeError::Stopped(format!("no threads for the optimizer: {error}")))?;
        let non_model = Arc::new(NonModel::default());
        let system = ActorSystem::start(Parts {
            shared: Arc::clone(&shared),
            backend,
            probe: Arc::clone(&probe),
            bell: bell_rx,
            update_bells: [device_bell_rx, host_bell_rx],
            mailbox: config.mailbox.max(1),
            pool: Arc::new(pool),
            non_model: Arc::clone(&non_model),
            device: config.device,
            beside: Bytes(beside),
            fixed: config.fixed_share,
            headroom: config.headroom,
            interval: config.monitor_interval,
        })?;
        let step = StepState {
            start: StepStart::new(Step(0), 0.0),
            moment: 0,
            began: Instant::now(),
            before: Stats::default(),
        };
        let device = config.device;
        let parameters = shared.layout.parameters();
        let splitter = config.split.map(|(room, costs)| Splitter::new(room, costs, &config.sides, parameters));
        Ok(Runtime {
            system,
            shared,
            probe,
            non_model,
            gradient_uses,
            step,
            recorder: None,
            splitter,
            sides: config.sides,
            wanted_sides: Mutex::default(),
            device,
            device_peak: Bytes(0),
        })
    }

    /// Where tensors lie.
    pub fn layout(&self) -> &Layout {
        &self.shared.layout
    }

    /// Reads chunks of one group, wherever they are, in host memory; waits for pending updates.
    pub fn read(&self, chunks: &[ChunkId], read: impl FnOnce(&[&[u8]])) -> Result<(), RuntimeError> {
        self.reader().read(chunks, read)
    }

    /// A handle that reads chunks from another thread, for checkpoints written while training goes on.
    pub fn reader(&self) -> ChunkReader {
        ChunkReader { shared: Arc::clone(&self.shared) }
    }

    /// Waits until the device copies from and to all of host memory at full speed; tells what keeps it from that.
    pub fn registered(&self) -> Result<(), RuntimeError> {
        Ok(self.shared.host.registered()?)
    }

    /// Begins a step: the first one records the trace.
    pub fn begin_step(&mut self, start: StepStart) -> Result<(), RuntimeError> {
        self.registered()?;
        self.drain_reduction()?;
        self.shared.check()?;
        if let Some(sides) = self.wanted_sides.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            (self.sides, self.splitter) = (sides, None);
        }
        if self.shared.plan().is_none() {
            self.recorder = Some(TraceRecorder::new());
        }
        {
            let mut table = self.shared.lock();
            for (group, &uses) in table.groups.iter_mut().zip(&self.gradient_uses) {
                group.gradient_uses_left = uses;
                group.measured = false;
            }
            // An update that is under way ends on the side where it began.
            for (group, &side) in table.groups.iter_mut().zip(&self.sides) {
                if group.pending_update.is_none() {
                    group.side = side;
                }
            }
            (table.step, table.now, table.forward_only) = (start.step, Moment(0), false);
        }
        let before = self.stats();
        self.step = StepState { start, moment: 0, began: Instant::now(), before };
        self.open_ledger();
        Ok(())
    }

    /// Leases `chunks` in `tier` for the compute thread: the next moment of the step.
    pub fn access(
        &mut self,
        label: impl Fn() -> String,
        tier: Tier,
        chunks: Vec<(ChunkId, Access)>,
    ) -> Result<Lease, RuntimeError> {
        let moment = self.enter_moment(&label, tier, &chunks);
        self.shared.lease_at(Some(moment), Requester::Compute, tier, chunks)
    }

    fn enter_moment(&mut self, label: &impl Fn() -> String, tier: Tier, chunks: &[(ChunkId, Access)]) -> Moment {
        let moment = Moment(self.step.moment);
        self.close_moment();
        if let Some(recorder) = &mut self.recorder {
            let ids: Vec<ChunkId> = chunks.iter().map(|&(chunk, _)| chunk).collect();
            match tier {
                Tier::Device => recorder.access(&ids),
                Tier::Host | Tier::Disk => recorder.access_on_host(&ids),
            };
        }
        if self.shared.timeline.is_enabled() {
            self.snapshot(moment, label());
        }
        self.step.moment += 1;
        moment
    }

    /// Books what the moment that ends now needed on the device.
    fn close_moment(&mut self) {
        let non_model = self.probe.take_peak();
        let chunks = u64::from(self.shared.lock().take_moment_peak()) * self.shared.chunk_bytes().0;
        if let Some(moment) = self.step.moment.checked_sub(1) {
            self.non_model.note(Moment(moment), non_model);
            self.device_peak = self.device_peak.max(Bytes(chunks + non_model.0));
        }
    }

    /// Highest use of the device in any moment so far: chunks and non-model memory together.
    pub fn device_peak(&self) -> Bytes {
        self.device_peak
    }

    fn snapshot(&self, moment: Moment, label: String) {
        let table = self.shared.lock();
        let tiers = (0..table.entries.len())
            .map(|index| table.nearest_valid(ChunkId(index as u32)).map(|(tier, _)| tier))
            .collect();
        let used = std::array::from_fn(|tier| Bytes(u64::from(table.slots[tier].used()) * self.shared.chunk_bytes().0));
        drop(table);
        let non_model = self.probe.live();
        self.shared.timeline.snapshot(ResidencySnapshot { moment, label, tiers, used, non_model });
    }

    /// Gives a forward lease back.
    pub fn release_forward(&self, lease: Lease) -> Result<(), RuntimeError> {
        lease.release(Pass::Forward)
    }

    /// Gives a backward lease back; groups whose last use this was go to reduction.
    pub fn release_backward(&mut self, lease: Lease) -> Result<(), RuntimeError> {
        let gradients: Vec<GroupId> = lease
            .chunks()
            .iter()
            .map(|&(chunk, _)| self.shared.layout.chunk(chunk))
            .filter(|info| info.kind == Kind::Gradient)
            .map(|info| info.group)
            .collect();
        let mut ready = Vec::new();
        {
            let mut table = self.shared.lock();
            for group in gradients {
                let state = table.group_mut(group);
                state.gradient_uses_left = state.gradient_uses_left.saturating_sub(1);
                if state.gradient_uses_left == 0 {
                    state.pending_update = Some(self.step.start.step);
                    ready.push(group);
                }
            }
        }
        lease.release(Pass::Backward)?;
        for group in ready {
            let message = GradientReady { step: self.step.start, group };
            self.system
                .inboxes
                .reduction
                .send(message)
                .map_err(|_| RuntimeError::Stopped("the reduction actor is gone".into()))?;
        }
        Ok(())
    }

    /// Ends the step: waits for the gradient norm, not for the optimizer, which goes on under the next forward.
    pub fn end_step(&mut self) -> Result<StepStats, RuntimeError> {
        self.close_moment();
        self.non_model.step_over();
        self.drain_reduction()?;
        if let Some(recorder) = self.recorder.take() {
            self.adopt_trace(recorder.finish())?;
        }
        let (gradient_norm, overflow) = {
            let ledger = self.shared.ledger();
            (ledger.norm.unwrap_or(0.0), ledger.overflow)
        };
        let stats = self.stats().since(&self.step.before);
        let elapsed = self.step.began.elapsed();
        if let Some(splitter) = &mut self.splitter
            && let Some(sides) = splitter.after(&stats, elapsed, self.shared.lowest_budget())
        {
            self.sides = sides;
        }
        Ok(StepStats {
            step: self.step.start.step,
            elapsed,
            gradient_norm,
            overflow,
            stats,
            device: self.tier_use(Tier::Device),
            host: self.tier_use(Tier::Host),
            non_model_peak: self.non_model.peak(),
        })
    }

    fn adopt_trace(&self, trace: Trace) -> Result<(), RuntimeError> {
        let budget = self.shared.lock().budget[Tier::Device.index()];
        let static_set = StaticSet::new(&trace, budget as usize);
        *self.shared.plan.write().unwrap_or_else(PoisonError::into_inner) =
            Some(Plan { trace: Arc::new(trace), static_set: Arc::new(static_set) });
        self.system.tell_monitor(MonitorMessage::Publish)
    }

    fn open_ledger(&self) {
        let groups = self.shared.layout.group_count();
        *self.shared.ledger() = StepLedger { partials: vec![None; groups], ..StepLedger::default() };
    }

    /// Waits until every gradient of the step has been measured and every group handed to the optimizer.
    fn drain_reduction(&self) -> Result<(), RuntimeError> {
        if self.step.start.step == Step(0) {
            return Ok(());
        }
        self.wait(StallCause::Reduction, |shared, _| shared.ledger().finished)
    }

    /// Waits until all updates are applied.
    pub fn drain(&self) -> Result<(), RuntimeError> {
        self.drain_reduction()?;
        self.wait(StallCause::Optimizer, |_, table| table.groups.iter().all(|group| group.pending_update.is_none()))
    }

    fn wait(&self, cause: StallCause, done: impl Fn(&Shared, &Table) -> bool) -> Result<(), RuntimeError> {
        let start = self.shared.timeline.now();
        let mut table = self.shared.lock();
        while !done(&self.shared, &table) {
            if let Some(error) = &table.failed {
                return Err(error.clone());
            }
            table.compute_waits = true;
            let (guard, _) = self
                .shared
                .changed
                .wait_timeout(table, Duration::from_millis(20))
                .unwrap_or_else(PoisonError::into_inner);
            table = guard;
        }
        table.compute_waits = false;
        drop(table);
        self.shared.idle.waited(cause, self.shared.timeline.now() - start);
        self.shared.timeline.span(Track::Stall, start, None, Bytes(0), || cause.name().to_owned());
        Ok(())
    }

    /// Whether a step's groups are updated together, in forward order under the next forward, once all gradients are known;
    /// else each as soon as its own is, in backward order.
    pub fn steps_together(&self) -> bool {
        self.shared.steps_together()
    }

    /// Counters since the start.
    pub fn stats(&self) -> Stats {
        if let Err(error) = self.shared.count_idle_time() {
            self.shared.fail(error);
        }
        self.shared.lock().stats.clone()
    }

    /// Use of a tier.
    pub fn tier_use(&self, tier: Tier) -> TierUse {
        self.shared.lock().tier_use(tier)
    }

    /// Chunk bytes per tier and kind.
    pub fn use_by_kind(&self) -> [[u64; 6]; 3] {
        self.shared.lock().use_by_kind(&self.shared.layout)
    }

    /// The recorded step, once there is one.
    pub fn trace(&self) -> Option<Arc<Trace>> {
        self.shared.plan().map(|plan| plan.trace)
    }

    /// Device memory that was asked for.
    pub fn device(&self) -> Bytes {
        self.device
    }

    /// New policies while training runs. Sides that are asked for are not changed by measurements any more.
    pub fn retune(&self, mut retune: Retune) -> Result<(), RuntimeError> {
        if let Some(sides) = retune.sides.take() {
            check_sides(&sides, self.shared.layout.group_count())?;
            *self.wanted_sides.lock().unwrap_or_else(PoisonError::into_inner) = Some(sides);
        }
        self.system.retune(&self.shared, retune)
    }

    /// Where each group is stepped, or will be once the update under way is applied.
    pub fn sides(&self) -> &[Side] {
        &self.sides
    }

    /// Makes an actor panic in the middle of its next piece of work, to test that it is restored.
    pub fn plant_panic(&self, actor: ActorName) {
        self.shared.health.plant_panic(actor);
    }

    /// Marks all groups to be read by a checkpoint before their next update.
    pub fn begin_save(&self) -> Result<(), RuntimeError> {
        self.shared.check()?;
        for group in &mut self.shared.lock().groups {
            group.save_wanted = true;
        }
        Ok(())
    }

    /// The shared timeline.
    pub fn timeline(&self) -> &Arc<Timeline> {
        &self.shared.timeline
    }
}
