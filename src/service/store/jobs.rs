//! Jobs and their life: which status may follow which, and who is next.

use std::fmt;
use std::path::PathBuf;

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension, Row, named_params};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{FileId, JobId, NewEvent, Page, Seq, Store, StoreError, UnixTime, cursor, events, json};
use crate::telemetry::metrics::{Counter, count_with};

/// Where a job is in its life. It is what the job should be doing: a worker may still be winding down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Accepted; its file has not been read yet.
    ValidatingFiles,
    /// Waits for its device.
    Queued,
    /// Trains, or waits to be restarted after its worker died.
    Running,
    /// Stopped until somebody resumes it.
    Paused,
    /// All steps are done.
    Succeeded,
    /// Ended by an error.
    Failed,
    /// Ended by request.
    Cancelled,
}

impl Status {
    /// Every status.
    pub const ALL: [Status; 7] = [
        Status::ValidatingFiles,
        Status::Queued,
        Status::Running,
        Status::Paused,
        Status::Succeeded,
        Status::Failed,
        Status::Cancelled,
    ];

    /// As clients see it.
    pub fn name(self) -> &'static str {
        match self {
            Status::ValidatingFiles => "validating_files",
            Status::Queued => "queued",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Succeeded => "succeeded",
            Status::Failed => "failed",
            Status::Cancelled => "cancelled",
        }
    }

    /// Whether nothing follows it.
    pub fn is_final(self) -> bool {
        matches!(self, Status::Succeeded | Status::Failed | Status::Cancelled)
    }

    /// Whether a job may go from this status to `next`.
    pub fn may_become(self, next: Status) -> bool {
        use Status::{Cancelled, Failed, Paused, Queued, Running, Succeeded, ValidatingFiles};
        match next {
            ValidatingFiles => false,
            // A running one makes way for another.
            Queued => matches!(self, ValidatingFiles | Paused | Running),
            Running => self == Queued,
            // A worker that was told to pause may have been in its last step.
            Succeeded => matches!(self, Running | Paused | Queued),
            Paused => matches!(self, ValidatingFiles | Queued | Running),
            Failed | Cancelled => !self.is_final(),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl ToSql for Status {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        self.name().to_sql()
    }
}

impl FromSql for Status {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let text = value.as_str()?;
        Status::ALL.into_iter().find(|status| status.name() == text).ok_or(FromSqlError::InvalidType)
    }
}

/// A job that a client asked for.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// The model as the client named it.
    pub model: String,
    /// What it trains on.
    pub training_file: FileId,
    /// What its loss is looked at on, without training.
    pub validation_file: Option<FileId>,
    /// Part of the trained model's name.
    pub suffix: Option<String>,
    /// Seed of everything random.
    pub seed: u32,
    /// The client's own notes.
    pub metadata: Map<String, Value>,
    /// As the client gave them.
    pub hyperparameters: Value,
    /// Passes over the data, where the configuration does not name the steps.
    pub epochs: Option<u32>,
    /// The whole configuration, as JSON.
    pub config: Value,
    /// The device that it needs for itself.
    pub device: String,
    /// Higher ones are first.
    pub priority: i32,
}

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For programs.
    pub code: String,
    /// For people.
    pub message: String,
}

/// A stored job.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // as in `NewJob`, or plain
pub struct JobRow {
    pub seq: Seq,
    pub id: JobId,
    pub status: Status,
    pub created_at: UnixTime,
    pub finished_at: Option<UnixTime>,
    pub model: String,
    pub training_file: FileId,
    pub validation_file: Option<FileId>,
    pub suffix: Option<String>,
    pub seed: u32,
    pub metadata: Map<String, Value>,
    pub hyperparameters: Value,
    pub epochs: Option<u32>,
    /// Whether its file was read and its configuration is final.
    pub validated: bool,
    pub config: Value,
    pub device: String,
    pub priority: i32,
    /// Steps done.
    pub step: u64,
    pub trained_tokens: u64,
    /// When all steps will be done, as its worker estimated last.
    pub estimated_finish: Option<UnixTime>,
    /// Times its worker died since it last saved a checkpoint.
    pub restarts: u32,
    pub failure: Option<Failure>,
    pub fine_tuned_model: Option<String>,
    pub result_file: Option<FileId>,
}

