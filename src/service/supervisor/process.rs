//! One worker process: started, followed until it has ended, its reports stored as they come.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde_json::json;
use tokio::process::Child;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::link::Link;
use crate::config::Config;
use crate::service::child;
use crate::service::error::ServiceError;
use crate::service::store::{JobId, NewEvent, Report, SavedCheckpoint, StepsDone, StoreHandle, UnixTime};
use crate::service::worker::protocol::{FromWorker, StepMetrics, ToWorker};

/// How long a worker may take to leave when it was told to leave at once, or has said its last word.
const LEAVE: Duration = Duration::from_secs(10);
/// Reports that are stored together when they come faster than the disk syncs.
const TOGETHER: usize = 256;
/// Tries to store a report, a second apart, before the worker is given up: a full disk may be emptied.
const STORE_TRIES: u32 = 60;

/// How a worker ended.
#[derive(Debug)]
pub(super) struct Ending {
    /// Its job.
    pub job: JobId,
    /// Its last word, if it had one.
    pub word: Option<FromWorker>,
    /// What a death looked like.
    pub death: String,
}

/// A started worker.
pub(super) struct Worker {
    job: JobId,
    child: Child,
    link: Link,
    reports: mpsc::Receiver<FromWorker>,
    log: PathBuf,
    log_every: u64,
    store: StoreHandle,
    /// Time without progress after which it is given up.
    hang: Option<Duration>,
}

impl Worker {
    /// Starts a worker of this program on the job in `directory`.
    pub async fn start(
        job: JobId,
        config: Config,
        directory: &Path,
        store: StoreHandle,
        hang: Option<Duration>,
    ) -> Result<Self, ServiceError> {
        std::fs::create_dir_all(directory).map_err(|error| ServiceError::io(directory, error))?;
        let log = directory.join("worker.log");
        let log_file = std::fs::File::create(&log).map_err(|error| ServiceError::io(&log, error))?;
        let (child, socket) = child::start("worker", Stdio::from(log_file))?;
        let (link, reports) = Link::new(socket);
        let log_every = config.train.log_every.max(1);
        link.tell(ToWorker::Start { config: Box::new(config) });
        Ok(Worker { job, child, link, reports, log, log_every, store, hang })
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id().unwrap_or(0)
    }

    /// The way to it.
    pub fn link(&self) -> Link {
        self.link.clone()
    }

    /// Follows the worker to its end, passing on what `orders` says.
    pub async fn follow(mut self, mut orders: mpsc::UnboundedReceiver<ToWorker>) -> Ending {
        let (mut word, mut messages) = (None, Vec::new());
        let mut leave_by: Option<Instant> = None;
        let (mut heard, mut hung) = (Instant::now(), None);
        loop {
            let deadline = async { tokio::time::sleep_until(leave_by.unwrap_or_else(Instant::now)).await };
            let given_up = async { tokio::time::sleep_until(heard + self.hang.unwrap_or_default()).await };
            tokio::select! {
                count = self.reports.recv_many(&mut messages, TOGETHER) => {
                    if count == 0 {
                        break;
                    }
                    // Signs of life say nothing else.
                    messages.retain(|message| *message != FromWorker::Alive);
                    if messages.last().is_some_and(FromWorker::is_last) {
                        word = messages.last().cloned();
                        leave_by = Some(Instant::now() + LEAVE);
                    }
                    if !messages.is_empty() {
                        self.take(&messages).await;
                        messages.clear();
                    }
                    heard = Instant::now();
                }
                Some(order) = orders.recv() => {
                    if matches!(order, ToWorker::Cancel) {
                        leave_by = Some(Instant::now() + LEAVE);
                    }
                    self.link.tell(order);
                }
                () = deadline, if leave_by.is_some() => {
                    self.kill();
                    leave_by = None;
                }
                () = given_up, if self.hang.is_some() && hung.is_none() => {
                    self.kill();
                    hung = self.hang;
                }
            }
        }
        let status = match tokio::time::timeout(LEAVE, self.child.wait()).await {
            Ok(status) => status,
            Err(_) => {
                self.kill();
                self.child.wait().await
            }
        };
        let death = match hung {
            Some(time) => format!("the worker made no progress for {} s and was killed", time.as_secs_f64()),
            None => death(status, &self.log),
        };
        Ending { job: self.job, word, death }
    }

