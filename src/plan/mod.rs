//! What a job will need, from its configuration alone: nothing is allocated.
//!
//! The engine configures its runtime from the same plan, so a job that `plan` accepts is the job that runs.

use std::path::PathBuf;
use std::time::Duration;

use patrickstar_actors::adam::AdamConfig;
use patrickstar_actors::chunk::{Layout, LayoutError, SearchLimits, search_chunk_size};
use patrickstar_actors::runtime::RuntimeConfig;
use patrickstar_actors::schedule::Policy;
use patrickstar_actors::types::{Bytes, Kind, Tier};
use patrickstar_actors::{EvictionPolicy, Split};
use serde::Serialize;

use crate::config::{self, Boundaries, Config, Embedding, OptimizerKind, Recompute, Share, Size};
use crate::error::Error;
use crate::model::gpt2::{self, Gpt2Config};
use crate::train::device::is_cuda;
use crate::train::passes::FETCHED_AHEAD;
use crate::train::program::Program;

mod bound;
mod keeping;
mod predict;
mod split;
mod text;
mod verdict;

pub use bound::{Bound, KnownRates, Limit, Rates};
use split::{Beside, Spread};
use verdict::too_little_beside_chunks;

/// Smallest and largest chunk the search tries: below, per-move costs dominate; above, the granularity of placement is lost.
const CHUNK_SEARCH: (u64, u64) = (256 << 10, 256 << 20);

/// A forward pass of what forward and backward take, for models of the user's own.
const UNKNOWN_RECOMPUTE: f64 = 1.0 / 3.0;

/// What one tier is predicted to hold.
#[derive(Clone, Debug, Serialize)]
pub struct TierPlan {
    /// Which.
    pub tier: Tier,
    /// What the configuration gives it.
    pub capacity: Bytes,
    /// What chunks may use of it.
    pub chunk_budget: Bytes,
    /// Predicted peak of chunks.
    pub chunk_peak: Bytes,
    /// Of which, by kind.
    pub peak_by_kind: Vec<(Kind, Bytes)>,
    /// Predicted peak of non-model memory.
    pub non_model: Bytes,
}

/// The prediction for a job.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Parameters, tied ones once.
    pub parameters: u64,
    /// Weights and optimizer states.
    pub model_states: Bytes,
    /// Size of a chunk.
    pub chunk: Bytes,
    /// Chunks of all kinds.
    pub chunks: u32,
    /// Share of the chunks' space that no tensor uses.
    pub waste: f64,
    /// Chunks that the largest access leases at once.
    pub working_set_chunks: u32,
    /// By tier.
    pub tiers: Vec<TierPlan>,
    /// Bytes from host to device in a step.
    pub host_to_device: Bytes,
    /// Bytes from device to host in a step.
    pub device_to_host: Bytes,
    /// Floating-point operations of a step, recompute not counted; `None` for models of the user's own.
    pub flops: Option<f64>,
    /// Bytes the optimizer streams through host memory in a step.
    pub optimizer_bytes: Bytes,
    /// Groups that live on the device, and groups that pass through it to be stepped; the others are stepped in host memory.
    pub split: Split,
    /// Blocks between the first and the last.
    pub layers: u32,
    /// Of these the last ones whose activations are kept for the backward pass; the others are computed again.
    pub kept_layers: u32,
    /// Those that are kept compute norms and activation functions again all the same.
    pub frugal: bool,
    /// The first ones, whose inputs wait in host memory for the backward pass.
    pub away_layers: u32,
    /// Device memory that activations which are gone may keep for the next ones.
    pub buffers: Bytes,
    /// Why it does not fit, and what would make it fit.
    pub problems: Vec<String>,
    /// Chunks that looking up rows leases at once in host memory, and the first groups, to which they belong.
    #[serde(skip)]
    looked_up_chunks: u32,
    #[serde(skip)]
    looked_up_groups: u32,
    #[serde(skip)]
    layout: Layout,
    #[serde(skip)]
    spread: Spread,
    /// Operations of computing all layers again, as a part of `flops`.
    #[serde(skip)]
    recompute_share: f64,
    /// Device memory set aside for what is not chunks.
    #[serde(skip)]
    reserved: Bytes,
    /// What activations of a model of the user's own need, once a step has shown it.
    #[serde(skip)]
    measured: Bytes,
    /// Host memory for inputs of blocks, and for rows on their way.
    #[serde(skip)]
    activations_on_host: Bytes,
}