impl JobRow {
    /// What clients call the trained model.
    pub fn trained_name(&self) -> String {
        let tail = self.id.as_str().trim_start_matches(JobId::PREFIX);
        format!("ft:{}:patrickstar:{}:{tail}", self.model, self.suffix.as_deref().unwrap_or_default())
    }
}

/// Which jobs a list shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MetadataFilter {
    /// All.
    #[default]
    Any,
    /// Those without metadata.
    Absent,
    /// Those with all of these pairs.
    Pairs(Vec<(String, String)>),
}

fn read(row: &Row<'_>) -> rusqlite::Result<JobRow> {
    let code: Option<String> = row.get("error_code")?;
    let message: Option<String> = row.get("error_message")?;
    Ok(JobRow {
        seq: row.get("seq")?,
        id: row.get("id")?,
        status: row.get("status")?,
        created_at: row.get("created_at")?,
        finished_at: row.get("finished_at")?,
        model: row.get("model")?,
        training_file: row.get("training_file")?,
        validation_file: row.get("validation_file")?,
        suffix: row.get("suffix")?,
        seed: row.get("seed")?,
        metadata: json(row, "metadata")?,
        hyperparameters: json(row, "hyperparameters")?,
        epochs: row.get("epochs")?,
        validated: row.get("validated")?,
        config: json(row, "config")?,
        device: row.get("device")?,
        priority: row.get("priority")?,
        step: row.get::<_, i64>("step")? as u64,
        trained_tokens: row.get::<_, i64>("trained_tokens")? as u64,
        estimated_finish: row.get("estimated_finish")?,
        restarts: row.get("restarts")?,
        failure: code.zip(message).map(|(code, message)| Failure { code, message }),
        fine_tuned_model: row.get("fine_tuned_model")?,
        result_file: row.get("result_file")?,
    })
}

fn find(connection: &Connection, id: &JobId) -> Result<Option<JobRow>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT * FROM jobs WHERE id = ?1")?;
    Ok(statement.query_row([id], read).optional()?)
}

impl Store {
    /// Accepts a job, unless `most_waiting` others wait already; `None` then.
    pub fn create_job(&mut self, job: &NewJob, most_waiting: usize) -> Result<Option<JobRow>, StoreError> {
        let id = JobId::random()?;
        self.transaction(|transaction| {
            let waiting: i64 = transaction.query_row(
                "SELECT count(*) FROM jobs WHERE status IN ('validating_files', 'queued', 'paused')",
                [],
                |row| row.get(0),
            )?;
            if waiting as usize >= most_waiting {
                return Ok(None);
            }
            transaction.execute(
                "INSERT INTO jobs (id, status, created_at, model, training_file, validation_file, suffix, seed, metadata, \
                 hyperparameters, epochs, config, device, priority) VALUES (:id, :status, :created_at, :model, \
                 :training_file, :validation_file, :suffix, :seed, :metadata, :hyperparameters, :epochs, :config, :device, :priority)",
                named_params! {
                    ":id": id, ":status": Status::ValidatingFiles, ":created_at": UnixTime::now(), ":model": job.model,
                    ":training_file": job.training_file, ":validation_file": job.validation_file, ":suffix": job.suffix, ":seed": job.seed,
                    ":metadata": Value::Object(job.metadata.clone()).to_string(),
                    ":hyperparameters": job.hyperparameters.to_string(), ":epochs": job.epochs,
                    ":config": job.config.to_string(), ":device": job.device, ":priority": job.priority,
                },
            )?;
            events::insert(transaction, &id, &NewEvent::info(format!("Created fine-tuning job: {id}")))?;
            find(transaction, &id)
        })
    }

    /// One job.
    pub fn job(&self, id: &JobId) -> Result<Option<JobRow>, StoreError> {
        find(&self.connection, id)
    }

