//! The jobs whose workers run, as the supervisor and everybody who asks about them see them.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use super::link::Link;
use crate::service::store::JobId;
use crate::service::worker::protocol::ToWorker;

/// A job whose worker runs.
pub(super) struct Running {
    pub device: String,
    /// To whoever follows the worker: what ends it has to be done by a time.
    pub orders: mpsc::UnboundedSender<ToWorker>,
    /// To the worker itself.
    pub link: Link,
}

/// All of them; only the supervisor changes what is in it.
#[derive(Clone, Default)]
pub(super) struct RunningJobs(Arc<Mutex<HashMap<JobId, Running>>>);

impl RunningJobs {
    fn lock(&self) -> MutexGuard<'_, HashMap<JobId, Running>> {
        // Every change is one call, so a panic leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn insert(&self, job: JobId, running: Running) {
        self.lock().insert(job, running);
    }

    pub fn remove(&self, job: &JobId) {
        self.lock().remove(job);
    }

    /// Removes those that nobody follows any more.
    pub fn remove_lost(&self) {
        self.lock().retain(|_, running| !running.orders.is_closed());
    }

    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    pub fn contains(&self, job: &JobId) -> bool {
        self.lock().contains_key(job)
    }

    pub fn devices(&self) -> HashSet<String> {
        self.lock().values().map(|running| running.device.clone()).collect()
    }

    /// A job that does not run needs no order: it is not started in the state that the database now has.
    pub fn order(&self, job: &JobId, order: ToWorker) {
        if let Some(running) = self.lock().get(job) {
            // The worker may just have ended.
            drop(running.orders.send(order));
        }
    }

    pub fn order_all(&self, order: &ToWorker) {
        self.lock().values().for_each(|running| drop(running.orders.send(order.clone())));
    }

    /// The way to a job's worker.
    pub fn link(&self, job: &JobId) -> Option<Link> {
        self.lock().get(job).map(|running| running.link.clone())
    }

    /// The ways to all workers, in the order of their jobs' names.
    pub fn links(&self) -> Vec<(JobId, Link)> {
        let mut links: Vec<_> = self.lock().iter().map(|(job, running)| (job.clone(), running.link.clone())).collect();
        links.sort_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
        links
    }
}