    fn kill(&mut self) {
        if let Err(error) = self.child.start_kill() {
            tracing::error!(job = %self.job, "the worker cannot be killed: {error}");
        }
    }

    /// Stores what the worker said and tells it so. A worker that cannot be heard for too long is ended.
    async fn take(&mut self, messages: &[FromWorker]) {
        let report = report(messages, self.log_every);
        for _ in 0..STORE_TRIES {
            let (job, stored) = (self.job.clone(), report.clone());
            match self.store.write(move |store| store.store_report(&job, &stored)).await {
                Ok(()) => {
                    if let Some(done) = report.progress {
                        self.link.tell(ToWorker::Stored { step: done.step });
                    }
                    return;
                }
                Err(error) => tracing::error!(job = %self.job, "a report is not stored yet: {error}"),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        self.kill();
    }
}

fn report(messages: &[FromWorker], log_every: u64) -> Report {
    let mut report = Report::default();
    for message in messages {
        match message {
            FromWorker::Started { step, parameters, plan } => {
                let from = if *step == 0 { "from the start".to_owned() } else { format!("after step {step}") };
                report.events.push(NewEvent::info(format!("Training {parameters} parameters {from}: {plan}")));
            }
            FromWorker::Step(metrics) => {
                report.progress = Some(StepsDone {
                    step: metrics.step,
                    tokens: metrics.trained_tokens,
                    estimated_finish: metrics.seconds_left.map(|left| UnixTime::now().after(left)),
                });
                let ends = metrics.step == 1 || metrics.step == metrics.total_steps;
                let shown = ends || metrics.valid_loss.is_some();
                if shown || metrics.step.is_multiple_of(log_every) {
                    report.events.push(step_event(metrics));
                }
            }
            FromWorker::Checkpoint { step, directory, losses } => {
                let (step, directory, losses) = (*step, directory.clone(), *losses);
                report.checkpoints.push(SavedCheckpoint { step, directory, losses });
            }
            FromWorker::Log { message } => report.events.push(NewEvent::info(message.clone())),
            FromWorker::Paused { step } => {
                report.events.push(NewEvent::info(format!("The worker left after step {step}, with a checkpoint")));
            }
            // What these mean for the job is decided by the supervisor.
            FromWorker::Finished { .. } | FromWorker::Failed { .. } => {}
            // Went to whoever asked, or to nobody.
            FromWorker::Answer { .. } | FromWorker::Alive => {}
        }
    }
    report
}

fn step_event(metrics: &StepMetrics) -> NewEvent {
    let validation = metrics.valid_loss.map(|loss| format!(", validation loss={loss:.4}")).unwrap_or_default();
    let StepMetrics { step, total_steps, train_loss, .. } = metrics;
    let message = format!("Step {step}/{total_steps}: training loss={train_loss:.4}{validation}");
    NewEvent::metrics(metrics.step, message, json!(metrics))
}

/// A death in words, with the last line that the worker logged.
fn death(status: std::io::Result<ExitStatus>, log: &Path) -> String {
    let mut text = match status {
        Ok(status) => format!("the worker ended with {status}"),
        Err(error) => format!("the worker's end is unknown: {error}"),
    };
    let last = std::fs::read_to_string(log).ok();
    if let Some(line) = last.as_deref().and_then(|log| log.lines().rev().find(|line| !line.trim().is_empty())) {
        text.push_str(": ");
        text.extend(line.chars().take(500));
    }
    text
}
