//! The tables of the configuration: every key with its meaning and default.

use std::path::PathBuf;

use patrickstar_actors::types::{Bytes, Precision};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::values::{
    Boundaries, DeviceKind, Embedding, OptimizerKind, Placement, Policy, Recompute, Schedule, Share, Size, bytes,
};
use crate::model::gpt2;

/// The model that is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// "gpt2" for the sizes below, or a shape: tiny, 1b, 2b, 4b, 6b, 8b, 10b, 13b, 15b, 18b, 20b.
    pub preset: String,
    /// Directory in Hugging Face layout to start from; replaces the preset and the sizes.
    pub path: Option<PathBuf>,
    /// Width of the residual stream; used by the gpt2 preset.
    pub hidden: usize,
    /// Transformer layers; used by the gpt2 preset.
    pub layers: usize,
    /// Attention heads; must divide `hidden`.
    pub heads: usize,
    /// Longest sequence the positions cover.
    pub context: usize,
    /// Rows of the embedding; the size of the tokenizer if absent.
    pub vocab: Option<usize>,
    /// Probability of dropping an activation, from 0 to below 1.
    pub dropout: f64,
    /// Whether the output head shares the weights of the embedding.
    pub tied: bool,
    /// How parameters are stored: "fp32", "bf16" or "fp16" (with a scaled loss); all step an exact fp32 weight.
    #[schemars(with = "String", extend("enum" = ["fp32", "bf16", "fp16"]))]
    pub precision: Precision,
    /// Where rows of the embedding are looked up: "device", to which all of it comes, or "host", from where the rows in use come.
    pub embedding: Embedding,
    /// Elements of a linear layer's weight above which it is divided into panels of rows that may lie in several chunks.
    pub divide_above: usize,
}

impl Default for Model {
    fn default() -> Self {
        Model {
            preset: "gpt2".into(),
            path: None,
            hidden: 768,
            layers: 12,
            heads: 12,
            context: 1024,
            vocab: None,
            dropout: 0.0,
            tied: true,
            precision: Precision::Fp32,
            embedding: Embedding::Device,
            divide_above: gpt2::DIVIDE_ABOVE,
        }
    }
}

/// Where the model computes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Compute {
    /// "cpu", "cuda", or "auto": the GPU in a program built for one, else the host.
    pub device: DeviceKind,
    /// Number of the GPU, as the driver counts.
    pub ordinal: usize,
}

/// What each tier may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Memory {
    /// Budget of the device, everything included: a number of bytes or such as "24GB".
    #[serde(deserialize_with = "bytes")]
    #[schemars(extend("type" = ["string", "integer"]), with = "serde_json::Value")]
    pub device: Bytes,
    /// What chunks may use of it: "dynamic", what activations and neighbours leave, or "static", a fixed part.
    pub share: Share,
    /// The part of `device` that is for chunks alone with a static share, above 0 and below 1; the rest is for activations.
    pub chunk_share: f64,
    /// Budget of host memory, or "auto" for what the machine and its cgroup leave.
    #[schemars(extend("type" = ["string", "integer"]), with = "serde_json::Value")]
    pub host: Size,
    /// Budget of the disk tier; 0 leaves it out.
    #[serde(deserialize_with = "bytes")]
    #[schemars(extend("type" = ["string", "integer"]), with = "serde_json::Value")]
    pub disk: Bytes,
    /// Directory of the disk tier; the run directory if absent.
    pub disk_path: Option<PathBuf>,
    /// Bytes of a chunk, a multiple of 4096, or "auto" for the one that wastes least.
    #[schemars(extend("type" = ["string", "integer"]), with = "serde_json::Value")]
    pub chunk: Size,
    /// Bytes of device memory that activations which are gone may keep for the next ones of their size, which saves host work on a GPU. 0 gives all of it back to the driver's pool; "auto" keeps what a step needs where the whole model lives on the device with room to spare, and elsewhere a tenth of that.
    #[schemars(extend("type" = ["string", "integer"]), with = "serde_json::Value")]
    pub buffers: Size,
}

impl Memory {
    /// What chunks have of the device, whoever else could use it; `None` with a dynamic share.
    pub(crate) fn fixed_chunks(&self) -> Option<Bytes> {
        match self.share {
            Share::Dynamic => None,
            Share::Static => Some(Bytes((self.device.0 as f64 * self.chunk_share) as u64)),
        }
    }
}

impl Default for Memory {
    fn default() -> Self {
        Memory {
            device: Bytes(8_000_000_000),
            share: Share::Dynamic,
            chunk_share: 0.5,
            host: Size::Auto,
            disk: Bytes(0),
            disk_path: None,
            chunk: Size::Auto,
            buffers: Size::Auto,
        }
    }
}

