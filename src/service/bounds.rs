//! Sizes that no job may ask for. They are checked before anything is laid out or planned, which takes memory and time of
//! the service itself in proportion.

use super::error::ServiceError;
use crate::config::Config;
use crate::model::gpt2::Gpt2Config;

/// Chunks that a plan may have to follow.
const MOST_CHUNKS: u128 = 1 << 20;
/// Parameters of a model.
const MOST_PARAMETERS: u128 = 1 << 42;
/// Bytes of the states of a parameter, in any precision.
const STATE_BYTES: u128 = 20;
/// Tokens of a step: their activations are counted in 64 bits.
const MOST_TOKENS: u64 = 1 << 26;
/// Of each size.
const BOUNDS: [(&str, u64); 8] = [
    ("model.hidden", 1 << 16),
    ("model.layers", 1 << 12),
    ("model.heads", 1 << 12),
    ("model.context", 1 << 20),
    ("model.vocab", 1 << 22),
    ("train.batch", 1 << 16),
    ("train.seq_len", 1 << 20),
    ("train.steps", 1 << 40),
];

/// Refuses what is beyond all reason.
pub(super) fn check(config: &Config) -> Result<(), ServiceError> {
    let (model, train) = (&config.model, &config.train);
    let sizes = [
        model.hidden as u64,
        model.layers as u64,
        model.heads as u64,
        model.context as u64,
        model.vocab.unwrap_or(0) as u64,
        train.batch as u64,
        train.seq_len as u64,
        train.steps,
    ];
    for ((key, most), size) in BOUNDS.into_iter().zip(sizes) {
        if size > most {
            return Err(invalid(key, format!("`{key}` is {size}: at most {most} is accepted")));
        }
    }
    let tokens = train.batch as u64 * train.seq_len as u64;
    if tokens > MOST_TOKENS {
        return Err(invalid("train.batch", format!("a step has {tokens} tokens: at most {MOST_TOKENS} are accepted")));
    }
    let model = Gpt2Config::from_config(config).map_err(|error| invalid("model", error.to_string()))?;
    let (hidden, layers) = (model.hidden as u128, model.layers as u128);
    let embedded = model.vocab as u128 + model.context as u128;
    let parameters = 12 * hidden * hidden * layers + 2 * embedded * hidden;
    if parameters > MOST_PARAMETERS {
        let message = format!("the model has {parameters} parameters: at most {MOST_PARAMETERS} are accepted");
        return Err(invalid("model", message));
    }
    let Some(chunk) = config.memory.chunk.bytes() else { return Ok(()) };
    let chunks = parameters * STATE_BYTES / u128::from(chunk.0.max(1));
    if chunks > MOST_CHUNKS {
        let message = format!("`memory.chunk` cuts the model into {chunks} chunks: at most {MOST_CHUNKS} are accepted");
        return Err(invalid("memory.chunk", message));
    }
    Ok(())
}

fn invalid(key: &str, message: String) -> ServiceError {
    ServiceError::invalid(&format!("patrickstar.{key}"), message)
}
