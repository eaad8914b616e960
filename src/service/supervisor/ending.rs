//! What the end of a worker means for its job.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use tokio::task::JoinError;

use super::process::Ending;
use super::restart::{Verdict, judge};
use super::{AFTER_ERROR, Supervisor};
use crate::service::error::ServiceError;
use crate::service::store::{Failure, FileId, JobId, NewEvent, Purpose, Seq, Status, Store, UnixTime};
use crate::service::worker::protocol::FromWorker;
use crate::telemetry::metrics::{Counter, count};

/// Tries to store an ending. It is not lost if all fail: the job is still running in the database and is started again.
const TRIES: u32 = 30;

impl Supervisor {
    pub(super) async fn worker_ended(&mut self, ended: Result<Ending, JoinError>) {
        let ending = match ended {
            Ok(ending) => ending,
            Err(error) => {
                // Its job is unknown here; dropping the task has closed the socket, at which the worker ends.
                tracing::error!("following a worker ended badly: {error}");
                self.running.remove_lost();
                return;
            }
        };
        for _ in 0..TRIES {
            match self.settle(&ending).await {
                Ok(()) => break,
                Err(error) => tracing::error!(job = %ending.job, "the end of a worker is not stored yet: {error}"),
            }
            tokio::time::sleep(AFTER_ERROR).await;
        }
        self.running.remove(&ending.job);
    }

    async fn settle(&self, ending: &Ending) -> Result<(), ServiceError> {
        let id = ending.job.clone();
        self.forget_removed(&id).await?;
        match &ending.word {
            Some(FromWorker::Finished { .. }) => self.finish(id).await,
            Some(FromWorker::Failed { code, message, retry: false }) => {
                let failure = Failure { code: code.clone(), message: message.clone() };
                self.store.write(move |store| store.fail_job(&id, &failure)).await?;
                Ok(())
            }
            Some(FromWorker::Failed { message, .. }) => self.settle_death(&id, message).await,
            // It did as it was told, by the service or by a signal; what comes next is in the database.
            Some(FromWorker::Paused { .. }) => Ok(()),
            _ => self.settle_death(&id, &ending.death).await,
        }
    }

    /// Counts a death against a job that should be running; others were told to end.
    pub(super) async fn settle_death(&self, id: &JobId, reason: &str) -> Result<(), ServiceError> {
        let (wanted, reason, limits) = (id.clone(), reason.to_owned(), self.settings.limits);
        let settle = move |store: &mut Store| {
            let running = store.job(&wanted)?.filter(|job| job.status == Status::Running);
            let Some(job) = running else { return Ok(false) };
            let deaths = job.restarts + 1;
            match judge(deaths, &limits) {
                Verdict::After(wait) => {
                    let event = NewEvent::warn(format!(
                        "{reason}; restarting from the last checkpoint in {} s (try {deaths} of {})",
                        wait.as_secs_f64(),
                        limits.restarts
                    ));
                    store.note_restart(&wanted, deaths, later(wait), &event).map(|()| true)
                }
                Verdict::GiveUp => {
                    let message = format!("{reason}; no new checkpoint in {} restarts", limits.restarts);
                    store.fail_job(&wanted, &Failure { code: "worker_died".into(), message }).map(|_| false)
                }
            }
        };
        if self.store.write(settle).await? {
            count(Counter::WorkerRestarts);
        }
        Ok(())
    }

    async fn finish(&self, id: JobId) -> Result<(), ServiceError> {
        let wanted = id.clone();
        let Some(job) = self.store.read(move |store| store.job(&wanted)).await? else { return Ok(()) };
        if !job.status.may_become(Status::Succeeded) {
            return Ok(());
        }
        let (wanted, file) = (id.clone(), FileId::random()?);
        let table = self.store.read(move |store| results(store, &wanted)).await?;
        let path = self.settings.file(&file);
        write_synced(&path, table.as_bytes()).map_err(|error| ServiceError::io(&path, error))?;
        let model = job.trained_name();
        let finish = move |store: &mut Store| {
            store.add_file(&file, "step_metrics.csv", Purpose::FineTuneResults, table.len() as u64)?;
            store.finish_job(&id, &model, Some(&file))
        };
        self.store.write(finish).await?;
        Ok(())
    }

    /// Training keeps the newest checkpoints only.
    async fn forget_removed(&self, id: &JobId) -> Result<(), ServiceError> {
        let id = id.clone();
        let forget = move |store: &mut Store| {
            let all = store.checkpoints(&id, None, 1 << 32)?.rows;
            let gone: Vec<_> =
                all.into_iter().filter(|row| !Path::new(&row.directory).is_dir()).map(|row| row.id).collect();
            store.forget_checkpoints(&gone)
        };
        Ok(self.store.write(forget).await?)
    }
}

/// A time that is at least `wait` away.
fn later(wait: Duration) -> UnixTime {
    UnixTime(UnixTime::now().0 + wait.as_secs_f64().ceil() as i64)
}

/// The table of a job's metrics, with the columns that clients expect.
fn results(store: &Store, id: &JobId) -> Result<String, crate::service::store::StoreError> {
    let mut table = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n".to_owned();
    let mut last = Seq(0);
    loop {
        let events = store.events_since(id, last, 1000)?;
        let Some(newest) = events.last() else { return Ok(table) };
        last = newest.seq;
        for event in &events {
            if let (Some(step), Some(loss)) = (event.step, event.data.get("train_loss")) {
                let valid_loss = event.data.get("valid_loss").map(|loss| loss.to_string()).unwrap_or_default();
                // Writing to a string does not fail.
                let _ = writeln!(table, "{step},{loss},,{valid_loss},");
            }
        }
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    path.parent().map_or(Ok(()), |parent| std::fs::File::open(parent)?.sync_all())
}
