//! Starts the actors on their own threads and stops them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use actix::prelude::*;

use crate::copy::{CopyStream, MovesPlanned};
use crate::error::RuntimeError;
use crate::eviction::{Eviction, Streams};
use crate::health::ActorName;
use crate::memory::Backend;
use crate::monitor::{Given, MemoryProbe, Monitor};
use crate::non_model::NonModel;
use crate::optimizer::Optimizer;
use crate::placement::Side;
use crate::reduction::{GradientReady, Reduction};
use crate::schedule::Policy;
use crate::share::Share;
use crate::shared::{EvictionPolicy, Shared};
use crate::shell::{Post, Shell, Worker};
use crate::stats::Pressure;
use crate::supervisor::{Adopt, Supervisor};
use crate::types::{Bytes, Tier};
use crate::updates::UpdateDue;

/// What the eviction actor hears.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring;

/// What the monitor is asked.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MonitorMessage {
    /// The trace is known: publish budgets.
    Publish,
    /// Time to look.
    Sample,
    /// The device's memory changed.
    SetDevice(Bytes),
    /// More or less of it is kept free.
    SetHeadroom(f64),
}

/// New policies for a running training. `None` leaves a value.
#[derive(Clone, Debug, Default)]
pub struct Retune {
    /// How victims are chosen.
    pub policy: Option<Policy>,
    /// Moments ahead that are fetched.
    pub prefetch: Option<u32>,
    /// Memory of the device.
    pub device: Option<Bytes>,
    /// Host memory for chunks, up to what there was in the beginning.
    pub host: Option<Bytes>,
    /// Fraction of the measured non-model memory kept free on top of it.
    pub headroom: Option<f64>,
    /// Where each group is stepped.
    pub sides: Option<Vec<Side>>,
}

impl Worker for Eviction {
    type Message = Ring;
    fn handle(&mut self, _: Ring) -> Result<(), RuntimeError> {
        self.run()
    }
}

impl Worker for CopyStream {
    type Message = MovesPlanned;
    fn handle(&mut self, _: MovesPlanned) -> Result<(), RuntimeError> {
        self.run()
    }
}

impl Worker for Reduction {
    type Message = GradientReady;
    fn handle(&mut self, message: GradientReady) -> Result<(), RuntimeError> {
        self.run(message)
    }
}

impl Worker for Optimizer {
    type Message = UpdateDue;
    fn handle(&mut self, _: UpdateDue) -> Result<(), RuntimeError> {
        self.run()
    }
}

impl Worker for Monitor {
    type Message = MonitorMessage;
    fn handle(&mut self, message: MonitorMessage) -> Result<(), RuntimeError> {
        match message {
            MonitorMessage::Publish => self.publish(),
            MonitorMessage::Sample => self.sample(),
            MonitorMessage::SetDevice(device) => self.set_device(device),
            MonitorMessage::SetHeadroom(headroom) => self.set_headroom(headroom),
        }
    }
}

/// Inboxes of the actors.
pub(crate) struct Inboxes {
    pub reduction: flume::Sender<GradientReady>,
    pub monitor: flume::Sender<MonitorMessage>,
}

/// What the actors are made of.
pub(crate) struct Parts {
    pub shared: Arc<Shared>,
    pub backend: Arc<dyn Backend>,
    pub probe: Arc<dyn MemoryProbe>,
    pub bell: flume::Receiver<Ring>,
    /// Of the two sides of the optimizer, device and host.
    pub update_bells: [flume::Receiver<UpdateDue>; 2],
    pub mailbox: usize,
    pub pool: Arc<rayon::ThreadPool>,
    pub non_model: Arc<NonModel>,
    pub device: Bytes,
    /// Memory beside chunks that is never theirs, where the two are apart.
    pub beside: Bytes,
    /// Chunks keep what is not beside them.
    pub fixed: bool,
    pub headroom: f64,
    pub interval: Duration,
}

