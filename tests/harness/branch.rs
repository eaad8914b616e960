//! Blocks of a user's own that count their forward passes: whether activations were kept shows in nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{Device, Result, Tensor};
use patrickstar::config::{DeviceKind, Recompute};
use patrickstar::model::ops;
use patrickstar::{Activation, Batch, Block, Config, Context, Engine, Init, MicroBatch, ParameterSpec, Params};
use patrickstar_actors::types::Bytes;

pub const WIDTH: usize = 64;
pub const ROWS: usize = 256;
pub const BLOCKS: usize = 8;
/// Forward passes of a step that keeps nothing: all blocks but the head twice.
pub const AGAIN: usize = 2 * BLOCKS - 1;
const CLASSES: usize = 16;

/// A residual branch, or the head.
struct Branch {
    name: String,
    last: bool,
    /// Forward passes of all blocks.
    passes: Arc<AtomicUsize>,
}

impl Block for Branch {
    fn name(&self) -> &str {
        &self.name
    }

    fn parameters(&self) -> Vec<ParameterSpec> {
        vec![ParameterSpec {
            name: format!("{}.weight", self.name),
            shape: vec![if self.last { CLASSES } else { WIDTH }, WIDTH],
            init: Init::Normal { std: 0.1 },
            decay: true,
            tile_rows: None,
        }]
    }

    fn forward(&self, x: &Activation, params: &Params, ctx: &Context) -> Result<Activation> {
        self.passes.fetch_add(1, Ordering::Relaxed);
        let weight = params.get(&format!("{}.weight", self.name))?;
        match &ctx.targets {
            Some(targets) if self.last => ops::linear_cross_entropy(x, weight, targets, ctx),
            _ if self.last => ops::logits(x, weight),
            _ => ops::add(x, &ops::gelu_tanh(&ops::linear(x, weight, None)?)?),
        }
    }
}

/// On `kind`, within `device` bytes.
pub fn engine(kind: DeviceKind, recompute: Recompute, device: u64, passes: &Arc<AtomicUsize>) -> Engine {
    let branch = |i: usize| Branch { name: format!("branch.{i}"), last: i + 1 == BLOCKS, passes: Arc::clone(passes) };
    let blocks = (0..BLOCKS).map(|i| Box::new(branch(i)) as Box<dyn Block>).collect();
    let mut config = Config::default();
    config.compute.device = kind;
    config.memory.device = Bytes(device);
    config.train.recompute = recompute;
    Engine::new(config, blocks).unwrap()
}

/// Micro-batches of so many rows.
pub fn batch(micro_batches: usize, rows: usize) -> Batch {
    let micro = (0..micro_batches).map(|part| {
        let input: Vec<f32> = (0..rows * WIDTH).map(|i| ((i * 37 + part * 11) % 101) as f32 / 101.0 - 0.5).collect();
        let targets: Vec<u32> = (0..rows).map(|i| ((i * 7 + part) % CLASSES) as u32).collect();
        MicroBatch {
            input: Tensor::from_vec(input, (rows, WIDTH), &Device::Cpu).unwrap(),
            targets: Tensor::from_vec(targets, rows, &Device::Cpu).unwrap(),
        }
    });
    Batch { micro: micro.collect(), target_count: micro_batches * rows }
}

/// The batches of some steps: the first is measured, one after it is larger.
pub fn batches() -> [Batch; 6] {
    [(2, ROWS), (2, ROWS), (1, ROWS / 2), (3, ROWS), (2, 2 * ROWS), (2, ROWS)].map(|(count, rows)| batch(count, rows))
}

/// Of the losses and of the parameters after them.
pub type Bits = (Vec<u64>, Vec<Vec<u32>>);

/// Trains, and counts the forward passes of each step.
pub fn train(engine: &mut Engine, passes: &AtomicUsize) -> (Bits, Vec<usize>) {
    let (mut losses, mut counts) = (Vec::new(), Vec::new());
    for batch in batches() {
        passes.store(0, Ordering::Relaxed);
        losses.push(engine.step(&batch).unwrap().loss.to_bits());
        counts.push(passes.load(Ordering::Relaxed) / batch.micro.len());
    }
    engine.drain().unwrap();
    let bits = |name: &String| engine.parameter(name).unwrap().into_iter().map(f32::to_bits).collect();
    ((losses, engine.parameter_names().iter().map(bits).collect()), counts)
}
