//! `bench golden`: logits, gradients and losses of a transformers GPT-2.

use std::path::Path;

use candle_core::{Device, Tensor};
use patrickstar_actors::types::{Bytes, Kind, Precision};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::Error;
use crate::cli::args::GoldenPrecision;
use crate::config::{Config, Schedule, Size};
use crate::model::gpt2::{self, Gpt2Config};
use crate::model::hf::{Weights, is_conv1d};
use crate::plan::{Keeping, gpt2_reserve};
use crate::train::{Batch, Engine, MicroBatch};

/// Largest differences from PyTorch's fp32 results that pass.
struct Bounds {
    logits: f64,
    gradients: f64,
    losses: f64,
}

/// In fp32 orders of summation differ, nothing else. bf16 rounds every weight to eight bits, a relative error of up to
/// 2^-8 (on a GPU activations too); through three layers and the norms' divisions a few of these add up. fp16 has three bits
/// more.
fn bounds(precision: Precision) -> Bounds {
    match precision {
        Precision::Fp32 => Bounds { logits: 1e-4, gradients: 1e-3, losses: 1e-4 },
        Precision::Fp16 => Bounds { logits: 3e-3, gradients: 6e-3, losses: 3e-3 },
        Precision::Bf16 => Bounds { logits: 2e-2, gradients: 4e-2, losses: 2e-2 },
    }
}

struct Golden {
    data: Vec<u8>,
    json: Value,
}

impl Golden {
    fn open(directory: &Path) -> Result<Self, Error> {
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read(&path).map_err(|error| Error::io(&path, error))
        };
        let json = serde_json::from_slice(&read("golden.json")?)
            .map_err(|error| Error::Failed(format!("golden.json: {error}")))?;
        Ok(Golden { data: read("golden.safetensors")?, json })
    }

    fn bytes(&self, name: &str) -> Result<(Vec<usize>, &[u8]), Error> {
        let tensors = SafeTensors::deserialize(&self.data)
            .map_err(|error| Error::Failed(format!("golden.safetensors is damaged: {error}")))?;
        let view = tensors.tensor(name).map_err(|_| Error::Failed(format!("golden.safetensors has no `{name}`")))?;
        let from = view.data().as_ptr() as usize - self.data.as_ptr() as usize;
        Ok((view.shape().to_vec(), &self.data[from..from + view.data().len()]))
    }

    fn floats(&self, name: &str) -> Result<Vec<f32>, Error> {
        Ok(self.bytes(name)?.1.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// Batch `index`: inputs, and labels moved by one as causal models do inside the loss.
    fn batch(&self, index: usize) -> Result<Batch, Error> {
        let integers = |name: &str| -> Result<(Vec<usize>, Vec<i64>), Error> {
            let (shape, bytes) = self.bytes(name)?;
            let values =
                bytes.chunks_exact(8).map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]));
            Ok((shape, values.collect()))
        };
        let (shape, ids) = integers("input_ids")?;
        let (_, labels) = integers("labels")?;
        let [_, rows, columns] = shape[..] else { return Err(Error::Failed("input_ids need three dimensions".into())) };
        let range = index * rows * columns..(index + 1) * rows * columns;
        let ids: Vec<u32> = ids[range.clone()].iter().map(|&id| id as u32).collect();
        let mut targets = Vec::with_capacity(ids.len());
        for row in labels[range].chunks_exact(columns) {
            targets.extend_from_slice(&row[1..]);
            targets.push(-100);
        }
        let target_count = targets.iter().filter(|&&target| target != -100).count();
        let micro = MicroBatch {
            input: Tensor::from_vec(ids, (rows, columns), &Device::Cpu)?,
            targets: Tensor::from_vec(targets, (rows, columns), &Device::Cpu)?,
        };
        Ok(Batch { micro: vec![micro], target_count })
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        self.json[name].as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
    }
}

#[derive(Default)]
struct Differences {
    logits: f64,
    gradients: f64,
    losses: f64,
}

pub fn run(directory: &Path, precision: GoldenPrecision) -> Result<(Value, bool), Error> {
    let precision = match precision {
        GoldenPrecision::Fp32 => Precision::Fp32,
        GoldenPrecision::Bf16 => Precision::Bf16,
        GoldenPrecision::Fp16 => Precision::Fp16,
    };
    let golden = Golden::open(directory)?;
    let model = Gpt2Config::from_hf(directory)?;
    let resident = compare(directory, &golden, &model, (Bytes(1 << 30), precision))?;
    let states = states_bytes(directory, &model, precision)?;
    // A model this small has activations larger than its states: the third is for chunks.
    let activations = gpt2_reserve(&config(directory, &golden, (Bytes(0), precision)), &model, Keeping::default());
    let third = compare(directory, &golden, &model, (Bytes(states / 3 + activations.0), precision))?;
    let worst = |pick: fn(&Differences) -> f64| pick(&resident).max(pick(&third));
    let (logits, gradients, losses) = (worst(|d| d.logits), worst(|d| d.gradients), worst(|d| d.losses));
    let bounds = bounds(precision);
    let pass = logits <= bounds.logits && gradients <= bounds.gradients && losses <= bounds.losses;
    let value = json!({
        "logits_max_rel": logits, "grad_max_rel": gradients, "loss_max_abs": losses, "pass": pass,
        "chunk_budget_bytes": states / 3, "model_state_bytes": states,
    });
    Ok((value, pass))
}

