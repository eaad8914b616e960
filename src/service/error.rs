//! Why the service refuses or fails.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::store::{JobId, StoreError};
use crate::config::ConfigError;

/// Anything that a request, or the service itself, can run into; every message says what to do.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// The database failed, or was asked for what it does not have.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A request is wrong.
    #[error("{message}")]
    Invalid {
        /// What is wrong, and what would be right.
        message: String,
        /// The field at fault.
        param: Option<String>,
        /// For programs.
        code: &'static str,
    },
    /// There is no such thing.
    #[error("no such {what}: {id}: list what there is, or check the id")]
    NotFound {
        /// What kind of thing.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// There is no such route.
    #[error("no route for {0}: docs/API.md lists what there is")]
    NoRoute(String),
    /// The route has other methods.
    #[error("this route does not answer {0}: docs/API.md lists what it does")]
    Method(String),
    /// No or a wrong token.
    #[error("give a valid token: Authorization: Bearer ...")]
    Unauthorized,
    /// The token may not do this.
    #[error("this needs a token of scope {0}")]
    Forbidden(&'static str),
    /// The request came from where it should not.
    #[error("{0}")]
    Origin(String),
    /// A body is too large.
    #[error("the {what} is larger than {limit} bytes: send less")]
    TooLarge {
        /// Which.
        what: &'static str,
        /// Bytes that are accepted.
        limit: u64,
    },
    /// A body comes too slowly.
    #[error("the body came too slowly: send it at 1 KiB a second at least")]
    Slow,
    /// As many jobs wait as may.
    #[error("{0} jobs wait already: try again when some have ended")]
    QueueFull(usize),
    /// As many texts are written as may.
    #[error("{0} texts are being written already: try again when one is done")]
    SamplersBusy(usize),
    /// A text was not finished.
    #[error("{0}")]
    Sampling(String),
    /// A client asks too often.
    #[error("too many requests: try again in {} s", wait.as_secs_f64().ceil())]
    TooMany {
        /// When the next one may come.
        wait: Duration,
    },
    /// The service is about to end.
    #[error("the service is shutting down: try again when it is back")]
    Stopping,
    /// Nobody can be asked about a job that does not run.
    #[error("job {0} does not run now: this can be seen only while its status is running")]
    NotRunning(JobId),
    /// A worker is busy, or not ready yet.
    #[error("the worker of job {0} does not answer yet: try again in a moment")]
    NoAnswer(JobId),
    /// The disk is nearly full.
    #[error("the data directory has no room for {need} bytes: delete files or free space")]
    DiskFull {
        /// Bytes that were to be stored.
        need: u64,
    },
    /// A file of the service's own.
    #[error("{path}: {source}: check the data directory's permissions and space")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The service cannot start like this.
    #[error("{0}")]
    Setup(String),
    /// The configuration for all jobs is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A part of the service ended that never should.
    #[error("internal error: {0}")]
    Internal(String),
}

impl ServiceError {
    /// A wrong field.
    pub(super) fn invalid(param: &str, message: impl Into<String>) -> Self {
        ServiceError::Invalid { message: message.into(), param: Some(param.to_owned()), code: "invalid_value" }
    }

    /// An I/O error with its path.
    pub(super) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        ServiceError::Io { path: path.into(), source }
    }
}
