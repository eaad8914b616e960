//! The library as a user of their own blocks sees it: hooks, checkpoints, and the same bits after loading.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Tensor};
use patrickstar::checkpoint;
use patrickstar::config::Size;
use patrickstar::model::{ops, rng};
use patrickstar::{Activation, Batch, Block, Config, Context, Engine, Init, MicroBatch, ParameterSpec, Params};
use patrickstar_actors::types::Precision;

struct Dense {
    name: String,
    inner: usize,
    out: usize,
    last: bool,
}

impl Block for Dense {
    fn name(&self) -> &str {
        &self.name
    }

    fn parameters(&self) -> Vec<ParameterSpec> {
        vec![ParameterSpec {
            name: format!("{}.weight", self.name),
            shape: vec![self.out, self.inner],
            init: Init::Uniform { bound: 1.0 / (self.inner as f32).sqrt() },
            decay: true,
            tile_rows: None,
        }]
    }

    fn forward(&self, x: &Activation, params: &Params, ctx: &Context) -> Result<Activation> {
        let weight = params.get(&format!("{}.weight", self.name))?;
        match &ctx.targets {
            Some(targets) if self.last => ops::linear_cross_entropy(x, weight, targets, ctx),
            _ if self.last => ops::logits(x, weight),
            _ => ops::gelu_tanh(&ops::linear(x, weight, None)?),
        }
    }
}

fn blocks(hidden: usize) -> Vec<Box<dyn Block>> {
    let sizes = [16, hidden, hidden, hidden, 4];
    (0..sizes.len() - 1)
        .map(|i| {
            let last = i + 2 == sizes.len();
            Box::new(Dense { name: format!("dense.{i}"), inner: sizes[i], out: sizes[i + 1], last }) as Box<dyn Block>
        })
        .collect()
}

/// Device memory for a few of the chunks, so that states travel.
fn config(chunk: &str) -> Config {
    let mut config = Config::default();
    config.memory.device = "640KiB".parse().unwrap();
    config.memory.chunk = Size::Bytes(chunk.parse().unwrap());
    config.train.lr = 1e-2;
    config
}

fn batch(step: u64) -> Batch {
    let values: Vec<f32> = (0..32 * 16).map(|i| rng::uniform(step, i) as f32 - 0.5).collect();
    let input = Tensor::from_vec(values, (32, 16), &Device::Cpu).unwrap();
    let targets = input.narrow(1, 0, 4).unwrap().argmax(1).unwrap();
    Batch { micro: vec![MicroBatch { input, targets }], target_count: 32 }
}

fn train(engine: &mut Engine, steps: std::ops::Range<u64>) -> Vec<u64> {
    steps.map(|step| engine.step(&batch(step)).unwrap().loss.to_bits()).collect()
}

fn weights(engine: &Engine) -> Vec<Vec<f32>> {
    engine.drain().unwrap();
    engine.parameter_names().iter().map(|name| engine.parameter(name).unwrap()).collect()
}

#[test]
fn a_loaded_engine_goes_on_with_the_same_bits_under_another_chunk_size() {
    let root = tempfile::tempdir().unwrap();
    let mut engine = Engine::new(config("64KiB"), blocks(96)).unwrap();
    train(&mut engine, 0..4);
    let saved = engine.save(root.path(), 1, engine.meta().unwrap()).unwrap().finish().unwrap();
    let losses = train(&mut engine, 4..8);

    let checkpoint = checkpoint::open(&saved).unwrap();
    let mut other = Engine::load(config("48KiB"), blocks(96), &checkpoint).unwrap();
    assert_eq!(other.current_step().0, 4);
    assert_ne!(other.plan().chunk, engine.plan().chunk, "the loaded engine must have chunks of another size");
    assert_eq!(train(&mut other, 4..8), losses);
    assert_eq!(weights(&other), weights(&engine));
    assert!(other.runtime().stats().chunk_moves() > 0, "nothing travelled: the test shows nothing");
}

#[test]
fn peaks_of_a_model_that_lives_on_the_device_are_those_of_its_plan() {
    for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp16] {
        let mut config = config("64KiB");
        config.memory.device = "4MiB".parse().unwrap();
        config.model.precision = precision;
        let mut engine = Engine::new(config, blocks(96)).unwrap();
        train(&mut engine, 0..2);
        engine.drain().unwrap();
        for tier in &engine.plan().tiers {
            assert_eq!(engine.runtime().tier_use(tier.tier).peak, tier.chunk_peak, "{precision:?} {:?}", tier.tier);
        }
    }
}

#[test]
fn numbers_of_any_type_become_activations() {
    let in_type = |dtype: DType| {
        let mut engine = Engine::new(config("64KiB"), blocks(96)).unwrap();
        let of = |step| {
            let mut batch = batch(step);
            let input = &mut batch.micro[0].input;
            // What bf16 holds, every type does.
            *input = input.to_dtype(DType::BF16).unwrap().to_dtype(dtype).unwrap();
            batch
        };
        let losses: Vec<u64> = (0..2).map(|step| engine.step(&of(step)).unwrap().loss.to_bits()).collect();
        let prediction = engine.predict(&of(2).micro[0].input).unwrap().to_vec2::<f32>().unwrap();
        (losses, engine.evaluate(&of(2)).unwrap().to_bits(), prediction)
    };
    let expected = in_type(DType::F32);
    for dtype in [DType::F64, DType::BF16] {
        assert!(in_type(dtype) == expected, "{dtype:?}");
    }
}

#[test]
fn a_checkpoint_of_another_model_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let engine = Engine::new(config("64KiB"), blocks(96)).unwrap();
    let saved = engine.save(root.path(), 1, engine.meta().unwrap()).unwrap().finish().unwrap();
    let error = Engine::load(config("64KiB"), blocks(64), &checkpoint::open(&saved).unwrap()).err().unwrap();
    assert!(error.to_string().contains("parameters"), "{error}");
}

#[test]
fn hooks_see_every_step_in_order() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let mut engine = Engine::new(config("64KiB"), blocks(96)).unwrap();
    let log = Arc::clone(&seen);
    engine.on_step(move |report| log.lock().unwrap().push((report.stats.step.0, report.loss.to_bits())));
    let losses = train(&mut engine, 0..3);
    let expected: Vec<(u64, u64)> = (1..).zip(losses).collect();
    assert_eq!(*seen.lock().unwrap(), expected);
}

/// A service builds an engine in one thread and trains in another.
#[test]
fn an_engine_may_move_to_another_thread() {
    let mut engine = Engine::new(config("64KiB"), blocks(96)).unwrap();
    let here = train(&mut Engine::new(config("64KiB"), blocks(96)).unwrap(), 0..2);
    let there = std::thread::spawn(move || train(&mut engine, 0..2)).join().unwrap();
    assert_eq!(there, here);
}