/// The running actors.
pub(crate) struct ActorSystem {
    pub inboxes: Inboxes,
    stop: Option<flume::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ActorSystem {
    /// Starts everything; returns when all actors are adopted.
    pub fn start(parts: Parts) -> Result<Self, RuntimeError> {
        let (ready_tx, ready) = flume::bounded(1);
        let (stop, stop_rx) = flume::bounded::<()>(1);
        let thread = std::thread::Builder::new()
            .name("ps-supervisor".into())
            .spawn(move || {
                let system = System::new();
                system.block_on(async move {
                    let arbiters = Arbiters::new();
                    let inboxes = adopt_all(&arbiters, &parts).await;
                    if let Ok(inboxes) = &inboxes {
                        actix::spawn(tick(inboxes.monitor.clone(), parts.interval));
                    }
                    let _ = ready_tx.send(inboxes);
                    // Closed or told: either way the runtime is going down.
                    let _ = stop_rx.recv_async().await;
                    arbiters.stop();
                });
            })
            .map_err(|error| RuntimeError::Stopped(format!("no thread for the actors: {error}")))?;
        let inboxes = ready
            .recv()
            .map_err(|_| RuntimeError::Stopped("the actors did not start".into()))?
            .map_err(RuntimeError::Stopped)?;
        Ok(ActorSystem { inboxes, stop: Some(stop), thread: Some(thread) })
    }

    /// Applies new policies.
    pub fn retune(&self, shared: &Shared, retune: Retune) -> Result<(), RuntimeError> {
        if let Ok(mut policies) = shared.policies.write() {
            *policies = EvictionPolicy {
                policy: retune.policy.unwrap_or(policies.policy),
                prefetch: retune.prefetch.unwrap_or(policies.prefetch),
            };
        }
        if let Some(device) = retune.device {
            self.tell_monitor(MonitorMessage::SetDevice(device))?;
        }
        if let Some(headroom) = retune.headroom {
            self.tell_monitor(MonitorMessage::SetHeadroom(headroom))?;
        }
        if let Some(host) = retune.host {
            let mut table = shared.lock();
            let slots = (host.0 / shared.chunk_bytes().0).min(u64::from(u32::MAX)) as u32;
            let capacity = table.slots[Tier::Host.index()].capacity();
            let budget = slots.min(capacity);
            if budget < std::mem::replace(&mut table.budget[Tier::Host.index()], budget) {
                table.stats.count_pressure(Tier::Host, Pressure::Shrink);
            }
        }
        shared.ring();
        Ok(())
    }

    pub fn tell_monitor(&self, message: MonitorMessage) -> Result<(), RuntimeError> {
        self.inboxes.monitor.send(message).map_err(|_| RuntimeError::Stopped("the monitor is gone".into()))
    }
}

impl Drop for ActorSystem {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One thread an actor: an actor may block on a copy or a file without delaying another.
struct Arbiters {
    arbiters: Vec<Arbiter>,
}

impl Arbiters {
    fn new() -> Self {
        Arbiters { arbiters: ActorName::ALL.iter().map(|_| Arbiter::new()).collect() }
    }

    fn handle(&self, actor: ActorName) -> ArbiterHandle {
        self.arbiters[actor as usize].handle()
    }

