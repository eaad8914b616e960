//! Text from a model: one token after another.

use candle_core::{Device, Tensor};

use super::engine::Engine;
use crate::data::Tokenizer;
use crate::error::Error;
use crate::model::rng;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Choose among this many of the likeliest; all when `None`.
    pub top_k: Option<usize>,
    /// Seed of the choices.
    pub seed: u64,
}

/// Continues `prompt` by `count` tokens; the model sees its last `context` tokens.
pub fn generate(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    prompt: &str,
    count: usize,
    context: usize,
    sampling: Sampling,
) -> Result<String, Error> {
    let mut tokens = tokenizer.encode(prompt)?;
    if tokens.is_empty() {
        tokens = tokenizer.encode("\n")?;
    }
    for position in 0..count {
        let window = &tokens[tokens.len().saturating_sub(context)..];
        let input = Tensor::from_slice(window, (1, window.len()), &Device::Cpu)?;
        let logits = engine.predict(&input)?;
        let last = logits.narrow(1, window.len() - 1, 1)?.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
        // Models with padded vocabularies may not name tokens that the tokenizer lacks.
        let known = &last[..last.len().min(tokenizer.vocab_size())];
        tokens.push(choose(known, sampling, position as u64));
    }
    Ok(tokenizer.decode(&tokens))
}

fn choose(logits: &[f32], sampling: Sampling, position: u64) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    if sampling.temperature <= 0.0 {
        return order.first().map_or(0, |&token| token as u32);
    }
    order.truncate(sampling.top_k.unwrap_or(logits.len()).max(1));
    let highest = f64::from(logits[order[0]]);
    let weights: Vec<f64> =
        order.iter().map(|&token| ((f64::from(logits[token]) - highest) / sampling.temperature).exp()).collect();
    let mut left = rng::uniform(sampling.seed, position) * weights.iter().sum::<f64>();
    for (&token, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left <= 0.0 {
            return token as u32;
        }
    }
    order.last().map_or(0, |&token| token as u32)
}
