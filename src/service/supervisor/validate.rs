//! Reads a job's files before the job may wait for a device, and turns passes over it into steps.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::config::Config;
use crate::data::{Batches, Corpus, DataError, Tokenizer};
use crate::error::Error;
use crate::plan::Plan;
use crate::service::settings::Settings;
use crate::service::store::{Failure, FileId, JobRow};
use crate::train::model::build;
use crate::train::program::Program;
use crate::train::validation::open_corpus;

/// The job's final configuration, or why it cannot run. Reads the whole files: not for a thread that must not block.
pub(super) fn validate(job: &JobRow, settings: &Settings) -> Result<Value, Failure> {
    let failed = |code: &str, message: String| Failure { code: code.to_owned(), message };
    let config: Config = serde_json::from_value(job.config.clone())
        .map_err(|error| failed("invalid_configuration", format!("the stored configuration: {error}")))?;
    let file = settings.file(&job.training_file);
    let validation = job.validation_file.as_ref().map(|id| settings.file(id));
    let config = prepare(config, job.epochs, &file, validation.as_deref()).map_err(|error| match &error {
        Error::Data(error) => failed(code_of(error), in_names_of_client(error, job, settings)),
        Error::DoesNotFit(message) => failed("insufficient_memory", message.clone()),
        other => failed("invalid_configuration", other.to_string()),
    })?;
    serde_json::to_value(&config).map_err(|error| failed("invalid_configuration", error.to_string()))
}

/// Which of its files is wrong.
fn code_of(error: &DataError) -> &'static str {
    match error {
        DataError::Validation(_) => "invalid_validation_file",
        _ => "invalid_training_file",
    }
}

/// A client knows its files by name, not by the places where the service keeps them.
fn in_names_of_client(error: &DataError, job: &JobRow, settings: &Settings) -> String {
    let files = [Some(&job.training_file), job.validation_file.as_ref()];
    let named = |text: String, id: &FileId| text.replace(&settings.file(id).display().to_string(), id.as_str());
    files.into_iter().flatten().fold(error.to_string(), named)
}

fn prepare(mut config: Config, epochs: Option<u32>, file: &Path, validation: Option<&Path>) -> Result<Config, Error> {
    let tokenizer = Tokenizer::load(&config.data.tokenizer)?;
    let corpus = Arc::new(Corpus::open(file, &tokenizer)?);
    let (batch, seq_len) = (config.train.batch, config.train.seq_len);
    let windows = corpus.len().saturating_sub(1) / seq_len as u64;
    // Refuses what is too short for a single batch.
    Batches::new(corpus, seq_len, batch, config.train.seed, config.data.shuffle)?;
    validation.map(|file| open_corpus(file, &tokenizer)).transpose()?;
    if let Some(epochs) = epochs {
        config.train.steps = (u64::from(epochs) * windows).div_ceil(batch as u64).max(1);
    }
    let (_, blocks) = build(&mut config, &tokenizer)?;
    let plan = Plan::new(&config, &Program::new(&blocks, config.model.embedding)?)?;
    plan.refusal().map_or(Ok(config), |refusal| Err(Error::DoesNotFit(refusal)))
}
