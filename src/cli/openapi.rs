//! `patrickstar openapi`: hidden, because a running service answers the same at `/openapi.json`.

use std::process::ExitCode;

use super::{CliError, output};
use crate::service;

pub fn run() -> Result<ExitCode, CliError> {
    let text = service::openapi()
        .to_pretty_json()
        .map_err(|source| CliError::Failed { doing: "the document cannot be written".into(), source: source.into() })?;
    output::line(&text)?;
    Ok(ExitCode::SUCCESS)
}
