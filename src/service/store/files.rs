//! Files that clients uploaded, and result files of jobs. The content lies in the data directory under the file's id.

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use rusqlite::{OptionalExtension, Row};
use serde::Serialize;
use utoipa::ToSchema;

use super::{FileId, Page, Seq, Store, StoreError, UnixTime, cursor};

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// Data to train on.
    FineTune,
    /// Metrics of a job.
    FineTuneResults,
}

impl Purpose {
    /// As clients see it.
    pub fn name(self) -> &'static str {
        match self {
            Purpose::FineTune => "fine-tune",
            Purpose::FineTuneResults => "fine-tune-results",
        }
    }
}

impl ToSql for Purpose {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        self.name().to_sql()
    }
}

impl FromSql for Purpose {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        match value.as_str()? {
            "fine-tune" => Ok(Purpose::FineTune),
            "fine-tune-results" => Ok(Purpose::FineTuneResults),
            _ => Err(FromSqlError::InvalidType),
        }
    }
}

/// A stored file.
#[derive(Clone, Debug, PartialEq)]
pub struct FileRow {
    /// Position.
    pub seq: Seq,
    /// Name.
    pub id: FileId,
    /// The client's name for it: text to show, never part of a path.
    pub name: String,
    /// What it is for.
    pub purpose: Purpose,
    /// Size.
    pub bytes: u64,
    /// When it was stored.
    pub created_at: UnixTime,
}

fn read(row: &Row<'_>) -> rusqlite::Result<FileRow> {
    Ok(FileRow {
        seq: row.get("seq")?,
        id: row.get("id")?,
        name: row.get("name")?,
        purpose: row.get("purpose")?,
        bytes: row.get::<_, i64>("bytes")? as u64,
        created_at: row.get("created_at")?,
    })
}

impl Store {
    /// Stores a file whose content is safe on disk.
    pub fn add_file(&mut self, id: &FileId, name: &str, purpose: Purpose, bytes: u64) -> Result<FileRow, StoreError> {
        self.transaction(|transaction| {
            transaction.execute(
                "INSERT INTO files (id, name, purpose, bytes, created_at) VALUES (?1, ?2, ?3, ?4, ?5)",
                (id, name, purpose, bytes as i64, UnixTime::now()),
            )?;
            Ok(transaction.query_row("SELECT * FROM files WHERE id = ?1", [id], read)?)
        })
    }

    /// One file.
    pub fn file(&self, id: &FileId) -> Result<Option<FileRow>, StoreError> {
        Ok(self.connection.query_row("SELECT * FROM files WHERE id = ?1", [id], read).optional()?)
    }

    /// Files, newest first unless `ascending`.
    pub fn files(
        &self,
        purpose: Option<&str>,
        after: Option<&FileId>,
        limit: usize,
        ascending: bool,
    ) -> Result<Page<FileRow>, StoreError> {
        let start = match after {
            Some(id) => cursor(&self.connection, "file", "SELECT seq FROM files WHERE id = ?1", [id], id.as_str())?,
            None => Seq(if ascending { 0 } else { i64::MAX }),
        };
        let sql = if ascending {
            "SELECT * FROM files WHERE seq > ?1 AND purpose = coalesce(?2, purpose) ORDER BY seq LIMIT ?3"
        } else {
            "SELECT * FROM files WHERE seq < ?1 AND purpose = coalesce(?2, purpose) ORDER BY seq DESC LIMIT ?3"
        };
        let mut statement = self.connection.prepare(sql)?;
        let rows = statement.query_map((start, purpose, limit as i64 + 1), read)?;
        Ok(Page::cut(rows.collect::<Result<_, _>>()?, limit))
    }

    /// Forgets a file; false if there is none.
    pub fn remove_file(&mut self, id: &FileId) -> Result<bool, StoreError> {
        self.transaction(|transaction| Ok(transaction.execute("DELETE FROM files WHERE id = ?1", [id])? > 0))
    }
}
