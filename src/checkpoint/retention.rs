//! Which checkpoints are kept.

use std::path::Path;

use super::reader::candidates;
use super::{CheckpointError, open};

/// Keeps the `keep` newest checkpoints of `root` and removes older ones; 0 keeps all. Nothing is removed unless the newest
/// one verifies, so that the last good checkpoint always stays.
pub fn prune(root: &Path, keep: usize) -> Result<(), CheckpointError> {
    let found = candidates(root);
    if keep == 0 || found.len() <= keep {
        return Ok(());
    }
    if let Some(newest) = found.first() {
        open(newest)?;
    }
    for path in &found[keep..] {
        std::fs::remove_dir_all(path).map_err(|error| CheckpointError::io(path, error))?;
    }
    Ok(())
}
