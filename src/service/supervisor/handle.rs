//! How the rest of the service talks to the supervisor and, past it, to workers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot};

use super::running::RunningJobs;
use crate::service::error::ServiceError;
use crate::service::store::{JobId, Seq};
use crate::service::worker::protocol::{Policies, ToWorker};
use crate::service::worker::questions::{ActorState, Answer, Question};

/// How long a worker may take to answer: its answers wait for nothing but a processor.
const PATIENCE: Duration = Duration::from_secs(2);
/// To write a recording it needs the disk.
const PATIENCE_TO_WRITE: Duration = Duration::from_secs(60);

pub(super) enum Command {
    /// The queue has changed.
    Look,
    Order(JobId, ToWorker),
    /// For jobs that run, and those up to this one that wait.
    Retune(Policies, Seq),
    Stop(oneshot::Sender<()>),
}

/// What the supervisor was told to do, and has done.
#[derive(Default)]
pub(super) struct Counts {
    sent: AtomicU64,
    pub obeyed: AtomicU64,
    /// Times that the queue was read.
    pub rounds: AtomicU64,
}

/// Talks to the supervisor.
#[derive(Clone)]
pub struct SupervisorHandle {
    pub(super) commands: mpsc::UnboundedSender<Command>,
    pub(super) counts: Arc<Counts>,
    pub(super) running: RunningJobs,
}

impl SupervisorHandle {
    /// The queue has changed.
    pub fn look(&self) {
        self.send(Command::Look);
    }

    /// The job was paused in the database.
    pub fn pause(&self, job: &JobId) {
        self.send(Command::Order(job.clone(), ToWorker::Pause));
    }

    /// The job was cancelled in the database.
    pub fn cancel(&self, job: &JobId) {
        self.send(Command::Order(job.clone(), ToWorker::Cancel));
    }

    /// Gives new policies to all jobs up to `newest`; later ones began with them.
    pub fn retune(&self, policies: Policies, newest: Seq) {
        self.send(Command::Retune(policies, newest));
    }

    /// Starts nothing any more and returns when every worker has saved a checkpoint and left.
    pub async fn stop(&self) {
        let (done, wait) = oneshot::channel();
        self.send(Command::Stop(done));
        // An error means that the supervisor has ended already.
        drop(wait.await);
    }

    /// Asks a job's worker.
    pub async fn ask(&self, job: &JobId, question: Question) -> Result<Answer, ServiceError> {
        let link = self.running.link(job).ok_or_else(|| ServiceError::NotRunning(job.clone()))?;
        let patience = if question == Question::StopTrace { PATIENCE_TO_WRITE } else { PATIENCE };
        match tokio::time::timeout(patience, link.ask(question)).await {
            Ok(Some(Answer::NotReady)) | Err(_) => Err(ServiceError::NoAnswer(job.clone())),
            Ok(Some(Answer::Failed(reason))) => Err(ServiceError::Internal(reason)),
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(ServiceError::NotRunning(job.clone())),
        }
    }

    /// Asks all workers at once; those that do not answer are left out.
    pub async fn ask_all(&self, question: Question) -> Vec<(JobId, Answer)> {
        let asked = self.running.links().into_iter().map(|(job, link)| async move {
            let answer = tokio::time::timeout(PATIENCE, link.ask(question)).await.ok().flatten();
            answer.filter(|answer| *answer != Answer::NotReady).map(|answer| (job, answer))
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// Jobs whose workers run.
    pub fn running_jobs(&self) -> Vec<JobId> {
        self.running.links().into_iter().map(|(job, _)| job).collect()
    }

    /// How often the supervisor has read the queue: it stands still if it hangs, or the database does.
    pub fn rounds(&self) -> u64 {
        self.counts.rounds.load(Ordering::Relaxed)
    }

    /// The supervisor itself, as one of the actors.
    pub fn status(&self) -> ActorState {
        let obeyed = self.counts.obeyed.load(Ordering::Relaxed);
        ActorState {
            name: "supervisor".to_owned(),
            state: if self.commands.is_closed() { "failed" } else { "running" }.to_owned(),
            mailbox: self.counts.sent.load(Ordering::Relaxed).saturating_sub(obeyed),
            // It is never restored: the service ends with it.
            restarts: 0,
            processed: obeyed,
            last_fault: None,
        }
    }

    /// A supervisor that is gone ends the service, which has its own way to notice.
    fn send(&self, command: Command) {
        self.counts.sent.fetch_add(1, Ordering::Relaxed);
        drop(self.commands.send(command));
    }
}
