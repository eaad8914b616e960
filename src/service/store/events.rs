//! What happened to a job, in the order it was stored.

use std::fmt;

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension, Row};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{CheckpointId, EventId, JobId, Page, Seq, Store, StoreError, UnixTime, checkpoints, cursor, json};

/// How much an event matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As expected.
    Info,
    /// Nothing is lost, but somebody may want to know.
    Warn,
    /// Something did not work.
    Error,
}

impl Level {
    /// As clients see it.
    pub fn name(self) -> &'static str {
        match self {
            Level::Info => "info",
            Level::Warn => "warn",
            Level::Error => "error",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl ToSql for Level {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        self.name().to_sql()
    }
}

impl FromSql for Level {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        match value.as_str()? {
            "info" => Ok(Level::Info),
            "warn" => Ok(Level::Warn),
            "error" => Ok(Level::Error),
            _ => Err(FromSqlError::InvalidType),
        }
    }
}

/// An event that is not stored yet.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    /// How much it matters.
    pub level: Level,
    /// One line for people.
    pub message: String,
    /// The step whose metrics it holds; the same step is stored once.
    pub step: Option<u64>,
    /// Metrics.
    pub data: Value,
}

impl NewEvent {
    /// As expected.
    pub fn info(message: String) -> Self {
        NewEvent { level: Level::Info, message, step: None, data: Value::Object(Map::new()) }
    }

    /// Nothing is lost.
    pub fn warn(message: String) -> Self {
        NewEvent { level: Level::Warn, ..NewEvent::info(message) }
    }

    /// Something did not work.
    pub fn error(message: String) -> Self {
        NewEvent { level: Level::Error, ..NewEvent::info(message) }
    }

    /// The metrics of a step.
    pub fn metrics(step: u64, message: String, data: Value) -> Self {
        NewEvent { level: Level::Info, message, step: Some(step), data }
    }
}

/// A stored event.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // as in `NewEvent`
pub struct EventRow {
    pub seq: Seq,
    pub id: EventId,
    pub created_at: UnixTime,
    pub level: Level,
    pub message: String,
    pub step: Option<u64>,
    pub data: Value,
}

/// How far a job is.
#[derive(Clone, Copy, Debug)]
pub struct StepsDone {
    /// The newest step.
    pub step: u64,
    /// Tokens trained up to it.
    pub tokens: u64,
    /// When all steps will be done, as far as is known.
    pub estimated_finish: Option<UnixTime>,
}

/// What a worker reported, to be stored together.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// In order.
    pub events: Vec<NewEvent>,
    /// How far it is.
    pub progress: Option<StepsDone>,
    /// Checkpoints that are safe on disk.
    pub checkpoints: Vec<SavedCheckpoint>,
}

/// A checkpoint that is safe on disk.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedCheckpoint {
    /// Steps done.
    pub step: u64,
    /// Where it is.
    pub directory: String,
    /// Losses of that step; `None` where its report has them.
    pub losses: Option<Losses>,
}

/// Losses with the weights of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Losses {
    /// On what it was trained on.
    pub train_loss: Option<f64>,
    /// On validation data, where it was due.
    pub valid_loss: Option<f64>,
}

fn read(row: &Row<'_>) -> rusqlite::Result<EventRow> {
    Ok(EventRow {
        seq: row.get("seq")?,
        id: row.get("id")?,
        created_at: row.get("created_at")?,
        level: row.get("level")?,
        message: row.get("message")?,
        step: row.get::<_, Option<i64>>("step")?.map(|step| step as u64),
        data: json(row, "data")?,
    })
}

/// Stores an event, unless it repeats the metrics of a step.
pub(super) fn insert(connection: &Connection, job: &JobId, event: &NewEvent) -> Result<(), StoreError> {
    connection.execute(
        "INSERT INTO events (id, job, created_at, level, message, step, data) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) \
         ON CONFLICT (job, step) DO NOTHING",
        (
            EventId::random()?,
            job,
            UnixTime::now(),
            event.level,
            &event.message,
            event.step.map(|step| step as i64),
            event.data.to_string(),
        ),
    )?;
    Ok(())
}

/// The losses of a step, if it was reported.
fn losses_of(connection: &Connection, job: &JobId, step: u64) -> Result<Losses, StoreError> {
    let sql = "SELECT data FROM events WHERE job = ?1 AND step = ?2";
    let losses = connection.query_row(sql, (job, step as i64), |row| json(row, "data")).optional()?;
    Ok(losses.unwrap_or_default())
}

impl Store {
    /// Stores what a worker reported, all of it or nothing.
    pub fn store_report(&mut self, job: &JobId, report: &Report) -> Result<(), StoreError> {
        self.transaction(|transaction| {
            for event in &report.events {
                insert(transaction, job, event)?;
            }
            if let Some(StepsDone { step, tokens, estimated_finish }) = report.progress {
                // After a restart the first steps are repeated; progress that was seen is not taken back.
                transaction.execute(
                    "UPDATE jobs SET step = max(step, ?2), trained_tokens = max(trained_tokens, ?3), \
                     estimated_finish = ?4 WHERE id = ?1",
                    (job, step as i64, tokens as i64, estimated_finish),
                )?;
            }
            for saved in &report.checkpoints {
                let losses = saved.losses.map_or_else(|| losses_of(transaction, job, saved.step), Ok)?;
                let is_new = checkpoints::insert(transaction, job, &CheckpointId::random()?, saved, losses)?;
                if is_new {
                    // It got somewhere: later deaths are counted anew.
                    transaction.execute("UPDATE jobs SET restarts = 0 WHERE id = ?1", [job])?;
                }
            }
            Ok(())
        })
    }

    /// Stores one event.
    pub fn add_event(&mut self, job: &JobId, event: &NewEvent) -> Result<(), StoreError> {
        self.transaction(|transaction| insert(transaction, job, event))
    }

    /// Events of a job, newest first.
    pub fn events(&self, job: &JobId, after: Option<&EventId>, limit: usize) -> Result<Page<EventRow>, StoreError> {
        let before = match after {
            Some(id) => {
                let sql = "SELECT seq FROM events WHERE job = ?1 AND id = ?2";
                cursor(&self.connection, "event", sql, (job, id), id.as_str())?
            }
            None => Seq(i64::MAX),
        };
        let sql = "SELECT * FROM events WHERE job = ?1 AND seq < ?2 ORDER BY seq DESC LIMIT ?3";
        let mut statement = self.connection.prepare_cached(sql)?;
        let rows = statement.query_map((job, before, limit as i64 + 1), read)?;
        Ok(Page::cut(rows.collect::<Result<_, _>>()?, limit))
    }

    /// The newest event of a job; 0 if there is none.
    pub fn newest_event(&self, job: &JobId) -> Result<Seq, StoreError> {
        let sql = "SELECT max(seq) FROM events WHERE job = ?1";
        let newest: Option<Seq> = self.connection.query_row(sql, [job], |row| row.get(0))?;
        Ok(newest.unwrap_or(Seq(0)))
    }

    /// Events of a job that were stored after `seq`, oldest first, for a stream.
    pub fn events_since(&self, job: &JobId, seq: Seq, limit: usize) -> Result<Vec<EventRow>, StoreError> {
        let sql = "SELECT * FROM events WHERE job = ?1 AND seq > ?2 ORDER BY seq LIMIT ?3";
        let mut statement = self.connection.prepare_cached(sql)?;
        let rows = statement.query_map((job, seq, limit as i64), read)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}
