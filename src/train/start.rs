//! Where a run begins: afresh, or after a checkpoint.

use std::path::{Path, PathBuf};

use patrickstar_actors::types::Step;

use super::observer::Observer;
use crate::checkpoint::{self, Checkpoint};
use crate::error::Error;

/// Where a run begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// From the configuration's model.
    Fresh,
    /// From the newest good checkpoint of the run's directory; fresh if there is none.
    Latest,
    /// From this checkpoint.
    At(PathBuf),
}

/// Where a run keeps its checkpoints.
pub fn checkpoints_dir(output: &Path) -> PathBuf {
    output.join("checkpoints")
}

/// The checkpoint that a run of the checkpoints in `root` begins with.
pub(super) fn find_checkpoint(
    root: &Path,
    start: &Start,
    observer: &mut dyn Observer,
) -> Result<Option<Checkpoint>, Error> {
    match start {
        Start::Fresh => Ok(None),
        Start::At(path) => Ok(Some(open_or_latest(path, observer)?)),
        Start::Latest => match checkpoint::latest(root) {
            Ok((checkpoint, warnings)) => {
                warnings.iter().for_each(|warning| observer.message(warning));
                let Step(step) = checkpoint.meta().step;
                observer.message(&format!("resuming after step {step}"));
                Ok(Some(checkpoint))
            }
            Err(error) if error.is_not_found() => {
                observer.message("no checkpoint yet: starting from step 0");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        },
    }
}

/// A checkpoint's own directory, or the newest in a directory of checkpoints or of a run.
pub fn open_or_latest(path: &Path, observer: &mut dyn Observer) -> Result<Checkpoint, Error> {
    if path.join("manifest.json").is_file() {
        return Ok(checkpoint::open(path)?);
    }
    let nested = checkpoints_dir(path);
    let root = if nested.is_dir() { nested } else { path.to_owned() };
    let (checkpoint, warnings) = checkpoint::latest(&root)?;
    warnings.iter().for_each(|warning| observer.message(warning));
    Ok(checkpoint)
}
