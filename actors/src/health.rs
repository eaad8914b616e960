//! What an observer sees of the actors: messages handled, restarts, the last fault. Also where tests plant faults.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// The actors of the runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ActorName {
    /// Samples memory, publishes budgets.
    Monitor,
    /// Owns placement.
    Eviction,
    /// Copies from host to device.
    HostToDevice,
    /// Copies from device to host.
    DeviceToHost,
    /// Reads and writes the disk tier.
    Disk,
    /// Norms and checks of gradients.
    Reduction,
    /// Adam in host memory.
    Optimizer,
    /// Adam on the device.
    DeviceOptimizer,
}

impl ActorName {
    /// All actors that are supervised.
    pub const ALL: [ActorName; 8] = [
        ActorName::Monitor,
        ActorName::Eviction,
        ActorName::HostToDevice,
        ActorName::DeviceToHost,
        ActorName::Disk,
        ActorName::Reduction,
        ActorName::Optimizer,
        ActorName::DeviceOptimizer,
    ];

    /// Name in reports, metrics and messages.
    pub fn name(self) -> &'static str {
        match self {
            ActorName::Monitor => "monitor",
            ActorName::Eviction => "eviction",
            ActorName::HostToDevice => "host_to_device",
            ActorName::DeviceToHost => "device_to_host",
            ActorName::Disk => "disk",
            ActorName::Reduction => "reduction",
            ActorName::Optimizer => "optimizer",
            ActorName::DeviceOptimizer => "device_optimizer",
        }
    }
}

/// Whether an actor works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Life {
    /// It does.
    #[default]
    Running,
    /// It panicked, and its successor is on the way.
    Restoring,
    /// It panicked too often: the training ends.
    Failed,
}

impl Life {
    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Life::Running => "running",
            Life::Restoring => "restoring",
            Life::Failed => "failed",
        }
    }
}

/// Observable state of one actor.
#[derive(Clone, Debug, Serialize)]
pub struct ActorStatus {
    /// Which.
    pub actor: &'static str,
    /// Whether it works.
    pub life: Life,
    /// Messages that wait for it.
    pub waiting: u64,
    /// Messages that its mailbox holds; a sender waits when it is full. 0 for a bell, which is rung or not.
    pub capacity: u64,
    /// Messages handled.
    pub handled: u64,
    /// Time in which it handled them.
    pub busy: Duration,
    /// When it handled the last one, in seconds since 1970.
    pub last_progress: Option<f64>,
    /// Times it was restored after a panic.
    pub restarts: u64,
    /// Message of its last panic.
    pub last_fault: Option<String>,
}

struct Mailbox {
    capacity: usize,
    /// Counts the messages that wait.
    waiting: Box<dyn Fn() -> usize + Send + Sync>,
}

#[derive(Default)]
struct Vital {
    handled: AtomicU64,
    /// Nanoseconds.
    busy: AtomicU64,
    /// Milliseconds since 1970; 0 before the first message.
    last_progress: AtomicU64,
    restarts: AtomicU64,
    /// Handled messages at the last restart: restarts without progress in between count as failing in a row.
    handled_at_restart: AtomicU64,
    failures_in_a_row: AtomicU64,
    panic_next: AtomicBool,
    last_fault: Mutex<Option<String>>,
    life: Mutex<Life>,
    mailbox: OnceLock<Mailbox>,
}

/// Vital signs of all actors.
#[derive(Default)]
pub struct Health {
    vitals: [Vital; 8],
}

impl Health {
    fn vital(&self, actor: ActorName) -> &Vital {
        &self.vitals[actor as usize]
    }

    /// Learns how to count the messages that wait. A mailbox is not kept open by that.
    pub(crate) fn watch_mailbox<M: Send + 'static>(&self, actor: ActorName, sender: &flume::Sender<M>) {
        let capacity = sender.capacity().unwrap_or(0);
        let sender = sender.downgrade();
        let waiting = Box::new(move || sender.upgrade().map_or(0, |sender| sender.len()));
        // An actor has one mailbox, however often it is restored.
        let _ = self.vital(actor).mailbox.set(Mailbox { capacity, waiting });
    }

    pub(crate) fn set_life(&self, actor: ActorName, life: Life) {
        *self.vital(actor).life.lock().unwrap_or_else(PoisonError::into_inner) = life;
    }

    /// Notes a message that took `time`.
    pub(crate) fn handled(&self, actor: ActorName, time: Duration) {
        let vital = self.vital(actor);
        vital.handled.fetch_add(1, Ordering::Relaxed);
        vital.busy.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        vital.last_progress.store(now.as_millis() as u64, Ordering::Relaxed);
    }

    /// Notes a restart and returns how often the actor has failed without handling anything in between.
    pub(crate) fn restarted(&self, actor: ActorName, fault: &str) -> u64 {
        let vital = self.vital(actor);
        vital.restarts.fetch_add(1, Ordering::Relaxed);
        *vital.last_fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault.to_owned());
        let handled = vital.handled.load(Ordering::Relaxed);
        if vital.handled_at_restart.swap(handled, Ordering::Relaxed) == handled {
            vital.failures_in_a_row.fetch_add(1, Ordering::Relaxed) + 1
        } else {
            vital.failures_in_a_row.store(1, Ordering::Relaxed);
            1
        }
    }

    /// Makes the actor panic in the middle of its next piece of work: for tests of restoration.
    pub fn plant_panic(&self, actor: ActorName) {
        self.vital(actor).panic_next.store(true, Ordering::SeqCst);
    }

    /// Panics if somebody planted a panic for this actor. Called in the middle of work, where it hurts most.
    pub(crate) fn fault_point(&self, actor: ActorName) {
        if self.vital(actor).panic_next.swap(false, Ordering::SeqCst) {
            std::panic::panic_any(format!("planted panic in actor {}", actor.name()));
        }
    }

    /// Restarts of one actor.
    pub fn restarts(&self, actor: ActorName) -> u64 {
        self.vital(actor).restarts.load(Ordering::Relaxed)
    }

    /// State of all actors.
    pub fn status(&self) -> Vec<ActorStatus> {
        ActorName::ALL
            .into_iter()
            .map(|actor| {
                let vital = self.vital(actor);
                ActorStatus {
                    actor: actor.name(),
                    life: *vital.life.lock().unwrap_or_else(PoisonError::into_inner),
                    waiting: vital.mailbox.get().map_or(0, |mailbox| (mailbox.waiting)() as u64),
                    capacity: vital.mailbox.get().map_or(0, |mailbox| mailbox.capacity as u64),
                    handled: vital.handled.load(Ordering::Relaxed),
                    busy: Duration::from_nanos(vital.busy.load(Ordering::Relaxed)),
                    last_progress: match vital.last_progress.load(Ordering::Relaxed) {
                        0 => None,
                        milliseconds => Some(milliseconds as f64 / 1e3),
                    },
                    restarts: vital.restarts.load(Ordering::Relaxed),
                    last_fault: vital.last_fault.lock().unwrap_or_else(PoisonError::into_inner).clone(),
                }
            })
            .collect()
    }
}
