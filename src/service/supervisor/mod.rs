//! Which job trains when: starts workers, follows them, starts them again when they die, and never dies with them.
//!
//! The database says what a job *should* be doing, this module what is *really* running. A job may be paused there while
//! its worker still saves a checkpoint here; its device is free only when the worker has ended. So whatever happens to this
//! process, a new one finds in the database all that it needs to go on.

mod ending;
mod handle;
mod link;
mod preempt;
mod process;
mod restart;
mod retuned;
mod running;
mod validate;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

pub use self::handle::SupervisorHandle;
use self::handle::{Command, Counts};
use self::process::{Ending, Worker};
use self::retuned::Retuned;
use self::running::{Running, RunningJobs};
use super::error::ServiceError;
use super::settings::Settings;
use super::store::{Failure, JobId, JobRow, NewEvent, Status, StoreError, StoreHandle, UnixTime, job_directory};
use super::worker::protocol::ToWorker;
use crate::config::Config;
use crate::telemetry::metrics::{Histogram, installed};

/// Looks at the queue this often even if nothing happens: a restart may be due.
const TICK: Duration = Duration::from_millis(250);
/// Wait after the database refused.
const AFTER_ERROR: Duration = Duration::from_secs(1);

/// Owns the workers.
pub struct Supervisor {
    settings: Arc<Settings>,
    store: StoreHandle,
    commands: mpsc::UnboundedReceiver<Command>,
    workers: JoinSet<Ending>,
    counts: Arc<Counts>,
    retuned: Retuned,
    running: RunningJobs,
    readers: JoinSet<JobId>,
    reading: HashSet<JobId>,
    stopping: Option<oneshot::Sender<()>>,
}

impl Supervisor {
    /// A supervisor that has not begun yet, and the way to talk to it.
    pub fn new(settings: Arc<Settings>, store: StoreHandle) -> (Self, SupervisorHandle) {
        let (sender, commands) = mpsc::unbounded_channel();
        let supervisor = Supervisor {
            settings,
            store,
            commands,
            workers: JoinSet::new(),
            counts: Arc::default(),
            retuned: Retuned::default(),
            running: RunningJobs::default(),
            readers: JoinSet::new(),
            reading: HashSet::new(),
            stopping: None,
        };
        let (counts, running) = (Arc::clone(&supervisor.counts), supervisor.running.clone());
        (supervisor, SupervisorHandle { commands: sender, counts, running })
    }

