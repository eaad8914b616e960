//! GPT-2 (Radford et al., 2019): pre-norm transformer with learned positions, in Hugging Face names.

use std::path::Path;

use candle_core::{Result, bail};
use serde::{Deserialize, Serialize};

use super::block::{Block, Context, Init, ParameterSpec};
use super::hf;
use super::ops;
use super::param::{Param, Params};
use super::tape::Activation;
use crate::config::Config;
use crate::error::Error;

/// Sizes of a GPT-2.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gpt2Config {
    /// Tokens known.
    pub vocab: usize,
    /// Positions.
    pub context: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Dropout probability.
    pub dropout: f64,
    /// The head uses the token embedding.
    pub tied: bool,
    /// Added to the variance in layer norms.
    pub layer_norm_eps: f64,
    /// GELU by erf instead of tanh.
    pub exact_gelu: bool,
    /// Standard deviation of initial weights.
    pub initializer_range: f32,
    /// Elements of a linear layer's weight above which it is divided into panels.
    pub divide_above: usize,
}

/// Most rows of a panel of the embedding and the head, by vocabulary: small chunks for small models, products of full
/// speed for large ones. Multiples of 128, so that panels stay aligned.
fn panel_rows(rows: usize) -> usize {
    let panel = if rows < 16 << 10 { 256 } else { 8 << 10 };
    panel.min(rows)
}

/// Elements of a linear layer's weight up to which a chunk that holds it is no larger than what copies and placement like
/// best.
pub const DIVIDE_ABOVE: usize = 128 << 20;

/// Rows of a panel of a weight that is divided, 128 MiB in 16 bits by default; `None` where it lies in one chunk.
fn linear_panel_rows(out: usize, inner: usize, divide_above: usize) -> Option<usize> {
    let rows = (divide_above / 2 / inner.max(1)) / 128 * 128;
    (out * inner > divide_above).then_some(rows.max(128))
}

/// Vocabulary of the benchmark shapes: GPT-2's, padded to a multiple of 128.
pub const BENCHMARK_VOCABULARY: usize = 50_304;

/// (hidden, layers, heads, positions) of a benchmark shape, as published with PatrickStar's benchmark.
pub fn shape(name: &str) -> Option<(usize, usize, usize, usize)> {
    Some(match name {
        "tiny" => (256, 4, 8, 128),
        "1b" => (2048, 20, 16, 1024),
        "2b" => (2048, 40, 16, 1024),
        "4b" => (2304, 64, 16, 1024),
        "6b" => (3072, 53, 16, 1024),
        "8b" => (3072, 72, 16, 1024),
        "10b" => (4096, 50, 16, 1024),
        "13b" => (4096, 65, 16, 1024),
        "15b" => (4096, 78, 16, 1024),
        "18b" => (4096, 90, 16, 1024),
        "20b" => (8192, 25, 64, 1024),
        _ => return None,
    })
}

/// Forward and backward, no credit for recompute: 6 per weight and token, and causal attention.
pub fn model_flops(model: &Gpt2Config, tokens: u64, seq_len: u64) -> f64 {
    let (d, layers) = (model.hidden as f64, model.layers as f64);
    let weights = layers * 12.0 * d * d + model.vocab as f64 * d;
    6.0 * weights * tokens as f64 + 6.0 * layers * tokens as f64 * seq_len as f64 * d
}

/// Of a layer whose forward pass is done again: all but its last product, which its backward pass does not need.
pub fn recompute_flops(model: &Gpt2Config, tokens: u64, seq_len: u64) -> f64 {
    let d = model.hidden as f64;
    2.0 * tokens as f64 * (8.0 * d * d + seq_len as f64 * d)
}

/// What decides the memory of activations.
#[derive(Clone, Copy, Debug)]
pub struct StepShape {
    /// Sequences of a micro-batch.
    pub micro_batch: usize,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Layers whose activations are kept instead of computed again.
    pub kept_layers: usize,
    /// These compute again what is cheap.
    pub frugal: bool,
    /// Layers whose inputs wait in host memory.
    pub away_layers: usize,
    /// Layers ahead of the backward pass whose inputs are on their way back.
    pub fetched_ahead: usize,
    /// On a GPU.
    pub gpu: bool,
    /// Bytes of an activation.
    pub element_bytes: usize,
}

