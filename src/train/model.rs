//! From a configuration to blocks, tokenizer and batches.

use candle_core::{Device, Tensor};

use super::engine::{Batch, MicroBatch};
use crate::config::Config;
use crate::data::{NOT_LEARNT, TokenBatch, Tokenizer};
use crate::error::Error;
use crate::model::block::Block;
use crate::model::gpt2::{self, Gpt2Config};
use crate::model::ops::IGNORE_INDEX;

/// The configured GPT-2 and its blocks. The vocabulary comes from the tokenizer where the configuration leaves it open.
pub fn build(config: &mut Config, tokenizer: &Tokenizer) -> Result<(Gpt2Config, Vec<Box<dyn Block>>), Error> {
    let needed = tokenizer.vocab_size();
    match config.model.vocab {
        None if config.model.path.is_none() && config.model.preset == "gpt2" => config.model.vocab = Some(needed),
        Some(vocab) if vocab < needed => {
            return Err(Error::Model(format!(
                "model.vocab is {vocab}, the tokenizer has {needed} tokens: set model.vocab to at least {needed}"
            )));
        }
        _ => {}
    }
    let model = Gpt2Config::from_config(config)?;
    if config.train.seq_len > model.context {
        return Err(Error::Model(format!(
            "train.seq_len is {}, the model has {} positions: lower train.seq_len or raise model.context",
            config.train.seq_len, model.context
        )));
    }
    let blocks = gpt2::blocks(&model);
    Ok((model, blocks))
}

/// Cuts a batch of tokens into micro-batches of tensors.
pub fn to_batch(tokens: &TokenBatch, micro_batches: usize) -> Result<Batch, Error> {
    let (sequences, seq_len) = (tokens.sequences / micro_batches, tokens.seq_len);
    let elements = sequences * seq_len;
    let micro = (0..micro_batches)
        .map(|index| {
            let range = index * elements..(index + 1) * elements;
            let shape = (sequences, seq_len);
            let target = |&token: &u32| if token == NOT_LEARNT { IGNORE_INDEX } else { i64::from(token) };
            let targets: Vec<i64> = tokens.target[range.clone()].iter().map(target).collect();
            Ok(MicroBatch {
                input: Tensor::from_slice(&tokens.input[range], shape, &Device::Cpu)?,
                targets: Tensor::from_slice(&targets, shape, &Device::Cpu)?,
            })
        })
        .collect::<Result<Vec<_>, Error>>()?;
    let target_count = tokens.target.iter().filter(|&&token| token != NOT_LEARNT).count();
    Ok(Batch { micro, target_count })
}
