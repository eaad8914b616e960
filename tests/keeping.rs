//! Blocks of a user's own keep their activations once a step has shown how much that is. Alone in its program: the allocator
//! counts for all of it, so tests take turns.

#![allow(clippy::unwrap_used)] // a failed assumption should stop a test

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Result, Tensor};
use patrickstar::config::{DeviceKind, Recompute};
use patrickstar::model::ops;
use patrickstar::telemetry::alloc::CountingAllocator;
use patrickstar::{Activation, Batch, Block, Config, Context, Engine, Init, MicroBatch, ParameterSpec, Params};
use patrickstar_actors::types::Bytes;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

static TURN: Mutex<()> = Mutex::new(());

const WIDTH: usize = 64;
const ROWS: usize = 256;
const BLOCKS: usize = 8;
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

fn engine(recompute: Recompute, device: u64, passes: &Arc<AtomicUsize>) -> Engine {
    let branch = |i: usize| Branch { name: format!("branch.{i}"), last: i + 1 == BLOCKS, passes: Arc::clone(passes) };
    let blocks = (0..BLOCKS).map(|i| Box::new(branch(i)) as Box<dyn Block>).collect();
    let mut config = Config::default();
    config.compute.device = DeviceKind::Cpu;
    config.memory.device = Bytes(device);
    config.train.recompute = recompute;
    Engine::new(config, blocks).unwrap()
}

/// Micro-batches of so many rows.
fn batch(micro_batches: usize, rows: usize) -> Batch {
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
fn batches() -> [Batch; 6] {
    [(2, ROWS), (2, ROWS), (1, ROWS / 2), (3, ROWS), (2, 2 * ROWS), (2, ROWS)].map(|(count, rows)| batch(count, rows))
}

/// Of the losses and of the parameters after them.
type Bits = (Vec<u64>, Vec<Vec<u32>>);

/// Trains, and counts the forward passes of each step.
fn train(engine: &mut Engine, passes: &AtomicUsize) -> (Bits, Vec<usize>) {
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

#[test]
fn blocks_of_a_users_own_keep_what_fits_in_what_was_set_aside() {
    const MIB: u64 = 1 << 20;
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let passes = Arc::default();
    // All but the head twice.
    const AGAIN: usize = 2 * BLOCKS - 1;
    let (expected, counts) = train(&mut engine(Recompute::Full, 64 * MIB, &passes), &passes);
    assert_eq!(counts, [AGAIN; 6]);
    let mut kept_before = 0;
    for (device, least, most) in [(4 * MIB, 0, 0), (8 * MIB, 1, BLOCKS - 3), (64 * MIB, BLOCKS - 1, BLOCKS - 1)] {
        let mut auto = engine(Recompute::Auto, device, &passes);
        assert_eq!(auto.plan().kept_layers, 0, "nothing is known yet");
        let (bits, counts) = train(&mut auto, &passes);
        assert!(bits == expected, "{device} bytes: other bits");
        let kept = AGAIN - counts[1];
        assert!((least..=most).contains(&kept) && kept >= kept_before, "{device} bytes: {kept} blocks");
        kept_before = kept;
        assert_eq!(auto.plan().kept_layers as usize, kept.min(BLOCKS - 2));
        // Nothing is kept of what is larger than what was measured.
        assert_eq!(counts, [AGAIN, AGAIN - kept, AGAIN - kept, AGAIN, AGAIN, AGAIN - kept], "{device} bytes");
    }
}

#[test]
fn what_is_kept_stays_within_what_was_set_aside() {
    // The first products of a thread also allocate what it packs operands in.
    const DEVICE: u64 = 16 << 20;
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let passes = Arc::default();
    let mut auto = engine(Recompute::Auto, DEVICE, &passes);
    for _ in 0..4 {
        auto.step(&batch(2, ROWS)).unwrap();
    }
    assert!(auto.plan().kept_layers > 0);
    let peak = auto.runtime().non_model_by_moment().into_iter().max().unwrap();
    // A block keeps its product and that after the activation function at least.
    let activation = (2 * 2 * ROWS * WIDTH * 4) as u64;
    assert!(peak >= u64::from(auto.plan().kept_layers) * activation && peak <= DEVICE / 4, "{peak} bytes");
    assert!(auto.runtime().device_peak().0 <= DEVICE);
}