/// Widths of activations that a layer keeps for its backward: two norms, queries, keys and values, attention, the middle
/// of the residual stream, and four each before and after GELU.
const KEPT_WIDTHS: u64 = 15;
/// Of these the results of two norms and of GELU, which one pass over memory brings back.
const CHEAP_WIDTHS: u64 = 6;
/// Inputs of layers that leave or come back in the moment of the peak, which is when the backward pass begins.
const ON_THE_WAY: u64 = 1;
/// A GPU's pool gets one part in this many more than is allocated from it.
const FRAGMENTS: u64 = 10;
/// Widths that the backward of a layer needs beside: gradients before and after GELU, and of the residual stream.
const BACKWARD_WIDTHS: u64 = 10;

/// Peak of non-model memory in a step: the inputs of blocks of all micro-batches, what layers keep, and the backward of
/// one block.
pub fn activation_bytes(model: &Gpt2Config, shape: &StepShape) -> u64 {
    let tokens = shape.micro_batch * shape.seq_len;
    let activation = (tokens * model.hidden * shape.element_bytes) as u64;
    let micro_batches = shape.micro_batches as u64;
    // When the backward pass begins: the inputs of all blocks but the first, and a gradient. Of those that wait in host memory
    // a few are on their way.
    let away = (shape.away_layers as u64 * micro_batches).saturating_sub(ON_THE_WAY);
    let at_first = (model.layers as u64 + 2) * micro_batches - away;
    // When it gets to those that waited: the inputs of one layer and of the next ones, and a gradient.
    let coming = (2 + shape.away_layers.min(shape.fetched_ahead) as u64) * micro_batches;
    let boundaries = activation * at_first.max(coming);
    // One that is computed again keeps its activations until its backward is done, in one micro-batch at a time.
    let kept_widths = if shape.frugal { KEPT_WIDTHS - CHEAP_WIDTHS } else { KEPT_WIDTHS };
    let kept = (kept_widths * shape.kept_layers as u64 * micro_batches).max(KEPT_WIDTHS);
    let block = activation * BACKWARD_WIDTHS;
    let (head_tokens, extra) = if shape.gpu {
        // Partial sums and the workspace of the matrix products.
        (ops::cross_entropy::tokens_per_block(tokens, model.vocab), 64 << 20)
    } else {
        // Each head in work holds two time x time matrices; products pack their operands.
        let attention = 2 * (shape.seq_len * shape.seq_len * 4) as u64 * rayon::current_num_threads() as u64;
        (tokens.min(256), attention + (2 << 20))
    };
    let head = (head_tokens * model.vocab * 4) as u64 + activation * 4;
    extra + boundaries + activation * kept + block.max(head)
}

/// What a GPU's pool needs for so many bytes of activations: it cannot be moved together when it falls to pieces.
pub fn pool_bytes(activations: u64) -> u64 {
    activations + activations / FRAGMENTS
}

/// The activations for which a pool of so many bytes is enough.
pub fn unfragmented(pool: u64) -> u64 {
    pool - pool / (FRAGMENTS + 1)
}

impl Gpt2Config {
    /// The model that a configuration names: a Hugging Face directory, a benchmark shape, or its own sizes.
    pub fn from_config(config: &Config) -> std::result::Result<Self, Error> {
        let model = &config.model;
        if let Some(path) = &model.path {
            return Ok(Gpt2Config { divide_above: model.divide_above, ..hf::read_config(path)? });
        }
        let (hidden, layers, heads, context, vocab) = match shape(&model.preset) {
            Some((hidden, layers, heads, context)) => {
                (hidden, layers, heads, context, model.vocab.unwrap_or(BENCHMARK_VOCABULARY))
            }
            None => (model.hidden, model.layers, model.heads, model.context, model.vocab.unwrap_or(256)),
        };
        let named = shape(&model.preset).is_some();
        let result = Gpt2Config {
            vocab,
            context,
            hidden,
            layers,
            heads,
            dropout: model.dropout,
            tied: model.tied && !named,
            layer_norm_eps: 1e-5,
            exact_gelu: false,
            initializer_range: 0.02,
            divide_above: model.divide_above,
        };
        result.validate()?;
        Ok(result)
    }

    /// Reads `config.json` of a Hugging Face directory.
    pub fn from_hf(directory: &Path) -> std::result::Result<Self, Error> {
        hf::read_config(directory)
    }

