//! Reads a job's file before the job may wait for a device, and turns passes over it into steps.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::config::Config;
use crate::data::{Batches, Corpus, Tokenizer};
use crate::error::Error;
use crate::plan::Plan;
use crate::service::store::{Failure, JobRow};
use crate::train::model::build;
use crate::train::program::Program;

/// The job's final configuration, or why it cannot run. Reads the whole file: not for a thread that must not block.
pub(super) fn validate(job: &JobRow, file: &Path) -> Result<Value, Failure> {
    let failed = |code: &str, message: String| Failure { code: code.to_owned(), message };
    let config: Config = serde_json::from_value(job.config.clone())
        .map_err(|error| failed("invalid_configuration", format!("the stored configuration: {error}")))?;
    let config = prepare(config, job.epochs, file).map_err(|error| match &error {
        // A client knows its file by name, not by the place where the service keeps it.
        Error::Data(error) => {
            let place = file.display().to_string();
            failed("invalid_training_file", error.to_string().replace(&place, job.training_file.as_str()))
        }
        Error::DoesNotFit(message) => failed("insufficient_memory", message.clone()),
        other => failed("invalid_configuration", other.to_string()),
    })?;
    serde_json::to_value(&config).map_err(|error| failed("invalid_configuration", error.to_string()))
}

fn prepare(mut config: Config, epochs: Option<u32>, file: &Path) -> Result<Config, Error> {
    let tokenizer = Tokenizer::load(&config.data.tokenizer)?;
    let corpus = Arc::new(Corpus::open(file, &tokenizer)?);
    let (batch, seq_len) = (config.train.batch, config.train.seq_len);
    let windows = corpus.len().saturating_sub(1) / seq_len as u64;
    // Refuses what is too short for a single batch.
    Batches::new(corpus, seq_len, batch, config.train.seed, config.data.shuffle)?;
    if let Some(epochs) = epochs {
        config.train.steps = (u64::from(epochs) * windows).div_ceil(batch as u64).max(1);
    }
    let (_, blocks) = build(&mut config, &tokenizer)?;
    let plan = Plan::new(&config, &Program::new(&blocks, config.model.embedding)?)?;
    plan.refusal().map_or(Ok(config), |refusal| Err(Error::DoesNotFit(refusal)))
}
