//! The loss on text that is not trained on.

use patrickstar_actors::types::Step;

use super::engine::Engine;
use super::model::to_batch;
use crate::config::Config;
use crate::data::{Corpus, DataError, Pass, Tokenizer};
use crate::error::Error;

/// Text that is not trained on, and when a run looks at it.
pub(super) struct Validation {
    corpus: Corpus,
    /// Steps between two looks; 0 for the last step only.
    every: u64,
    last: Step,
}

impl Validation {
    /// Opens `data.validation_path`, if there is one.
    pub fn open(config: &Config, tokenizer: &Tokenizer) -> Result<Option<Self>, Error> {
        let Some(path) = &config.data.validation_path else { return Ok(None) };
        let corpus = open_corpus(path, tokenizer)?;
        Ok(Some(Validation { corpus, every: config.train.eval_every, last: Step(config.train.steps) }))
    }

    /// Whether there is to be a validation loss after `step`. It depends on the step alone, so a run that was resumed has
    /// the same ones.
    pub fn is_due(&self, step: Step) -> bool {
        step == self.last || (self.every > 0 && step.0.is_multiple_of(self.every))
    }

    /// Mean loss over all targets, or those of the first `train.eval_batches` batches, with the weights after the last step.
    pub fn loss(&self, engine: &mut Engine) -> Result<f64, Error> {
        let train = engine.config().train.clone();
        let most = if train.eval_batches == 0 { usize::MAX } else { train.eval_batches as usize };
        let pass = Pass::new(&self.corpus, train.seq_len, train.batch, train.micro_batches).map_err(of_validation)?;
        let (mut sum, mut targets) = (0.0, 0);
        for (tokens, micro_batches) in pass.take(most) {
            let batch = to_batch(&tokens, micro_batches)?;
            if batch.target_count > 0 {
                sum += engine.evaluate(&batch)? * batch.target_count as f64;
                targets += batch.target_count;
            }
        }
        Ok(sum / targets as f64)
    }
}

/// Reads text that is not to be trained on; it must hold a token to predict.
pub fn open_corpus(path: &std::path::Path, tokenizer: &Tokenizer) -> Result<Corpus, Error> {
    let corpus = Corpus::open(path, tokenizer).map_err(of_validation)?;
    // The sizes of batches do not matter for that.
    Pass::new(&corpus, 1, 1, 1).map_err(of_validation)?;
    Ok(corpus)
}

fn of_validation(error: DataError) -> Error {
    Error::Data(DataError::Validation(Box::new(error)))
}