    pub(super) fn validate(&self) -> std::result::Result<(), Error> {
        let sizes = [self.vocab, self.context, self.hidden, self.layers, self.heads];
        if sizes.contains(&0) {
            return Err(Error::Model(
                "a model needs a vocabulary, positions, a width, layers and heads above 0".into(),
            ));
        }
        if !self.hidden.is_multiple_of(self.heads) {
            return Err(Error::Model(format!(
                "model.hidden = {} is not a multiple of model.heads = {}: change one of them",
                self.hidden, self.heads
            )));
        }
        Ok(())
    }
}

/// The blocks of the model: embedding, layers, head.
pub fn blocks(model: &Gpt2Config) -> Vec<Box<dyn Block>> {
    let mut blocks: Vec<Box<dyn Block>> = vec![Box::new(EmbeddingBlock { model: model.clone() })];
    for layer in 0..model.layers {
        blocks.push(Box::new(LayerBlock::new(model, layer)));
    }
    blocks.push(Box::new(HeadBlock { model: model.clone() }));
    blocks
}

const TOKENS: &str = "transformer.wte.weight";
const POSITIONS: &str = "transformer.wpe.weight";

fn table(name: &str, rows: usize, columns: usize, std: f32) -> ParameterSpec {
    ParameterSpec {
        name: name.into(),
        shape: vec![rows, columns],
        init: Init::Normal { std },
        decay: true,
        tile_rows: Some(panel_rows(rows)),
    }
}

fn vector(name: String, size: usize, init: Init) -> ParameterSpec {
    ParameterSpec { name, shape: vec![size], init, decay: false, tile_rows: None }
}

fn norm(prefix: &str, width: usize) -> [ParameterSpec; 2] {
    [vector(format!("{prefix}.weight"), width, Init::Ones), vector(format!("{prefix}.bias"), width, Init::Zeros)]
}

struct EmbeddingBlock {
    model: Gpt2Config,
}

impl Block for EmbeddingBlock {
    fn name(&self) -> &str {
        "embedding"
    }

    fn parameters(&self) -> Vec<ParameterSpec> {
        let std = self.model.initializer_range;
        vec![
            table(TOKENS, self.model.vocab, self.model.hidden, std),
            table(POSITIONS, self.model.context, self.model.hidden, std),
        ]
    }

    fn looks_up(&self) -> bool {
        true
    }

    fn forward(&self, ids: &Activation, params: &Params, ctx: &Context) -> Result<Activation> {
        let x = ops::embedding(ids, params.get(TOKENS)?)?;
        let x = ops::positional_embedding(&x, params.get(POSITIONS)?)?;
        ops::dropout(&x, self.model.dropout, ctx, 0)
    }
}

struct LayerBlock {
    model: Gpt2Config,
    name: String,
    prefix: String,
    /// Of each part its weight and its bias: every pass asks for them.
    parts: [(&'static str, [String; 2]); PARTS.len()],
}

const PARTS: [&str; 6] = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"];

impl LayerBlock {
    fn new(model: &Gpt2Config, layer: usize) -> Self {
        let prefix = format!("transformer.h.{layer}");
        let parts = PARTS.map(|part| (part, ["weight", "bias"].map(|kind| format!("{prefix}.{part}.{kind}"))));
        LayerBlock { model: model.clone(), name: format!("h.{layer}"), prefix, parts }
    }

    fn linear(&self, name: &str, out: usize, inner: usize, std: f32) -> [ParameterSpec; 2] {
        let weight = ParameterSpec {
            name: format!("{}.{name}.weight", self.prefix),
            shape: vec![out, inner],
            init: Init::Normal { std },
            decay: true,
            tile_rows: linear_panel_rows(out, inner, self.model.divide_above),
        };
        [weight, vector(format!("{}.{name}.bias", self.prefix), out, Init::Zeros)]
    }

    fn weights<'a>(&self, params: &'a Params, name: &str) -> Result<(&'a Param, &'a Param)> {
        let Some((_, [weight, bias])) = self.parts.iter().find(|(part, _)| *part == name) else {
            bail!("a layer has no part `{name}`");
        };
        Ok((params.get(weight)?, params.get(bias)?))
    }

    fn apply(&self, x: &Activation, params: &Params, name: &str) -> Result<Activation> {
        let (weight, bias) = self.weights(params, name)?;
        ops::linear(x, weight, Some(bias))
    }

    /// `residual + dropout(linear(x))`.
    fn apply_to(
        &self,
        residual: &Activation,
        x: &Activation,
        params: &Params,
        name: &str,
        (ctx, op): (&Context, u32),
    ) -> Result<Activation> {
        if self.model.dropout > 0.0 && ctx.training {
            let branch = ops::dropout(&self.apply(x, params, name)?, self.model.dropout, ctx, op)?;
            return ops::add(residual, &branch);
        }
        let (weight, bias) = self.weights(params, name)?;
        ops::linear_add(x, weight, Some(bias), residual)
    }

    fn norm(&self, x: &Activation, params: &Params, name: &str) -> Result<Activation> {
        let (weight, bias) = self.weights(params, name)?;
        ops::layer_norm(x, weight, bias, self.model.layer_norm_eps)
    }
}

impl Block for LayerBlock {
    fn name(&self) -> &str {
        &self.name
    }