    /// Jobs, newest first.
    pub fn jobs(
        &self,
        after: Option<&JobId>,
        limit: usize,
        filter: &MetadataFilter,
    ) -> Result<Page<JobRow>, StoreError> {
        let before = match after {
            Some(id) => cursor(&self.connection, "job", "SELECT seq FROM jobs WHERE id = ?1", [id], id.as_str())?,
            None => Seq(i64::MAX),
        };
        let mut statement = self.connection.prepare("SELECT * FROM jobs WHERE seq < ?1 ORDER BY seq DESC")?;
        let mut rows = statement.query([before])?;
        let mut found = Vec::new();
        while let Some(row) = rows.next()? {
            let job = read(row)?;
            if matches(&job.metadata, filter) {
                found.push(job);
            }
            if found.len() > limit {
                break;
            }
        }
        Ok(Page::cut(found, limit))
    }

    /// Moves a job to another status and tells its events, if [`Status::may_become`] allows it; `None` if not.
    pub fn change_status(&mut self, id: &JobId, next: Status, event: &NewEvent) -> Result<Option<JobRow>, StoreError> {
        let changed = self.transaction(|transaction| {
            let Some(job) = find(transaction, id)?.filter(|job| job.status.may_become(next)) else { return Ok(None) };
            let finished = next.is_final().then(UnixTime::now).or(job.finished_at);
            transaction.execute("UPDATE jobs SET status = ?2, finished_at = ?3 WHERE id = ?1", (id, next, finished))?;
            events::insert(transaction, id, event)?;
            find(transaction, id)
        })?;
        if changed.is_some() && next.is_final() {
            count_with(Counter::JobsFinished, &[next.name()]);
        }
        Ok(changed)
    }

    /// Lets a paused job go on: to the queue, or to have its file read if that never happened. `None` if it is not paused.
    pub fn resume_job(&mut self, id: &JobId) -> Result<Option<JobRow>, StoreError> {
        self.transaction(|transaction| {
            let Some(job) = find(transaction, id)?.filter(|job| job.status == Status::Paused) else { return Ok(None) };
            let next = if job.validated { Status::Queued } else { Status::ValidatingFiles };
            transaction
                .execute("UPDATE jobs SET status = ?2, restarts = 0, not_before = 0 WHERE id = ?1", (id, next))?;
            events::insert(transaction, id, &NewEvent::info("The job was resumed".to_owned()))?;
            find(transaction, id)
        })
    }

    /// Ends a job with a reason; false if it has ended already.
    pub fn fail_job(&mut self, id: &JobId, failure: &Failure) -> Result<bool, StoreError> {
        let failed = self.transaction(|transaction| {
            let Some(_) = find(transaction, id)?.filter(|job| !job.status.is_final()) else { return Ok(false) };
            transaction.execute(
                "UPDATE jobs SET status = ?2, finished_at = ?3, error_code = ?4, error_message = ?5 WHERE id = ?1",
                (id, Status::Failed, UnixTime::now(), &failure.code, &failure.message),
            )?;
            events::insert(transaction, id, &NewEvent::error(failure.message.clone()))?;
            Ok(true)
        })?;
        if failed {
            count_with(Counter::JobsFinished, &[Status::Failed.name()]);
        }
        Ok(failed)
    }

    /// Ends a job well, with the trained model's name and the file of its metrics.
    pub fn finish_job(&mut self, id: &JobId, model: &str, result: Option<&FileId>) -> Result<bool, StoreError> {
        let finished = self.transaction(|transaction| {
            let done = find(transaction, id)?.filter(|job| job.status.may_become(Status::Succeeded));
            let Some(_) = done else { return Ok(false) };
            transaction.execute(
                "UPDATE jobs SET status = ?2, finished_at = ?3, fine_tuned_model = ?4, result_file = ?5 WHERE id = ?1",
                (id, Status::Succeeded, UnixTime::now(), model, result),
            )?;
            events::insert(transaction, id, &NewEvent::info(format!("New fine-tuned model created: {model}")))?;
            events::insert(transaction, id, &NewEvent::info("The job has successfully completed".to_owned()))?;
            Ok(true)
        })?;
        if finished {
            count_with(Counter::JobsFinished, &[Status::Succeeded.name()]);
        }
        Ok(finished)
    }

