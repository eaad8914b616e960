//! How a command fails, and with which exit code.

use std::process::ExitCode;

use crate::client::ClientError;
use crate::config::ConfigError;

/// Exit code of every failure without a code of its own.
pub const ERROR: u8 = 1;
/// Exit code of a plan that does not fit the budgets.
pub const DOES_NOT_FIT: u8 = 3;
/// Exit code of a job that somebody cancelled.
pub const CANCELLED: u8 = 4;
/// Exit code where no service answers: what became of a job is not known.
pub const UNREACHABLE: u8 = 5;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The library refused or failed.
    #[error(transparent)]
    Library(#[from] crate::Error),
    /// A service refused, or is not there.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A job of a service failed.
    #[error("job {job} failed: {message}")]
    JobFailed {
        /// Its id.
        job: String,
        /// For programs.
        code: String,
        /// Why.
        message: String,
    },
    /// A job of a service was cancelled.
    #[error("job {0} was cancelled")]
    JobCancelled(String),
    /// Something a command was doing failed.
    #[error("{doing}")]
    Failed {
        /// What was being done.
        doing: String,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Output could not be written.
    #[error("cannot write the output")]
    Output(#[from] std::io::Error),
}

impl CliError {
    /// The exit code that scripts rely on.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            CliError::Library(crate::Error::DoesNotFit(_)) => DOES_NOT_FIT,
            CliError::JobFailed { code, .. } if code == "insufficient_memory" => DOES_NOT_FIT,
            CliError::JobCancelled(_) => CANCELLED,
            CliError::Client(ClientError::Unreachable { .. } | ClientError::Lost { .. }) => UNREACHABLE,
            _ => ERROR,
        })
    }
}
