//! Blocks of a user's own keep their activations once a step has shown how much that is. Alone in its program: the allocator
//! counts for all of it.

#![allow(clippy::unwrap_used)] // a failed assumption should stop a test

use candle_core::{Device, Result, Tensor};
use patrickstar::config::{DeviceKind, Recompute};
use patrickstar::model::ops;
use patrickstar::telemetry::alloc::CountingAllocator;
use patrickstar::{Activation, Batch, Block, Config, Context, Engine, Init, MicroBatch, ParameterSpec, Params};
use patrickstar_actors::types::Bytes;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const WIDTH: usize = 64;
const ROWS: usize = 256;
const BLOCKS: usize = 8;
const CLASSES: usize = 16;

/// A residual branch, or the head.
struct Branch {
    name: String,
    last: bool,
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
        let weight = params.get(&format!("{}.weight", self.name))?;
        match &ctx.targets {
            Some(targets) if self.last => ops::linear_cross_entropy(x, weight, targets, ctx),
            _ if self.last => ops::logits(x, weight),
            _ => ops::add(x, &ops::gelu_tanh(&ops::linear(x, weight, None)?)?),
        }
    }
}

fn engine(recompute: Recompute, device: u64) -> Engine {
    let branch = |i: usize| Branch { name: format!("branch.{i}"), last: i + 1 == BLOCKS };
    let blocks = (0..BLOCKS).map(|i| Box::new(branch(i)) as Box<dyn Block>).collect();
    let mut config = Config::default();
    config.compute.device = DeviceKind::Cpu;
    config.memory.device = Bytes(device);
    config.train.recompute = recompute;
    Engine::new(config, blocks).unwrap()
}

/// Losses of a few steps of two micro-batches, and the parameters after them.
fn train(engine: &mut Engine) -> (Vec<u64>, Vec<Vec<u32>>) {
    let micro = (0..2).map(|part| {
        let input: Vec<f32> = (0..ROWS * WIDTH).map(|i| ((i * 37 + part * 11) % 101) as f32 / 101.0 - 0.5).collect();
        let targets: Vec<u32> = (0..ROWS).map(|i| ((i * 7 + part) % CLASSES) as u32).collect();
        MicroBatch {
            input: Tensor::from_vec(input, (ROWS, WIDTH), &Device::Cpu).unwrap(),
            targets: Tensor::from_vec(targets, ROWS, &Device::Cpu).unwrap(),
        }
    });
    let batch = Batch { micro: micro.collect(), target_count: 2 * ROWS };
    let losses = (0..5).map(|_| engine.step(&batch).unwrap().loss.to_bits()).collect();
    engine.drain().unwrap();
    let bits = |name: &String| engine.parameter(name).unwrap().into_iter().map(f32::to_bits).collect();
    (losses, engine.parameter_names().iter().map(bits).collect())
}

#[test]
fn blocks_of_a_users_own_keep_what_fits_in_what_was_set_aside() {
    const MIB: u64 = 1 << 20;
    let mut full = engine(Recompute::Full, 64 * MIB);
    let expected = train(&mut full);
    // A block keeps its product and that after the activation function, and has an input of the same size.
    let activation = (2 * ROWS * WIDTH * 4) as u64;
    let mut kept_before = 0;
    for (device, least, most) in
        [(4 * MIB, 0, 0), (8 * MIB, 1, BLOCKS as u32 - 3), (64 * MIB, BLOCKS as u32 - 2, BLOCKS as u32 - 2)]
    {
        let mut auto = engine(Recompute::Auto, device);
        assert_eq!(auto.plan().kept_layers, 0, "nothing is known yet");
        assert!(train(&mut auto) == expected, "{device} bytes: other bits");
        let kept = auto.plan().kept_layers;
        assert!((least..=most).contains(&kept) && kept >= kept_before, "{device} bytes: {kept} layers");
        kept_before = kept;
        let peak = auto.runtime().non_model_by_moment().into_iter().max().unwrap();
        assert!(kept == 0 || peak <= device / 4, "{peak} of {device} bytes");
        assert!(peak >= u64::from(kept) * activation, "{peak} with {kept} layers");
        assert!(auto.runtime().device_peak().0 <= device);
    }
}