    /// Puts a validated job in the queue with its final configuration; false if it was paused or cancelled meanwhile.
    pub fn queue_validated(&mut self, id: &JobId, config: &Value) -> Result<bool, StoreError> {
        self.transaction(|transaction| {
            let Some(job) = find(transaction, id)?.filter(|job| !job.status.is_final()) else { return Ok(false) };
            transaction
                .execute("UPDATE jobs SET config = ?2, validated = 1 WHERE id = ?1", (id, config.to_string()))?;
            if job.status == Status::ValidatingFiles {
                transaction.execute("UPDATE jobs SET status = ?2 WHERE id = ?1", (id, Status::Queued))?;
                let event = NewEvent::info("Files validated, moving job to queued state".to_owned());
                events::insert(transaction, id, &event)?;
            }
            Ok(true)
        })
    }

    /// Jobs that wait for their file to be read, oldest first.
    pub fn jobs_to_validate(&self) -> Result<Vec<JobRow>, StoreError> {
        let mut statement =
            self.connection.prepare_cached("SELECT * FROM jobs WHERE status = 'validating_files' ORDER BY seq")?;
        let rows = statement.query_map([], read)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Jobs that may train, in the order they should: those that had begun, then by priority, then the oldest.
    pub fn runnable_jobs(&self) -> Result<Vec<(JobRow, UnixTime)>, StoreError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT * FROM jobs WHERE status IN ('running', 'queued') ORDER BY status = 'running' DESC, priority DESC, seq",
        )?;
        let rows = statement.query_map([], |row| Ok((read(row)?, row.get("not_before")?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// How many jobs have each status; those that none has are absent.
    pub fn count_jobs(&self) -> Result<Vec<(Status, u64)>, StoreError> {
        let mut statement = self.connection.prepare_cached("SELECT status, count(*) FROM jobs GROUP BY status")?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Whether a job that has not ended needs the file.
    pub fn file_in_use(&self, file: &FileId) -> Result<bool, StoreError> {
        let sql = "SELECT count(*) FROM jobs WHERE (training_file = ?1 OR validation_file = ?1) \
                   AND status NOT IN ('succeeded', 'failed', 'cancelled')";
        let count: i64 = self.connection.query_row(sql, [file], |row| row.get(0))?;
        Ok(count > 0)
    }

    /// Counts a worker's death and says when the next may start.
    pub fn note_restart(
        &mut self,
        id: &JobId,
        restarts: u32,
        not_before: UnixTime,
        event: &NewEvent,
    ) -> Result<(), StoreError> {
        self.transaction(|transaction| {
            transaction
                .execute("UPDATE jobs SET restarts = ?2, not_before = ?3 WHERE id = ?1", (id, restarts, not_before))?;
            events::insert(transaction, id, event)?;
            Ok(())
        })
    }

    /// Trained models, newest first: name, job and when it ended.
    pub fn trained_models(&self) -> Result<Vec<(String, JobId, UnixTime)>, StoreError> {
        let sql =
            "SELECT fine_tuned_model, id, finished_at FROM jobs WHERE fine_tuned_model IS NOT NULL ORDER BY seq DESC";
        let mut statement = self.connection.prepare(sql)?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

fn matches(metadata: &Map<String, Value>, filter: &MetadataFilter) -> bool {
    match filter {
        MetadataFilter::Any => true,
        MetadataFilter::Absent => metadata.is_empty(),
        MetadataFilter::Pairs(pairs) => {
            pairs.iter().all(|(key, value)| metadata.get(key).and_then(Value::as_str) == Some(value))
        }
    }
}

/// Where a job keeps what it makes, under the data directory.
pub fn job_directory(data: &std::path::Path, id: &JobId) -> PathBuf {
    data.join("jobs").join(id.as_str())
}