    fn stop(self) {
        for arbiter in &self.arbiters {
            arbiter.stop();
        }
        for arbiter in self.arbiters {
            let _ = arbiter.join();
        }
    }
}

async fn adopt_all(arbiters: &Arbiters, parts: &Parts) -> Result<Inboxes, String> {
    let shared = &parts.shared;
    let supervisor = Supervisor::new(Arc::clone(shared)).start();
    let (monitor, monitor_rx) = flume::bounded(parts.mailbox);
    let (reduction, reduction_rx) = flume::bounded(parts.mailbox);
    let (host_to_device, host_to_device_rx) = flume::bounded(1);
    let (device_to_host, device_to_host_rx) = flume::bounded(1);
    let (disk, disk_rx) = flume::bounded(1);
    let health = &shared.health;
    health.watch_mailbox(ActorName::Monitor, &monitor);
    health.watch_mailbox(ActorName::Reduction, &reduction);
    health.watch_mailbox(ActorName::Eviction, &shared.bell);
    for (name, bell) in [
        (ActorName::HostToDevice, &host_to_device),
        (ActorName::DeviceToHost, &device_to_host),
        (ActorName::Disk, &disk),
    ] {
        health.watch_mailbox(name, bell);
    }
    for (name, bell) in [ActorName::DeviceOptimizer, ActorName::Optimizer].into_iter().zip(&shared.update_bells) {
        health.watch_mailbox(name, bell);
    }
    let streams = Streams { host_to_device, device_to_host, disk };

    let eviction = {
        let shared = Arc::clone(shared);
        move || Eviction::new(Arc::clone(&shared), streams.clone())
    };
    adopt(&supervisor, arbiters, shared, ActorName::Eviction, parts.bell.clone(), eviction).await?;
    for (name, inbox) in [
        (ActorName::HostToDevice, host_to_device_rx),
        (ActorName::DeviceToHost, device_to_host_rx),
        (ActorName::Disk, disk_rx),
    ] {
        let shared_of_stream = Arc::clone(shared);
        let backend = Arc::clone(&parts.backend);
        let make = move || CopyStream::new(Arc::clone(&shared_of_stream), name, Arc::clone(&backend));
        adopt(&supervisor, arbiters, shared, name, inbox, make).await?;
    }
    let reduce = {
        let shared = Arc::clone(shared);
        move || Reduction::new(Arc::clone(&shared))
    };
    adopt(&supervisor, arbiters, shared, ActorName::Reduction, reduction_rx, reduce).await?;
    for (name, tier, inbox) in [
        (ActorName::DeviceOptimizer, Tier::Device, parts.update_bells[0].clone()),
        (ActorName::Optimizer, Tier::Host, parts.update_bells[1].clone()),
    ] {
        let (shared_of_side, pool) = (Arc::clone(shared), Arc::clone(&parts.pool));
        let step = move || Optimizer::new(Arc::clone(&shared_of_side), tier, Arc::clone(&pool));
        adopt(&supervisor, arbiters, shared, name, inbox, step).await?;
    }
    let watch = {
        let (shared, non_model) = (Arc::clone(shared), Arc::clone(&parts.non_model));
        let probe = Arc::clone(&parts.probe);
        let given = Arc::new(Mutex::new(Given {
            device: parts.device,
            left: parts.device,
            beside: parts.beside,
            fixed: parts.fixed,
            share: Share::default(),
            headroom: parts.headroom,
        }));
        move || Monitor::new(Arc::clone(&shared), Arc::clone(&non_model), Arc::clone(&probe), Arc::clone(&given))
    };
    adopt(&supervisor, arbiters, shared, ActorName::Monitor, monitor_rx, watch).await?;
    Ok(Inboxes { reduction, monitor })
}

/// Reminds the monitor to look, until the runtime goes down.
async fn tick(monitor: flume::Sender<MonitorMessage>, interval: Duration) {
    let mut ticks = tokio::time::interval(interval.max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        // A full inbox means that the monitor has looks to come.
        if let Err(flume::TrySendError::Disconnected(_)) = monitor.try_send(MonitorMessage::Sample) {
            return;
        }
    }
}

async fn adopt<W: Worker>(
    supervisor: &Addr<Supervisor>,
    arbiters: &Arbiters,
    shared: &Arc<Shared>,
    actor: ActorName,
    inbox: flume::Receiver<W::Message>,
    make: impl Fn() -> W + Send + 'static,
) -> Result<(), String> {
    let post = Post { name: actor, inbox, in_hand: Arc::new(Mutex::new(VecDeque::new())), shared: Arc::clone(shared) };
    let arbiter = arbiters.handle(actor);
    let start = Box::new(move |supervisor: Addr<Supervisor>| {
        let (worker, post) = (make(), post.clone());
        Shell::start_in_arbiter(&arbiter, move |_| Shell::new(worker, post, supervisor));
    });
    supervisor.send(Adopt { actor, start }).await.map_err(|error| format!("{} was not adopted: {error}", actor.name()))
}