/// The GPT-2 that the configuration describes, if the program is made of its blocks and not of the user's own.
fn configured_model(config: &Config, program: &Program) -> Option<Gpt2Config> {
    let model = Gpt2Config::from_config(config).ok()?;
    let configured = Program::new(&gpt2::blocks(&model), config.model.embedding).ok()?;
    (configured.tensor_specs() == program.tensor_specs()).then_some(model)
}

/// What a step does with activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keeping {
    /// The last so many layers keep theirs for the backward pass; those of the others are computed again.
    pub layers: usize,
    /// Layers that keep theirs compute again what is cheap.
    pub frugal: bool,
    /// The inputs of the first so many layers wait in host memory.
    pub away: usize,
}

/// Device memory to set aside for what is not chunks.
fn reserve(config: &Config, non_model: Bytes) -> Bytes {
    if is_cuda(&config.compute) { Bytes(gpt2::pool_bytes(non_model.0)) } else { non_model }
}

/// Device memory to set aside for the activations of a GPT-2.
pub fn gpt2_reserve(config: &Config, model: &Gpt2Config, keeping: Keeping) -> Bytes {
    reserve(config, gpt2_activations(config, model, keeping))
}

/// Host memory for the inputs of blocks that wait there, and for the rows of a micro-batch that are looked up there.
fn activations_on_host(config: &Config, model: &Gpt2Config, keeping: Keeping) -> Bytes {
    let tokens = (config.train.batch * config.train.seq_len) as u64;
    let looked_up = match config.model.embedding {
        Embedding::Device => 0,
        Embedding::Host => tokens / config.train.micro_batches.max(1) as u64,
    };
    let each = model.hidden as u64 * activation_bytes_each(config);
    Bytes((keeping.away as u64 * tokens + looked_up) * each)
}

/// Bytes of one number of an activation.
fn activation_bytes_each(config: &Config) -> u64 {
    if is_cuda(&config.compute) && config.model.precision.is_half() { 2 } else { 4 }
}

/// Non-model memory of one step of a GPT-2, from the shapes.
fn gpt2_activations(config: &Config, model: &Gpt2Config, keeping: Keeping) -> Bytes {
    let train = &config.train;
    Bytes(gpt2::activation_bytes(
        model,
        &gpt2::StepShape {
            micro_batch: train.batch / train.micro_batches.max(1),
            micro_batches: train.micro_batches,
            seq_len: train.seq_len,
            kept_layers: keeping.layers,
            frugal: keeping.frugal,
            away_layers: keeping.away,
            fetched_ahead: FETCHED_AHEAD,
            gpu: is_cuda(&config.compute),
            element_bytes: activation_bytes_each(config) as usize,
        },
    ))
}

impl Plan {
    /// Predicts a job. Errors are only for configurations that name an impossible chunk.
    pub fn new(config: &Config, program: &Program) -> Result<Self, Error> {
        Self::with(config, program, None)
    }

    /// The plan of a job of this plan under another configuration: a job that runs keeps the activations that it keeps.
    pub fn again(&self, config: &Config, program: &Program) -> Result<Self, Error> {
        Self::with(config, program, Some(self))
    }