    fn parameters(&self) -> Vec<ParameterSpec> {
        let (d, std) = (self.model.hidden, self.model.initializer_range);
        // GPT-2 scales what is added to the residual stream by the number of additions.
        let residual = std / (2.0 * self.model.layers as f32).sqrt();
        let mut parameters = Vec::new();
        parameters.extend(norm(&format!("{}.ln_1", self.prefix), d));
        parameters.extend(self.linear("attn.c_attn", 3 * d, d, std));
        parameters.extend(self.linear("attn.c_proj", d, d, residual));
        parameters.extend(norm(&format!("{}.ln_2", self.prefix), d));
        parameters.extend(self.linear("mlp.c_fc", 4 * d, d, std));
        parameters.extend(self.linear("mlp.c_proj", d, 4 * d, residual));
        parameters
    }

    fn forward(&self, x: &Activation, params: &Params, ctx: &Context) -> Result<Activation> {
        let qkv = self.apply(&self.norm(x, params, "ln_1")?, params, "attn.c_attn")?;
        let attended = ops::causal_attention(&qkv, self.model.heads)?;
        let x = self.apply_to(x, &attended, params, "attn.c_proj", (ctx, 0))?;
        let (weight, bias) = self.weights(params, "mlp.c_fc")?;
        let form = if self.model.exact_gelu { ops::Gelu::Erf } else { ops::Gelu::Tanh };
        let active = ops::linear_gelu(&self.norm(&x, params, "ln_2")?, weight, bias, form)?;
        self.apply_to(&x, &active, params, "mlp.c_proj", (ctx, 1))
    }
}

struct HeadBlock {
    model: Gpt2Config,
}

impl HeadBlock {
    fn weight(&self) -> &'static str {
        if self.model.tied { TOKENS } else { "lm_head.weight" }
    }
}

impl Block for HeadBlock {
    fn name(&self) -> &str {
        "head"
    }

    fn parameters(&self) -> Vec<ParameterSpec> {
        let mut parameters = norm("transformer.ln_f", self.model.hidden).to_vec();
        parameters.push(table(self.weight(), self.model.vocab, self.model.hidden, self.model.initializer_range));
        parameters
    }

    fn forward(&self, x: &Activation, params: &Params, ctx: &Context) -> Result<Activation> {
        let (weight, bias) = (params.get("transformer.ln_f.weight")?, params.get("transformer.ln_f.bias")?);
        let x = ops::layer_norm(x, weight, bias, self.model.layer_norm_eps)?;
        let head = params.get(self.weight())?;
        match &ctx.targets {
            Some(targets) => ops::linear_cross_entropy(&x, head, targets, ctx),
            None => ops::logits(&x, head),
        }
    }
}

/// As [`blocks`], with weight decay on every parameter, as an optimizer without parameter groups does it.
pub fn blocks_with_decay(model: &Gpt2Config) -> Vec<Box<dyn Block>> {
    struct Decayed(Box<dyn Block>);
    impl Block for Decayed {
        fn name(&self) -> &str {
            self.0.name()
        }
        fn parameters(&self) -> Vec<ParameterSpec> {
            self.0.parameters().into_iter().map(|spec| ParameterSpec { decay: true, ..spec }).collect()
        }
        fn looks_up(&self) -> bool {
            self.0.looks_up()
        }
        fn forward(&self, input: &Activation, params: &Params, ctx: &Context) -> Result<Activation> {
            self.0.forward(input, params, ctx)
        }
    }
    blocks(model).into_iter().map(|block| Box::new(Decayed(block)) as Box<dyn Block>).collect()
}
