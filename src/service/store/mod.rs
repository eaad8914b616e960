//! What the service must not forget: jobs, events, files and checkpoints in one SQLite database.
//!
//! Every method that changes something returns after SQLite has synced it, so whoever answers a client afterwards has
//! nothing left to lose. The database is owned by this process alone.

mod checkpoints;
mod events;
mod files;
mod handle;
mod ids;
mod jobs;

use std::path::{Path, PathBuf};

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, TransactionBehavior};
use thiserror::Error;

pub use checkpoints::CheckpointRow;
pub use events::{EventRow, Level, Losses, NewEvent, Report, SavedCheckpoint, StepsDone};
pub use files::{FileRow, Purpose};
pub use handle::StoreHandle;
pub use ids::{CheckpointId, EventId, FileId, JobId, Seq, UnixTime};
pub use jobs::{Failure, JobRow, MetadataFilter, NewJob, Status, job_directory};

/// Each makes the database of one version into that of the next; what was released is never edited.
const MIGRATIONS: [&str; 3] = [include_str!("001.sql"), include_str!("002.sql"), include_str!("003.sql")];

/// Why something cannot be stored or found.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The database refused.
    #[error("the database: {0}: check the space and permissions of the data directory")]
    Database(#[from] rusqlite::Error),
    /// The database is from a newer program.
    #[error("{path} has version {found}, this program knows {}: use the newer program, or another --data", MIGRATIONS.len())]
    TooNew {
        /// Which.
        path: PathBuf,
        /// Its version.
        found: usize,
    },
    /// A name of the wrong form.
    #[error("`{text}` is not a name of the form {prefix}0123...")]
    BadId {
        /// What such names begin with.
        prefix: &'static str,
        /// What was given.
        text: String,
    },
    /// The system has no random numbers.
    #[error("the system gives no random numbers: {0}")]
    Random(String),
    /// A call was ended by a panic.
    #[error("the database call did not finish: {0}")]
    Interrupted(String),
    /// The row that a page should begin after is not in the list.
    #[error("no {what} `{id}` to list after: use the last id of the previous page")]
    NoCursor {
        /// What is listed.
        what: &'static str,
        /// The id.
        id: String,
    },
}

/// Part of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Page<T> {
    /// The rows.
    pub rows: Vec<T>,
    /// Whether there are more after them.
    pub has_more: bool,
}

impl<T> Page<T> {
    /// Cuts rows that were asked for with a limit of one more.
    fn cut(mut rows: Vec<T>, limit: usize) -> Self {
        let has_more = rows.len() > limit;
        rows.truncate(limit);
        Page { rows, has_more }
    }
}

/// The database.
pub struct Store {
    connection: Connection,
}

impl Store {
    /// Opens the database, creating it or bringing it to this program's version.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let mut connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // With less, a power cut may take what was answered already.
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        migrate(&mut connection, path)?;
        Ok(Store { connection })
    }

    /// Runs `change` whole or not at all.
    fn transaction<T>(
        &mut self,
        change: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let result = change(&transaction)?;
        transaction.commit()?;
        Ok(result)
    }
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Exclusive)?;
    transaction.execute_batch(
        "CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, applied_at INTEGER NOT NULL)",
    )?;
    let found: Option<i64> =
        transaction.query_row("SELECT max(version) FROM migrations", [], |row| row.get(0)).optional()?.flatten();
    let found = found.unwrap_or(0) as usize;
    if found > MIGRATIONS.len() {
        return Err(StoreError::TooNew { path: path.to_owned(), found });
    }
    for (index, sql) in MIGRATIONS.iter().enumerate().skip(found) {
        transaction.execute_batch(sql)?;
        transaction.execute("INSERT INTO migrations VALUES (?1, ?2)", (index as i64 + 1, UnixTime::now()))?;
    }
    Ok(transaction.commit()?)
}

/// A column of JSON.
fn json<T: serde::de::DeserializeOwned>(row: &Row<'_>, column: &str) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    serde_json::from_str(&text)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(0, Type::Text, Box::new(error)))
}

/// The row number of the row that a page begins after.
fn cursor(
    connection: &Connection,
    what: &'static str,
    sql: &str,
    parameters: impl rusqlite::Params,
    id: &str,
) -> Result<Seq, StoreError> {
    let seq = connection.query_row(sql, parameters, |row| row.get(0)).optional()?;
    seq.ok_or_else(|| StoreError::NoCursor { what, id: id.to_owned() })
}

#[cfg(test)]
mod tests;