    fn with(config: &Config, program: &Program, running: Option<&Plan>) -> Result<Self, Error> {
        let as_before = running.map(|plan| {
            let [layers, away] = [plan.kept_layers, plan.away_layers].map(|layers| layers as usize);
            Keeping { layers, frugal: plan.frugal, away }
        });
        let measured = running.map_or(Bytes(0), |plan| plan.measured);
        // What a GPU's pool may hold is decided when a job begins.
        let set_aside = running.filter(|_| is_cuda(&config.compute)).map(Plan::for_activations);
        let specs = program.tensor_specs();
        let model = configured_model(config, program);
        // A quarter of the device for models of the user's own, or what a step has shown that they need.
        let unknown = set_aside.unwrap_or(Bytes(config.memory.device.0 / 4).max(measured));
        let non_model =
            |keeping: Keeping| model.as_ref().map_or(unknown, |model| gpt2_activations(config, model, keeping));
        let asked_for = config.memory.buffers.bytes().unwrap_or_default();
        let buffers = if is_cuda(&config.compute) { asked_for } else { Bytes(0) };
        let predicted = |keeping: Keeping| match &model {
            Some(_) => Bytes(reserve(config, non_model(keeping)).0 + buffers.0),
            None => Bytes(non_model(keeping).0 + buffers.0),
        };
        // A static share leaves activations the rest of the device, whatever they need.
        let rest = config.memory.fixed_chunks().map(|chunks| Bytes(config.memory.device.0.saturating_sub(chunks.0)));
        let reserved = |keeping: Keeping| rest.unwrap_or_else(|| predicted(keeping));
        let layers = program.uses.len().saturating_sub(2);
        let kept = match config.train.recompute {
            Recompute::None => Keeping { layers, ..Keeping::default() },
            Recompute::Selective => Keeping { layers, frugal: true, away: 0 },
            Recompute::Auto | Recompute::Full => Keeping::default(),
        };
        let most_away = layers - kept.layers;
        let least = Keeping { away: if config.train.boundaries == Boundaries::Device { 0 } else { most_away }, ..kept };
        let precision = config.model.precision;
        let device = config.memory.device;
        let chunk = match config.memory.chunk {
            Size::Bytes(bytes) => bytes,
            Size::Auto => {
                let limits = SearchLimits {
                    min: Bytes(CHUNK_SEARCH.0),
                    max: Bytes(CHUNK_SEARCH.1),
                    device_budget: Some(Bytes(device.0.saturating_sub(reserved(least).0))),
                    working_set: &program.working_sets(),
                };
                match search_chunk_size(&specs, precision, limits) {
                    // The largest matrix needs more.
                    Err(LayoutError::EmptyRange { min, .. }) => {
                        let max = Bytes(min.0 / 4 * 5);
                        search_chunk_size(&specs, precision, SearchLimits { max, ..limits })?.best
                    }
                    outcome => outcome?.best,
                }
            }
        };
        let layout = Layout::new(&specs, precision, chunk)?;
        let mut plan = Plan {
            parameters: layout.parameters(),
            model_states: layout.state_bytes(),
            chunk,
            chunks: layout.chunk_count() as u32,
            waste: 1.0 - layout.utilisation(),
            working_set_chunks: program.working_set_chunks(&layout, Tier::Device),
            looked_up_chunks: program.working_set_chunks(&layout, Tier::Host),
            looked_up_groups: program.looked_up_groups(&layout),
            tiers: Vec::new(),
            host_to_device: Bytes(0),
            device_to_host: Bytes(0),
            flops: None,
            optimizer_bytes: Bytes(0),
            split: Split { resident: 0, streamed: 0 },
            layers: 0,
            kept_layers: 0,
            away_layers: 0,
            frugal: false,
            problems: Vec::new(),
            layout,
            spread: Spread::NOTHING,
            recompute_share: UNKNOWN_RECOMPUTE,
            reserved: Bytes(0),
            buffers,
            measured,
            activations_on_host: Bytes(0),
        };
        if let Some(model) = &model {
            let (tokens, time) = ((config.train.batch * config.train.seq_len) as u64, config.train.seq_len as u64);
            let flops = gpt2::model_flops(model, tokens, time);
            plan.recompute_share = layers as f64 * gpt2::recompute_flops(model, tokens, time) / flops;
            plan.flops = Some(flops);
        }
        plan.layers = layers as u32;
        let beside = |keeping: Keeping| Beside {
            device: predicted(keeping),
            host: model.as_ref().map_or(Bytes(0), |model| activations_on_host(config, model, keeping)),
            kept_layers: keeping.layers as u32,
        };
        let keeping = as_before.unwrap_or_else(|| match config.train.boundaries {
            Boundaries::Host => Keeping { away: most_away, ..kept },
            Boundaries::Auto | Boundaries::Device if model.is_some() => plan.keeping(config, kept, &beside),
            Boundaries::Auto | Boundaries::Device => kept,
        });
        plan.frugal = keeping.frugal;
        plan.kept_layers = keeping.layers as u32;
        plan.away_layers = keeping.away as u32;
        plan.reserved = reserved(keeping);
        if let Some(rest) = rest.filter(|&rest| model.is_some() && predicted(keeping) > rest) {
            plan.problems.push(too_little_beside_chunks(config, predicted(keeping), rest));
        }
        plan.activations_on_host = beside(keeping).host;
        if config.memory.buffers == Size::Auto && is_cuda(&config.compute) {
            // As much as a step has at once, and in the worst case beside it. Chunks that travel have a better use for that; what
            // is set aside for fragments of the pool can be kept as well: memory that is kept does not fall to pieces.
            let all = Bytes(reserved(keeping).0 + non_model(keeping).0);
            if model.is_some() && rest.is_none() && plan.room(config, all).holds_all() {
                plan.buffers = non_model(keeping);
                plan.reserved = all;
            } else if model.is_some() {
                plan.buffers = Bytes(reserve(config, non_model(keeping)).0 - non_model(keeping).0);
            }
        }
        plan.place(config, program, Bytes(non_model(keeping).0 + buffers.0));
        Ok(plan)
    }

