//! `bench parity`: the same bits wherever a chunk lives.

use std::time::{Duration, Instant};

use patrickstar_actors::Retune;
use patrickstar_actors::health::ActorName;
use patrickstar_actors::stats::Stats;
use patrickstar_actors::types::{Bytes, Precision, Tier};
use serde_json::{Value, json};

use crate::Error;
use crate::checkpoint;
use crate::config::{Boundaries, Config, Embedding, Placement, Policy, Recompute, Schedule, Share, Size};
use crate::data::{TokenBatch, Tokenizer};
use crate::model::compute::Compute;
use crate::model::gpt2::Gpt2Config;
use crate::model::rng;
use crate::plan::{Keeping, gpt2_reserve};
use crate::train::model::{build, to_batch};
use crate::train::{Batch, Engine};

const STEPS: u64 = 6;
const CHUNK: u64 = 80 << 10;
/// Steps between which a device is squeezed.
const SQUEEZED_AFTER: u64 = 2;
const SQUEEZED_UNTIL: u64 = 4;

/// Losses of all steps and the final weights of all parameters.
#[derive(PartialEq)]
struct Outcome {
    losses: Vec<f64>,
    weights: Vec<f32>,
}

struct Variant {
    name: String,
    config: Config,
    kill: Option<ActorName>,
    resume_after: Option<u64>,
    /// A neighbour takes most of the device for two steps in the middle, and leaves.
    squeezed: bool,
}

impl Variant {
    fn new(name: String, config: Config) -> Self {
        Variant { name, config, kill: None, resume_after: None, squeezed: false }
    }
}

fn base(precision: Precision, clip_norm: f64, micro_batches: usize) -> Config {
    let mut config = Config::default();
    config.model.hidden = 48;
    config.model.layers = 4;
    config.model.heads = 3;
    config.model.context = 24;
    config.model.vocab = Some(600);
    config.model.dropout = 0.1;
    config.model.tied = true;
    config.model.precision = precision;
    config.memory.device = Bytes(1 << 30);
    config.memory.chunk = Size::Bytes(Bytes(CHUNK));
    config.train.steps = STEPS;
    config.train.batch = 4;
    config.train.micro_batches = micro_batches;
    config.train.seq_len = 24;
    config.train.lr = 3e-3;
    config.train.schedule = Schedule::Cosine;
    config.train.warmup_steps = 2;
    config.train.clip_norm = clip_norm;
    config.train.recompute = Recompute::Full;
    config.actors.optimizer.placement = Placement::Host;
    config
}

/// Chunks of the largest access, and none to spare.
const TIGHT: u64 = 15;

/// What a variant does with activations where its device holds all chunks or none to spare.
fn keeping(config: &Config, model: &Gpt2Config) -> Keeping {
    let frugal = config.train.recompute == Recompute::Selective;
    let layers = if frugal || config.train.recompute == Recompute::None { model.layers } else { 0 };
    let away = if config.train.boundaries == Boundaries::Host { model.layers - layers } else { 0 };
    Keeping { layers, frugal, away }
}

/// Device memory for `slots` chunks beside the activations.
fn device(config: &Config, slots: u64) -> Bytes {
    // A configuration without a model fails when its run starts.
    let activations =
        Gpt2Config::from_config(config).map_or(Bytes(0), |model| gpt2_reserve(config, &model, keeping(config, &model)));
    Bytes(activations.0 + slots * CHUNK)
}

fn variants(base: &Config) -> Vec<Variant> {
    let mut variants = Vec::new();
    let mut add = |name: String, change: &dyn Fn(&mut Config)| {
        let mut config = base.clone();
        change(&mut config);
        variants.push(Variant::new(name, config));
    };
    for recompute in [Recompute::Full, Recompute::Selective, Recompute::Auto, Recompute::None] {
        for slots in [TIGHT, 10_000] {
            add(format!("recompute {recompute}, {slots} chunks"), &|config| {
                config.train.recompute = recompute;
                config.memory.device = device(config, slots);
            });
        }
    }
    for slots in [TIGHT, 10_000] {
        add(format!("inputs in host memory, {slots} chunks"), &|config| {
            config.train.boundaries = Boundaries::Host;
            config.memory.device = device(config, slots);
        });
    }
    for slots in [TIGHT, 10_000] {
        add(format!("buffers kept, {slots} chunks"), &|config| {
            let buffers = Bytes(1 << 20);
            config.memory.buffers = Size::Bytes(buffers);
            config.memory.device = Bytes(device(config, slots).0 + buffers.0);
        });
    }
    for slots in [TIGHT, 17, 20, 26, 40] {
        add(format!("budget of {slots} chunks"), &|config| config.memory.device = device(config, slots));
    }
    for slots in [TIGHT, 26, 10_000] {
        add(format!("static share of {slots} chunks"), &|config| {
            // Half a chunk more on either side: the share is rounded.
            config.memory.device = Bytes(device(config, slots).0 + CHUNK);
            config.memory.share = Share::Static;
            config.memory.chunk_share = (slots as f64 + 0.5) * CHUNK as f64 / config.memory.device.0 as f64;
        });
    }
    for chunk in [64u64 << 10, 100 << 10, 128 << 10, 256 << 10] {
        add(format!("chunk {chunk}"), &|config| {
            config.memory.chunk = Size::Bytes(Bytes(chunk));
            config.memory.device = device(config, 26);
        });
    }
    for policy in [Policy::Opt, Policy::Lru, Policy::Static] {
        for prefetch in [0, 2, 16] {
            add(format!("{policy} prefetch {prefetch}"), &|config| {
                config.memory.device = device(config, TIGHT);
                config.actors.eviction.policy = policy;
                config.actors.eviction.prefetch = prefetch;
            });
        }
    }
    for placement in [Placement::Device, Placement::Host, Placement::Hybrid] {
        for slots in [TIGHT, 30, 10_000] {
            add(format!("{placement} stepping, {slots} chunks"), &|config| {
                config.memory.device = device(config, slots);
                config.actors.optimizer.placement = placement;
            });
        }
    }
    variants
}

