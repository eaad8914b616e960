//! The errors of the library: one line each, saying what to do.

use std::path::PathBuf;

use patrickstar_actors::chunk::LayoutError;
use patrickstar_actors::error::RuntimeError;
use thiserror::Error;

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::data::DataError;

/// Anything that ends a training or keeps it from starting.
#[derive(Debug, Error)]
pub enum Error {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The text cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A checkpoint cannot be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The chunk runtime failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The model does not fit in chunks.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The model's definition is wrong.
    #[error("{0}")]
    Model(String),
    /// An operation failed.
    #[error("{0}")]
    Compute(String),
    /// The job does not fit the memory it was given.
    #[error("{0}")]
    DoesNotFit(String),
    /// A file could not be written or read.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A check did not hold.
    #[error("{0}")]
    Failed(String),
    /// A run ended before its last step.
    #[error("step {step}: {source}; {advice}")]
    Stopped {
        /// The step that was not finished.
        step: u64,
        /// Why.
        source: Box<Error>,
        /// How to go on.
        advice: String,
    },
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        // What follows the first line is a backtrace of candle's.
        Error::Compute(error.to_string().lines().next().unwrap_or_default().to_owned())
    }
}

impl Error {
    /// An I/O error with its path.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }
}
