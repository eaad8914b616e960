//! How a command fails, and with which exit code.

use std::process::ExitCode;

use crate::config::ConfigError;

/// Exit code of every failure without a code of its own.
pub const ERROR: u8 = 1;
/// Exit code of a plan that does not fit the budgets.
pub const DOES_NOT_FIT: u8 = 3;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The library refused or failed.
    #[error(transparent)]
    Library(#[from] crate::Error),
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
        ExitCode::from(if matches!(self, CliError::Library(crate::Error::DoesNotFit(_))) {
            DOES_NOT_FIT
        } else {
            ERROR
        })
    }
}