/// Rows of the embedding looked up in host memory, wherever its states live.
fn lookups(base: &Config) -> Vec<Variant> {
    let mut variants = Vec::new();
    for placement in [Placement::Device, Placement::Host, Placement::Hybrid] {
        for slots in [TIGHT, 30, 10_000] {
            let mut config = base.clone();
            config.model.embedding = Embedding::Host;
            config.memory.device = device(&config, slots);
            config.actors.optimizer.placement = placement;
            let tied = if config.model.tied { "tied" } else { "untied" };
            let name = format!("{tied} embedding in host memory, {placement} stepping, {slots} chunks");
            variants.push(Variant::new(name, config));
        }
    }
    variants
}

/// Every actor killed once, and an interrupted run.
fn special(base: &Config) -> Vec<Variant> {
    let small = |name: String, kill, resume_after| {
        let mut config = base.clone();
        config.memory.device = device(&config, TIGHT);
        if kill == Some(ActorName::DeviceOptimizer) {
            config.actors.optimizer.placement = Placement::Device;
        }
        Variant { kill, resume_after, ..Variant::new(name, config) }
    };
    let killed = ActorName::ALL
        .into_iter()
        .filter(|&actor| actor != ActorName::Disk)
        .map(|actor| small(format!("{} killed", actor.name()), Some(actor), None));
    killed.chain([small("resumed".into(), None, Some(3))]).collect()
}

/// Budgets that change while training, where states live on the device.
fn squeezed(base: &Config) -> Vec<Variant> {
    let mut variants = Vec::new();
    for placement in [Placement::Device, Placement::Hybrid] {
        let mut config = base.clone();
        config.memory.device = device(&config, 10_000);
        config.actors.optimizer.placement = placement;
        let name = format!("{placement} stepping, squeezed");
        variants.push(Variant { squeezed: true, ..Variant::new(name, config) });
    }
    variants
}

fn data(config: &Config) -> Result<Vec<Batch>, Error> {
    let tokens = config.train.batch * config.train.seq_len;
    (0..STEPS)
        .map(|step| {
            let draw = |i: u64| ((rng::uniform(step + 1, i).powi(3) * 600.0) as u32).min(599);
            let all: Vec<u32> = (0..=tokens as u64).map(draw).collect();
            let batch = TokenBatch {
                input: all[..tokens].to_vec(),
                target: all[1..].to_vec(),
                sequences: config.train.batch,
                seq_len: config.train.seq_len,
            };
            to_batch(&batch, config.train.micro_batches)
        })
        .collect()
}

fn train(variant: &Variant) -> Result<Outcome, Error> {
    let mut config = variant.config.clone();
    let batches = data(&config)?;
    let (_, blocks) = build(&mut config, &Tokenizer::Bytes)?;
    let mut engine = Engine::new(config.clone(), blocks)?;
    let mut losses = Vec::new();
    let mut squeeze = None;
    for (index, batch) in batches.iter().enumerate() {
        match (variant.squeezed, index as u64) {
            (true, SQUEEZED_AFTER) => squeeze = Some(Squeeze::begin(&engine)?),
            (true, SQUEEZED_UNTIL) => squeeze.take().map_or(Ok(()), |squeeze: Squeeze| squeeze.end(&engine))?,
            _ => {}
        }
        if let (Some(actor), 1) = (variant.kill, index) {
            engine.runtime().plant_panic(actor);
            if actor == ActorName::Monitor {
                set_device(&engine, config.memory.device)?;
            }
        }
        losses.push(engine.step(batch)?.loss);
        if variant.resume_after == Some(index as u64 + 1) {
            engine = resumed(&engine, &config)?;
        }
    }
    engine.drain()?;
    if let Some(actor) = variant.kill {
        let restarts = wait_for_restart(&engine, actor);
        if restarts != 1 {
            return Err(Error::Failed(format!("{} was restarted {restarts} times instead of once", actor.name())));
        }
    }
    let mut weights = Vec::new();
    for name in engine.parameter_names() {
        weights.extend(engine.parameter(&name)?);
    }
    Ok(Outcome { losses, weights })
}