    fn place(&mut self, config: &Config, program: &Program, non_model: Bytes) {
        let (device, host) = (self.reserved, self.activations_on_host);
        self.spread = self.spread(config, Beside { device, host, kept_layers: self.kept_layers });
        self.split = self.spread.split;
        self.verify(config);
        self.predict(config, program, non_model);
    }

    /// Where tensors lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Host memory for inputs of blocks, and for rows on their way.
    pub fn activations_on_host(&self) -> Bytes {
        self.activations_on_host
    }

    /// Whether `block` keeps its activations for the backward pass.
    pub fn keeps_activations(&self, block: usize) -> bool {
        // Where all layers keep theirs the first block does too.
        let first = if self.kept_layers < self.layers { self.layers + 1 - self.kept_layers } else { 0 };
        block >= first as usize
    }

    /// Whether the input of `block` waits in host memory. That of the first block is the data, which lies there anyway.
    pub fn keeps_input_away(&self, block: usize) -> bool {
        (1..=self.away_layers as usize).contains(&block)
    }

    /// Whether the job fits.
    pub fn fits(&self) -> bool {
        self.problems.is_empty()
    }

    /// Why not, in one line.
    pub fn refusal(&self) -> Option<String> {
        (!self.fits()).then(|| format!("the job does not fit: {}", self.problems.join("; ")))
    }

    /// The runtime that this plan describes.
    pub fn runtime_config(&self, config: &Config) -> RuntimeConfig {
        let train = &config.train;
        RuntimeConfig {
            device: config.memory.device,
            non_model: self.reserved,
            host_slots: self.spread.slots.host,
            disk_slots: self.spread.slots.disk,
            disk_path: config.memory.disk_path.clone().unwrap_or_else(|| default_disk_path(config)),
            eviction: EvictionPolicy {
                policy: runtime_policy(config.actors.eviction.policy),
                prefetch: config.actors.eviction.prefetch as u32,
            },
            sides: self.sides(),
            split: (is_cuda(&config.compute) && config.actors.optimizer.placement == config::Placement::Hybrid)
                .then(|| (self.spread.room, self.costs(config, self.kept_layers))),
            adam: AdamConfig {
                beta1: train.beta1,
                beta2: train.beta2,
                eps: train.eps,
                weight_decay: train.weight_decay,
                decoupled: train.optimizer == OptimizerKind::AdamW,
            },
            clip_norm: train.clip_norm,
            mailbox: config.actors.reduction.mailbox,
            optimizer_threads: config.actors.optimizer.threads,
            fixed_share: config.memory.share == Share::Static,
            headroom: config.actors.monitor.headroom,
            monitor_interval: Duration::from_millis(config.actors.monitor.interval_ms),
        }
    }
}

fn default_disk_path(config: &Config) -> PathBuf {
    config.train.output.join(format!("chunks-{}.disk", std::process::id()))
}

/// The runtime's word for a configured policy.
pub fn runtime_policy(policy: config::Policy) -> Policy {
    match policy {
        config::Policy::Opt => Policy::Opt,
        config::Policy::Lru => Policy::Lru,
        config::Policy::Static => Policy::Static,
    }
}
