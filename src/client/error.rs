//! Why a service did not do what it was asked.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::data::DataError;

/// Anything that can go wrong between a client and a service; every message says what to do.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody answers, or the connection broke.
    #[error("no service answers at {url} ({reason}): start one with `patrickstar serve`, or give another --url")]
    Unreachable {
        /// Where it was looked for.
        url: String,
        /// Why it was not found.
        reason: String,
    },
    /// The service has been away for too long.
    #[error("no service at {url} for {} s ({reason}): the job goes on when it is back; watch it again then", waited.as_secs())]
    Lost {
        /// Where it was.
        url: String,
        /// How long it was waited for.
        waited: Duration,
        /// What the last try met.
        reason: String,
    },
    /// The service refused, with its own words.
    #[error("{message} (HTTP {status})")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What the service said.
        message: String,
    },
    /// What answers is no service of this program.
    #[error("{url} answered what no patrickstar service would ({reason}): check --url")]
    Foreign {
        /// Who answered.
        url: String,
        /// What is odd about it.
        reason: String,
    },
    /// The address cannot be used.
    #[error("`{0}` is not the address of a service: give one such as http://127.0.0.1:8080")]
    Url(String),
    /// A file cannot be read.
    #[error("{path}: {source}: check the path and its permissions")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The token cannot be sent.
    #[error("{0} holds no token: write the token alone in its first line")]
    Token(PathBuf),
    /// The training data cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
}

impl ClientError {
    /// Whether it may go better a little later.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            ClientError::Unreachable { .. } => true,
            ClientError::Refused { status, .. } => matches!(status, 429 | 500..=599),
            _ => false,
        }
    }
}