/// A device of which others have taken most.
struct Squeeze {
    before: Stats,
}

impl Squeeze {
    /// Leaves the job room for what an access takes and a chunk, beside what it uses for activations.
    fn begin(engine: &Engine) -> Result<Self, Error> {
        let (plan, before) = (engine.plan(), engine.runtime().stats());
        let access = plan.least_chunks().0;
        let activations = match engine.compute() {
            // The plan's estimate is far above what models of this size use.
            Compute::Cpu => engine.runtime().non_model_by_moment().into_iter().max().unwrap_or(0),
            // The pool has what the plan set aside.
            #[cfg(feature = "cuda")]
            Compute::Cuda(_) => plan.least_device().0 - access,
        };
        set_device(engine, Bytes(activations + access + plan.chunk.0))?;
        Ok(Squeeze { before })
    }

    /// Gives everything back. A squeeze that sent no chunk away has shown nothing.
    fn end(self, engine: &Engine) -> Result<(), Error> {
        let [shrunk, evicted] = engine.runtime().stats().since(&self.before).pressure[Tier::Device.index()];
        if shrunk == 0 || evicted == 0 {
            return Err(Error::Failed(format!(
                "a device of which little is left changed {shrunk} budgets and sent {evicted} chunks away"
            )));
        }
        set_device(engine, engine.config().memory.device)
    }
}

fn set_device(engine: &Engine, device: Bytes) -> Result<(), Error> {
    Ok(engine.runtime().retune(Retune { device: Some(device), ..Retune::default() })?)
}

/// Whether `done` came true in time.
fn wait_until(limit: Duration, done: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !done() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// An actor whose work nobody waits for may still be on its way back when training ends.
fn wait_for_restart(engine: &Engine, actor: ActorName) -> u64 {
    let restarts =
        || engine.runtime().actors().iter().find(|s| s.actor == actor.name()).map_or(0, |status| status.restarts);
    wait_until(Duration::from_secs(10), || restarts() > 0);
    restarts()
}

/// Planted panics are expected: only others are worth a message.
fn quiet_planted_panics() {
    let others = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let planted = panic.payload().downcast_ref::<String>().is_some_and(|text| text.starts_with("planted panic"));
        if !planted {
            others(panic);
        }
    }));
}

/// Saves, forgets, and loads into a new engine with another chunk size.
fn resumed(engine: &Engine, config: &Config) -> Result<Engine, Error> {
    let root = std::env::temp_dir().join(format!("patrickstar-parity-{}", std::process::id()));
    engine.save(&root, 1, engine.meta()?)?.finish()?;
    let mut config = config.clone();
    config.memory.chunk = Size::Bytes(Bytes(96 << 10));
    let (_, blocks) = build(&mut config, &Tokenizer::Bytes)?;
    let engine = Engine::load(config, blocks, &checkpoint::latest(&root)?.0)?;
    std::fs::remove_dir_all(&root).map_err(|error| Error::io(&root, error))?;
    Ok(engine)
}

/// Runs everything; the second value says whether all was identical.
pub fn run() -> Result<(Value, bool), Error> {
    quiet_planted_panics();
    let mut runs = 0;
    let mut worst = 0f64;
    let mut different = Vec::new();
    for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp16] {
        for (clip_norm, micro_batches) in [(1.0, 1), (0.0, 4)] {
            let base = base(precision, clip_norm, micro_batches);
            let mut untied = base.clone();
            untied.model.tied = false;
            let tied =
                [variants(&base), lookups(&base), special(&base), squeezed(&base)].into_iter().flatten().collect();
            for (config, variants) in [(base, tied), (untied.clone(), lookups(&untied))] {
                let reference = train(&Variant::new("resident".into(), config))?;
                for variant in variants {
                    let name = &variant.name;
                    let what = format!("{precision:?}, clip {clip_norm}, {micro_batches} micro-batches, {name}");
                    let started = Instant::now();
                    let outcome = train(&variant).map_err(|error| Error::Failed(format!("{what}: {error}")))?;
                    tracing::info!(seconds = started.elapsed().as_secs_f32(), "{what}");
                    runs += 1;
                    worst = worst.max(distance(&outcome, &reference));
                    if outcome != reference {
                        different.push(what);
                    }
                }
            }
        }
    }
    let identical = different.is_empty();
    Ok((json!({"runs": runs, "identical": identical, "max_abs_diff": worst, "different": different}), identical))
}

fn distance(a: &Outcome, b: &Outcome) -> f64 {
    let losses = a.losses.iter().zip(&b.losses).map(|(a, b)| (a - b).abs());
    let weights = a.weights.iter().zip(&b.weights).map(|(a, b)| f64::from((a - b).abs()));
    losses.chain(weights).fold(0.0, f64::max)
}
