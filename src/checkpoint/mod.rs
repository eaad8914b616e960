//! Crash-safe checkpoints.
//!
//! A checkpoint is a directory `step-000123` with one safetensors file a group and a `manifest.json` that holds the length
//! and CRC-32 of each. It is written as `step-000123.tmp`: every file is synced, then the manifest, then the directory is
//! renamed and its parent synced, and only then does `LATEST` name it. A crash at any instant leaves either the old state
//! or the new one. The reader trusts nothing it has not verified and falls back to the next older checkpoint.

mod fs;
mod reader;
mod retention;
mod writer;

use std::path::PathBuf;

use crate::train::loss_scale::LossScale;
use patrickstar_actors::types::{Precision, Step};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use fs::{FileSystem, RealFs, WriteFile, bytes_on_disk};
pub use reader::{Checkpoint, latest, open};
pub use retention::prune;
pub use writer::{CheckpointWriter, Entry};

/// Version of the layout on disk.
const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
const LATEST: &str = "LATEST";

/// What a checkpoint says beside its states.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointMeta {
    /// Steps done.
    pub step: Step,
    /// Parameters, tied ones once.
    pub parameters: u64,
    /// The run's configuration.
    pub config_toml: String,
    /// Where the run is in its data.
    pub data_position: serde_json::Value,
    /// Seed of initial values and dropout: with the step it is the whole state of the generators.
    pub rng_seed: u64,
    /// How states are stored.
    pub precision: Precision,
    /// The tokenizer's name.
    pub tokenizer: String,
    /// The model's sizes.
    pub model: serde_json::Value,
    /// The last losses.
    pub loss_history_tail: Vec<(u64, f64)>,
    /// Scale of the loss and what it depends on; absent in checkpoints from before there was one.
    #[serde(default)]
    pub loss_scale: Option<LossScale>,
}

#[derive(Debug, Serialize, Deserialize)]
struct FileRecord {
    name: String,
    bytes: u64,
    crc32: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    files: Vec<FileRecord>,
    meta: CheckpointMeta,
}

/// Why a checkpoint cannot be written or read.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("{path}: {source}: check permissions and free space; earlier checkpoints are untouched")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The disk is full.
    #[error(
        "{path}: no space left for {need} bytes: free space or lower checkpoint.keep; earlier checkpoints are untouched"
    )]
    Full {
        /// Which.
        path: PathBuf,
        /// Bytes that did not fit.
        need: u64,
    },
    /// A file is not what the manifest says.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How.
        reason: String,
    },
    /// There is no checkpoint.
    #[error("{0} holds no usable checkpoint: start without --resume, or name another directory")]
    NotFound(PathBuf),
    /// A state is missing.
    #[error("the checkpoint has no {kind} of `{tensor}` rows {from}..{to}: it belongs to another model")]
    Missing {
        /// Kind of state.
        kind: &'static str,
        /// Parameter.
        tensor: String,
        /// First row.
        from: usize,
        /// End of the rows.
        to: usize,
    },
}

impl CheckpointError {
    /// Whether there was nothing to open.
    pub fn is_not_found(&self) -> bool {
        matches!(self, CheckpointError::NotFound(_))
    }

    fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        CheckpointError::Io { path: path.into(), source }
    }
}

fn directory_name(step: Step) -> String {
    format!("step-{:06}", step.0)
}

fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix("step-")?.parse().ok()
}

#[cfg(test)]
mod tests;
