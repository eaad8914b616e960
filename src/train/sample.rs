//! Text from a model: one token after another.

use candle_core::{Device, Tensor};

use super::engine::Engine;
use super::model::build;
use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::data::Tokenizer;
use crate::error::Error;
use crate::model::rng;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Choose among this many of the likeliest; all when `None`.
    pub top_k: Option<usize>,
    /// Choose among the likeliest that have this probability together; 1 is all.
    pub top_p: f64,
    /// Seed of the choices.
    pub seed: u64,
    /// Texts of one seed differ by this.
    pub stream: u32,
}

/// A trained model with its tokenizer.
pub struct Sampler {
    engine: Engine,
    tokenizer: Tokenizer,
    context: usize,
}

impl Sampler {
    /// Loads a checkpoint; `change` may say where and with how much memory it is computed.
    pub fn load(checkpoint: &Checkpoint, change: impl FnOnce(&mut Config)) -> Result<Self, Error> {
        let mut config: Config = toml::from_str(&checkpoint.meta().config_toml)
            .map_err(|error| Error::Failed(format!("the checkpoint's configuration is unreadable: {error}")))?;
        change(&mut config);
        let tokenizer = Tokenizer::load(&config.data.tokenizer)?;
        let (model, blocks) = build(&mut config, &tokenizer)?;
        let engine = Engine::load(config, blocks, checkpoint)?;
        Ok(Sampler { engine, tokenizer, context: model.context })
    }

    /// Begins to continue `prompt`.
    pub fn begin(&mut self, prompt: &str, sampling: Sampling) -> Result<Generator<'_>, Error> {
        Generator::new(&mut self.engine, &self.tokenizer, self.context, prompt, sampling)
    }
}

/// A text that grows; the model sees its last `context` tokens.
pub struct Generator<'a> {
    engine: &'a mut Engine,
    tokenizer: &'a Tokenizer,
    context: usize,
    sampling: Sampling,
    tokens: Vec<u32>,
    prompt: usize,
}

impl<'a> Generator<'a> {
    fn new(
        engine: &'a mut Engine,
        tokenizer: &'a Tokenizer,
        context: usize,
        prompt: &str,
        sampling: Sampling,
    ) -> Result<Self, Error> {
        let mut tokens = tokenizer.encode(prompt)?;
        if tokens.is_empty() {
            tokens = tokenizer.encode("\n")?;
        }
        let prompt = tokens.len();
        Ok(Generator { engine, tokenizer, context, sampling, tokens, prompt })
    }

    /// Adds a token.
    pub fn step(&mut self) -> Result<(), Error> {
        let window = &self.tokens[self.tokens.len().saturating_sub(self.context)..];
        let input = Tensor::from_slice(window, (1, window.len()), &Device::Cpu)?;
        let logits = self.engine.predict(&input)?;
        let last = logits.narrow(1, window.len() - 1, 1)?.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
        // Models with padded vocabularies may not name tokens that the tokenizer lacks.
        let known = &last[..last.len().min(self.tokenizer.vocab_size())];
        let token = choose(known, self.sampling, self.added() as u64);
        self.tokens.push(token);
        Ok(())
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt
    }

    /// Tokens that were added.
    pub fn added(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    /// The text that was added; an incomplete character at its end is a replacement character.
    pub fn text(&self) -> String {
        self.tokenizer.decode(&self.tokens[self.prompt..])
    }
}

/// Continues `prompt` by `count` tokens, and returns both.
pub fn generate(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    prompt: &str,
    count: usize,
    context: usize,
    sampling: Sampling,
) -> Result<String, Error> {
    Generator::new(engine, tokenizer, context, prompt, sampling)?.run(count)
}

impl Generator<'_> {
    /// Adds `count` tokens, and returns the prompt with them.
    pub fn run(mut self, count: usize) -> Result<String, Error> {
        for _ in 0..count {
            self.step()?;
        }
        Ok(self.tokenizer.decode(&self.tokens))
    }
}

fn choose(logits: &[f32], sampling: Sampling, position: u64) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    if sampling.temperature <= 0.0 {
        return order.first().map_or(0, |&token| token as u32);
    }
    order.truncate(sampling.top_k.unwrap_or(logits.len()).max(1));
    let highest = f64::from(logits[order[0]]);
    let weight = |token: usize| ((f64::from(logits[token]) - highest) / sampling.temperature).exp();
    let mut weights: Vec<f64> = order.iter().map(|&token| weight(token)).collect();
    keep_nucleus(&mut weights, sampling.top_p);
    let index = u64::from(sampling.stream) << 32 | position;
    let mut left = rng::uniform(sampling.seed, index) * weights.iter().sum::<f64>();
    for (&token, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left <= 0.0 {
            return token as u32;
        }
    }
    order[weights.len() - 1] as u32
}

/// Keeps the fewest of the falling `weights` that hold the share `top_p` of their sum, at least one.
fn keep_nucleus(weights: &mut Vec<f64>, top_p: f64) {
    if top_p >= 1.0 {
        return;
    }
    let wanted = top_p * weights.iter().sum::<f64>();
    let mut held = 0.0;
    let before = weights.iter().take_while(|&&weight| {
        held += weight;
        held < wanted
    });
    let kept = before.count() + 1;
    weights.truncate(kept);
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Sampling = Sampling { temperature: 1.0, top_k: None, top_p: 1.0, seed: 3, stream: 0 };

    fn drawn(sampling: Sampling) -> Vec<u32> {
        let logits = [0.0, 2.0, 1.0, -1.0];
        (0..2000).map(|position| choose(&logits, sampling, position)).collect()
    }

    fn share(tokens: &[u32], token: u32) -> f64 {
        tokens.iter().filter(|&&drawn| drawn == token).count() as f64 / tokens.len() as f64
    }

    #[test]
    fn tokens_come_as_often_as_they_should() {
        let tokens = drawn(PLAIN);
        let sum: f64 = [0.0f64, 2.0, 1.0, -1.0].iter().map(|logit| logit.exp()).sum();
        for (token, logit) in [0.0f64, 2.0, 1.0, -1.0].iter().enumerate() {
            let (found, expected) = (share(&tokens, token as u32), logit.exp() / sum);
            assert!((found - expected).abs() < 0.04, "{token}: {found} instead of {expected}");
        }
        assert_eq!(drawn(PLAIN), tokens);
        assert_ne!(drawn(Sampling { seed: 4, ..PLAIN }), tokens);
        assert_ne!(drawn(Sampling { stream: 1, ..PLAIN }), tokens);
    }

    #[test]
    fn only_the_likeliest_are_drawn_where_that_is_wished() {
        let only = |sampling: Sampling, wanted: &[u32]| {
            let tokens = drawn(sampling);
            assert!(tokens.iter().all(|token| wanted.contains(token)), "{sampling:?}");
            assert!(wanted.iter().all(|&token| share(&tokens, token) > 0.0), "{sampling:?}");
        };
        only(Sampling { temperature: 0.0, ..PLAIN }, &[1]);
        only(Sampling { top_p: 0.0, ..PLAIN }, &[1]);
        // The likeliest has 0.64, with the next 0.88.
        only(Sampling { top_p: 0.6, ..PLAIN }, &[1]);
        only(Sampling { top_p: 0.7, ..PLAIN }, &[1, 2]);
        only(Sampling { top_p: 0.9, ..PLAIN }, &[1, 2, 0]);
        only(Sampling { top_k: Some(2), ..PLAIN }, &[1, 2]);
    }
}
