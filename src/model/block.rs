//! What a user writes to train a model of their own.

use candle_core::{Result, Tensor};
use patrickstar_actors::types::Step;

use super::param::Params;
use super::tape::Activation;

/// How a parameter begins; drawn from a counter-based generator, so the bits depend on seed and name alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All 0.
    Zeros,
    /// All 1.
    Ones,
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f32,
    },
    /// Uniform from `-bound` to `bound`.
    Uniform {
        /// Half width.
        bound: f32,
    },
}

/// A parameter that a block uses. Blocks that name the same parameter share it (tied weights).
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterSpec {
    /// Unique name in the model, in the Hugging Face spelling where there is one.
    pub name: String,
    /// Row-major shape of one or two dimensions; linear weights are (out, in), embeddings (vocabulary, hidden).
    pub shape: Vec<usize>,
    /// First value.
    pub init: Init,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Rows of a panel, where the operations that use it can work panel by panel: such a tensor may be tiled over
    /// several chunks at multiples of this. `None`: it must lie in one chunk.
    pub tile_rows: Option<usize>,
}

/// What a block may know about the pass it runs in.
#[derive(Clone, Debug)]
pub struct Context {
    /// Seed of the run, for dropout.
    pub seed: u64,
    /// The step that is running.
    pub step: Step,
    /// Index of the micro-batch.
    pub micro: usize,
    /// Index of the block.
    pub block: usize,
    /// Dropout is active.
    pub training: bool,
    /// What the last block compares with, in host memory; `None` asks it for its prediction (logits).
    pub targets: Option<Tensor>,
    /// Targets that count in the whole batch, all micro-batches together: the loss is a sum divided by this.
    pub target_count: usize,
}

/// A piece of the model that runs as a unit: embedding, one transformer layer, head + loss.
///
/// `forward` must be a pure function of its arguments: it is run again in the backward pass (recompute).
pub trait Block: Send {
    /// Name in traces, such as `h.3`.
    fn name(&self) -> &str;
    /// The parameters it uses, in definition order.
    fn parameters(&self) -> Vec<ParameterSpec>;
    /// Whether it only looks up rows ([`super::ops::embedding`], [`super::ops::positional_embedding`]): it then runs as well
    /// where its parameters lie in host memory.
    fn looks_up(&self) -> bool {
        false
    }
    /// Output for one micro-batch, by the operations in [`super::ops`]. The last block returns the scalar loss when
    /// `ctx.targets` is set.
    fn forward(&self, input: &Activation, params: &Params, ctx: &Context) -> Result<Activation>;
}
