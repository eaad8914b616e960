//! `patrickstar sample`: hidden, because only `patrickstar serve` starts it.

use std::process::ExitCode;

use super::CliError;
use crate::service::sampler;

pub fn run() -> Result<ExitCode, CliError> {
    sampler::run().map_err(|source| CliError::Failed { doing: "the sampler stopped".into(), source: source.into() })?;
    Ok(ExitCode::SUCCESS)
}