/// The training loop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Train {
    /// Steps to train in all.
    pub steps: u64,
    /// Sequences a step, over all micro-batches.
    pub batch: usize,
    /// Parts the batch is computed in; must divide `batch`.
    pub micro_batches: usize,
    /// Tokens a sequence; at most `model.context`.
    pub seq_len: usize,
    /// What the backward pass computes again: "full" all but the inputs of blocks, "selective" norms and activation functions, "none" nothing, "auto" as little as there is memory for; on a GPU chunks make room where a step is predicted to be shorter for it. Blocks of your own are measured in the first step, and keep what fits in what is set aside for activations, a quarter of the device or the rest beside a static share.
    pub recompute: Recompute,
    /// Where the inputs of blocks wait for the backward pass: "device", "host", or "auto" for host memory where the device has no room.
    pub boundaries: Boundaries,
    /// Highest learning rate.
    pub lr: f64,
    /// Learning rate at the last step.
    pub min_lr: f64,
    /// How the learning rate changes after the warm-up: "cosine", "linear" or "constant".
    pub schedule: Schedule,
    /// Steps in which the learning rate rises from 0 to `lr`.
    pub warmup_steps: u64,
    /// Update rule: "adamw" (decoupled weight decay) or "adam".
    pub optimizer: OptimizerKind,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Global gradient norm above which gradients are scaled down; 0 turns it off.
    pub clip_norm: f64,
    /// Seed of initial weights, dropout and shuffling.
    pub seed: u64,
    /// Steps between two progress lines.
    pub log_every: u64,
    /// Steps between two looks at the loss on `data.validation_path`, which is also looked at after the last step; 0 looks only then.
    pub eval_every: u64,
    /// Batches of `batch` sequences of `data.validation_path` that a look takes, always the first ones; 0 takes all.
    pub eval_batches: u64,
    /// Run directory: checkpoints, events and reports.
    pub output: PathBuf,
    /// Tokens to generate at the end of the run; 0 turns it off.
    pub sample_tokens: usize,
    /// Text that the sample continues.
    pub sample_prompt: String,
}

impl Default for Train {
    fn default() -> Self {
        Train {
            steps: 1000,
            batch: 8,
            micro_batches: 1,
            seq_len: 1024,
            recompute: Recompute::Auto,
            boundaries: Boundaries::Auto,
            lr: 3e-4,
            min_lr: 0.0,
            schedule: Schedule::Cosine,
            warmup_steps: 0,
            optimizer: OptimizerKind::AdamW,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
            seed: 0,
            log_every: 10,
            eval_every: 100,
            eval_batches: 0,
            output: "runs/default".into(),
            sample_tokens: 0,
            sample_prompt: "The ".into(),
        }
    }
}

/// Where the text comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// File or directory of text.
    pub path: PathBuf,
    /// File or directory of text that is not trained on, for a validation loss every `train.eval_every` steps; left out, there is none.
    pub validation_path: Option<PathBuf>,
    /// "bytes", or the path of a tokenizer.json.
    pub tokenizer: String,
    /// Whether sequences are drawn in a seeded random order.
    pub shuffle: bool,
}

impl Default for Data {
    fn default() -> Self {
        Data { path: ".".into(), validation_path: None, tokenizer: "bytes".into(), shuffle: true }
    }
}

/// When states are saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// Steps between two checkpoints; 0 saves only at the end.
    pub every: u64,
    /// Newest checkpoints that are kept.
    pub keep: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every: 0, keep: 2 }
    }
}

/// What a run records about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Telemetry {
    /// Whether to write TensorBoard events to the run directory.
    pub tensorboard: bool,
    /// Last steps whose timeline is recorded; 0 turns it off.
    pub trace_steps: u64,
    /// Whether to write a report page at the end.
    pub report: bool,
    /// Address at which a command-line run serves Prometheus metrics, such as "127.0.0.1:9464"; empty turns it off.
    pub metrics_listen: String,
    /// Operations a second that the device can do at best in `model.precision`, such as 989.5e12, for the share of it that a training uses; 0 takes the data sheet of the GPU, if it is known.
    pub device_peak_flops: f64,
}

impl Default for Telemetry {
    fn default() -> Self {
        Telemetry {
            tensorboard: true,
            trace_steps: 0,
            report: true,
            metrics_listen: String::new(),
            device_peak_flops: 0.0,
        }
    }
}

/// What leaves a full tier, and what is fetched ahead.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Eviction {
    /// "opt" (farthest next use), "lru" or "static".
    pub policy: Policy,
    /// Moments fetched ahead; 0 turns it off.
    pub prefetch: usize,
}

impl Default for Eviction {
    fn default() -> Self {
        Eviction { policy: Policy::Opt, prefetch: 16 }
    }
}

/// Where and how chunks are stepped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Optimizer {
    /// Where chunks are stepped: "device", "host" or "hybrid".
    pub placement: Placement,
    /// Host threads; 0 uses all cores.
    pub threads: usize,
}

impl Default for Optimizer {
    fn default() -> Self {
        Optimizer { placement: Placement::Hybrid, threads: 0 }
    }
}

/// The watcher of memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Monitor {
    /// Milliseconds between two samples.
    pub interval_ms: u64,
    /// Fraction of a budget kept free, from 0 to below 1.
    pub headroom: f64,
}

impl Default for Monitor {
    fn default() -> Self {
        Monitor { interval_ms: 100, headroom: 0.02 }
    }
}

/// The reduction of gradients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Reduction {
    /// Gradient chunks that may wait in the mailbox.
    pub mailbox: usize,
}

impl Default for Reduction {
    fn default() -> Self {
        Reduction { mailbox: 256 }
    }
}

/// The independent parts of the runtime.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Actors {
    /// What leaves a full tier, and what is fetched ahead.
    pub eviction: Eviction,
    /// Where and how chunks are stepped.
    pub optimizer: Optimizer,
    /// The watcher of memory.
    pub monitor: Monitor,
    /// The reduction of gradients.
    pub reduction: Reduction,
}

/// The service itself; jobs cannot set these.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Service {
    /// Least severe messages that the service and its workers log, or a filter; empty for what the command line says.
    pub log_level: String,
    /// Requests a second of one token, or of one address where there are no tokens; a second's worth may come at once. 0 is no limit.
    pub requests_per_second: u32,
}

impl Default for Service {
    fn default() -> Self {
        Service { log_level: String::new(), requests_per_second: 2000 }
    }
}