fn config(directory: &Path, golden: &Golden, (device, precision): (Bytes, Precision)) -> Config {
    let optimizer = &golden.json["optimizer"];
    let mut config = Config::default();
    config.model.path = Some(directory.to_owned());
    config.model.precision = precision;
    config.memory.device = device;
    config.memory.chunk = Size::Bytes(Bytes(68 << 10));
    config.train.schedule = Schedule::Constant;
    config.train.warmup_steps = 0;
    config.train.batch = 4;
    config.train.micro_batches = 1;
    config.train.seq_len = 32;
    config.train.lr = optimizer["lr"].as_f64().unwrap_or(1e-3);
    config.train.min_lr = config.train.lr;
    config.train.beta1 = optimizer["betas"][0].as_f64().unwrap_or(0.9);
    config.train.beta2 = optimizer["betas"][1].as_f64().unwrap_or(0.95);
    config.train.eps = optimizer["eps"].as_f64().unwrap_or(1e-8);
    config.train.weight_decay = optimizer["weight_decay"].as_f64().unwrap_or(0.1);
    config.train.clip_norm = optimizer["clip_grad_norm"].as_f64().unwrap_or(1.0);
    config
}

fn engine(directory: &Path, config: Config, model: &Gpt2Config) -> Result<Engine, Error> {
    let weights = Weights::open(directory)?;
    // The reference decays every parameter, layer norms and biases too.
    let blocks = gpt2::blocks_with_decay(model);
    Engine::with_weights(config, blocks, |name, row, out| weights.read_parameter(name, row, out))
}

fn states_bytes(directory: &Path, model: &Gpt2Config, precision: Precision) -> Result<u64, Error> {
    let golden = Golden::open(directory)?;
    Ok(engine(directory, config(directory, &golden, (Bytes(1 << 30), precision)), model)?.plan().model_states.0)
}

fn compare(
    directory: &Path,
    golden: &Golden,
    model: &Gpt2Config,
    device: (Bytes, Precision),
) -> Result<Differences, Error> {
    let mut differences = Differences::default();
    // Without clipping the momentum after the first step is (1 - beta1) times the gradient.
    let mut plain = config(directory, golden, device);
    plain.train.clip_norm = 0.0;
    let share = 1.0 - plain.train.beta1;
    let mut first = engine(directory, plain, model)?;
    let batch = golden.batch(0)?;
    let logits = first.predict(&batch.micro[0].input)?.flatten_all()?.to_vec1::<f32>()?;
    let expected = golden.floats("logits")?;
    let scale = expected.iter().fold(0f64, |max, &x| max.max(f64::from(x.abs())));
    differences.logits = max_difference(&logits, &expected) / scale;
    updated(&mut first, &batch)?;
    for name in first.parameter_names() {
        let momentum = first.optimizer_state(&name, Kind::Momentum)?;
        let ours: Vec<f32> = momentum.iter().map(|&m| (f64::from(m) / share) as f32).collect();
        let theirs = orient(&name, golden.floats(&format!("grad.{name}"))?, golden.bytes(&format!("grad.{name}"))?.0);
        let norm = theirs.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let distance =
            ours.iter().zip(&theirs).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt();
        differences.gradients = differences.gradients.max(distance / norm.max(1e-12));
    }
    let mut training = engine(directory, config(directory, golden, device), model)?;
    for (step, expected) in golden.numbers("losses").iter().enumerate() {
        let loss = updated(&mut training, &golden.batch(step % 2)?)?;
        differences.losses = differences.losses.max((loss - expected).abs());
    }
    Ok(differences)
}

/// The loss of a step that updates: steps whose gradients overflow fp16 only lower the loss scale.
fn updated(engine: &mut Engine, batch: &Batch) -> Result<f64, Error> {
    loop {
        let report = engine.step(batch)?;
        if !report.stats.overflow {
            return Ok(report.loss);
        }
    }
}

fn max_difference(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    a.iter().zip(b).fold(0f64, |max, (a, b)| max.max((f64::from(*a) - f64::from(*b)).abs()))
}

/// Hugging Face's (in, out) weights as our (out, in).
fn orient(name: &str, values: Vec<f32>, shape: Vec<usize>) -> Vec<f32> {
    match shape[..] {
        [rows, columns] if is_conv1d(name) => {
            (0..rows * columns).map(|i| values[(i % rows) * columns + i / rows]).collect()
        }
        _ => values,
    }
}
