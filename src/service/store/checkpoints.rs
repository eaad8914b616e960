//! Checkpoints that a job has saved.

use rusqlite::{Connection, OptionalExtension, Row};

use super::{CheckpointId, JobId, Losses, Page, SavedCheckpoint, Seq, Store, StoreError, UnixTime, cursor};

/// A stored checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointRow {
    /// Position.
    pub seq: Seq,
    /// Name.
    pub id: CheckpointId,
    /// When it was stored.
    pub created_at: UnixTime,
    /// Steps done.
    pub step: u64,
    /// Where it is.
    pub directory: String,
    /// Losses with its weights.
    pub losses: Losses,
}

fn read(row: &Row<'_>) -> rusqlite::Result<CheckpointRow> {
    Ok(CheckpointRow {
        seq: row.get("seq")?,
        id: row.get("id")?,
        created_at: row.get("created_at")?,
        step: row.get::<_, i64>("step")? as u64,
        directory: row.get("directory")?,
        losses: Losses { train_loss: row.get("train_loss")?, valid_loss: row.get("valid_loss")? },
    })
}

/// Stores a checkpoint and says whether it is new: one that a resumed run reports or saves again keeps its name.
pub(super) fn insert(
    connection: &Connection,
    job: &JobId,
    id: &CheckpointId,
    saved: &SavedCheckpoint,
    losses: Losses,
) -> Result<bool, StoreError> {
    let known = connection.execute(
        "UPDATE checkpoints SET directory = ?3, removed = 0 WHERE job = ?1 AND step = ?2",
        (job, saved.step as i64, &saved.directory),
    )?;
    if known > 0 {
        return Ok(false);
    }
    connection.execute(
        "INSERT INTO checkpoints (id, job, created_at, step, directory, train_loss, valid_loss) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        (id, job, UnixTime::now(), saved.step as i64, &saved.directory, losses.train_loss, losses.valid_loss),
    )?;
    Ok(true)
}

impl Store {
    /// Checkpoints of a job that still exist, newest first.
    pub fn checkpoints(
        &self,
        job: &JobId,
        after: Option<&CheckpointId>,
        limit: usize,
    ) -> Result<Page<CheckpointRow>, StoreError> {
        let before = match after {
            Some(id) => {
                let sql = "SELECT step FROM checkpoints WHERE job = ?1 AND id = ?2";
                cursor(&self.connection, "checkpoint", sql, (job, id), id.as_str())?.0
            }
            None => i64::MAX,
        };
        let sql = "SELECT * FROM checkpoints WHERE job = ?1 AND step < ?2 AND NOT removed ORDER BY step DESC LIMIT ?3";
        let mut statement = self.connection.prepare(sql)?;
        let rows = statement.query_map((job, before, limit as i64 + 1), read)?;
        Ok(Page::cut(rows.collect::<Result<_, _>>()?, limit))
    }

    /// A checkpoint that still exists.
    pub fn checkpoint(&self, id: &CheckpointId) -> Result<Option<CheckpointRow>, StoreError> {
        let sql = "SELECT * FROM checkpoints WHERE id = ?1 AND NOT removed";
        Ok(self.connection.query_row(sql, [id], read).optional()?)
    }

    /// The checkpoint of a job after `step`, if it still exists; the newest if no step is named.
    pub fn checkpoint_at(&self, job: &JobId, step: Option<u64>) -> Result<Option<CheckpointRow>, StoreError> {
        let sql = "SELECT * FROM checkpoints WHERE job = ?1 AND step = coalesce(?2, step) AND NOT removed \
                   ORDER BY step DESC LIMIT 1";
        Ok(self.connection.query_row(sql, (job, step.map(|step| step as i64)), read).optional()?)
    }

    /// Marks checkpoints whose directories training has removed.
    pub fn forget_checkpoints(&mut self, ids: &[CheckpointId]) -> Result<(), StoreError> {
        self.transaction(|transaction| {
            for id in ids {
                transaction.execute("UPDATE checkpoints SET removed = 1 WHERE id = ?1", [id])?;
            }
            Ok(())
        })
    }
}