    /// Runs until it is told to stop and all workers have left.
    pub async fn run(mut self) {
        loop {
            if self.stopping.is_some() && self.running.is_empty() {
                break;
            }
            match self.look().await {
                Ok(()) => drop(self.counts.rounds.fetch_add(1, Ordering::Relaxed)),
                Err(error) => {
                    tracing::error!("the queue cannot be read: {error}");
                    tokio::time::sleep(AFTER_ERROR).await;
                }
            }
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.obey(command),
                    // Nobody is left who could ask for anything.
                    None => break,
                },
                Some(ended) = self.workers.join_next() => self.worker_ended(ended).await,
                Some(read) = self.readers.join_next() => match read {
                    Ok(job) => drop(self.reading.remove(&job)),
                    Err(error) => {
                        tracing::error!("reading a training file ended badly: {error}");
                        self.reading.clear();
                    }
                },
                () = tokio::time::sleep(TICK) => {}
            }
        }
        if let Some(done) = self.stopping.take() {
            // Whoever asked may have given up waiting.
            let _ = done.send(());
        }
    }

    fn obey(&mut self, command: Command) {
        self.counts.obeyed.fetch_add(1, Ordering::Relaxed);
        match command {
            Command::Look => {}
            Command::Order(job, order) => self.running.order(&job, order),
            Command::Retune(policies, newest) => {
                self.running.order_all(&ToWorker::Retune(policies.clone()));
                self.retuned.add(policies, newest);
            }
            Command::Stop(done) => {
                self.stopping = Some(done);
                self.running.order_all(&ToWorker::Pause);
            }
        }
    }

    async fn look(&mut self) -> Result<(), ServiceError> {
        if self.stopping.is_some() {
            return Ok(());
        }
        for job in self.store.read(|store| store.jobs_to_validate()).await? {
            if self.reading.insert(job.id.clone()) {
                self.readers.spawn(read_file(self.settings.clone(), self.store.clone(), job));
            }
        }
        let mut jobs = self.store.read(|store| store.runnable_jobs()).await?;
        if self.preempt(&jobs).await? {
            jobs = self.store.read(|store| store.runnable_jobs()).await?;
        }
        let mut devices = self.running.devices();
        for (job, not_before) in jobs {
            // A job that has begun keeps its device while it waits for its next worker.
            let free = !self.running.contains(&job.id) && devices.insert(job.device.clone());
            if free && not_before <= UnixTime::now() {
                self.start(job).await?;
            }
        }
        Ok(())
    }

    async fn start(&mut self, job: JobRow) -> Result<(), ServiceError> {
        let id = job.id.clone();
        if job.status == Status::Queued {
            let event = NewEvent::info("Fine-tuning job started".to_owned());
            let started = {
                let id = id.clone();
                self.store.write(move |store| store.change_status(&id, Status::Running, &event)).await?
            };
            if started.is_none() {
                return Ok(());
            }
            if job.step == 0
                && let Some(registry) = installed()
            {
                let waited = UnixTime::now().0.saturating_sub(job.created_at.0).max(0);
                registry.histogram(Histogram::JobQueueWait, &[]).record(waited as f64);
            }
        }
        match self.launch(&job).await {
            Ok(worker) => {
                tracing::info!(job = %id, pid = worker.pid(), "started a worker");
                let (orders, receiver) = mpsc::unbounded_channel();
                if let Some(policies) = self.retuned.since(job.seq) {
                    worker.link().tell(ToWorker::Retune(policies));
                }
                self.running.insert(id.clone(), Running { device: job.device, orders, link: worker.link() });
                self.workers.spawn(worker.follow(receiver));
                self.catch_up(&id).await
            }
            Err(error) => Ok(self.settle_death(&id, &format!("no worker could be started: {error}")).await?),
        }
    }

    async fn launch(&self, job: &JobRow) -> Result<Worker, ServiceError> {
        let mut config: Config = serde_json::from_value(job.config.clone())
            .map_err(|error| ServiceError::Internal(format!("the stored configuration: {error}")))?;
        let directory = job_directory(&self.settings.data, &job.id);
        config.data.path = self.settings.file(&job.training_file);
        config.data.validation_path = job.validation_file.as_ref().map(|file| self.settings.file(file));
        config.train.output = directory.clone();
        Worker::start(job.id.clone(), config, &directory, self.store.clone(), self.settings.limits.hang).await
    }

    /// An order that was given while the worker was being started has found nobody.
    async fn catch_up(&self, id: &JobId) -> Result<(), ServiceError> {
        let wanted = id.clone();
        match self.store.read(move |store| store.job(&wanted)).await?.map(|job| job.status) {
            Some(Status::Paused | Status::Queued) => self.running.order(id, ToWorker::Pause),
            Some(Status::Running) | None => {}
            Some(_) => self.running.order(id, ToWorker::Cancel),
        }
        Ok(())
    }
}

async fn read_file(settings: Arc<Settings>, store: StoreHandle, job: JobRow) -> JobId {
    let id = job.id.clone();
    let read = tokio::task::spawn_blocking(move || validate::validate(&job, &settings)).await;
    let outcome = read.unwrap_or_else(|error| {
        Err(Failure { code: "invalid_training_file".into(), message: format!("reading the file ended badly: {error}") })
    });
    let stored = {
        let id = id.clone();
        let store_outcome = move |store: &mut super::store::Store| -> Result<bool, StoreError> {
            match outcome {
                Ok(config) => store.queue_validated(&id, &config),
                Err(failure) => store.fail_job(&id, &failure),
            }
        };
        store.write(store_outcome).await
    };
    if let Err(error) = stored {
        tracing::error!(job = %id, "the outcome of reading the training file is not stored, it will be read again: {error}");
        tokio::time::sleep(AFTER_ERROR).await;
    }
    id
}
