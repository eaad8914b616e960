//! `patrickstar worker`: hidden, because only `patrickstar serve` starts it.

use std::process::ExitCode;

use super::CliError;
use crate::service::worker;

pub fn run() -> Result<ExitCode, CliError> {
    worker::run().map_err(|source| CliError::Failed { doing: "the worker stopped".into(), source: source.into() })?;
    Ok(ExitCode::SUCCESS)
}
