//! Gradients of a whole GPT-2 made of our operations: against candle's autograd on a plain copy, against finite
//! differences, and bit by bit against itself under other tilings.

#![expect(unsafe_code, reason = "tests bind parameters and call kernels by address")]
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

use std::collections::BTreeMap;

use candle_core::{D, Device, Tensor, Var};
use patrickstar::model::compute::Compute;
use patrickstar::model::gpt2::{self, Gpt2Config, blocks};
use patrickstar::model::param::{Param, ParamTile};
use patrickstar::model::rng;
use patrickstar::model::tape::Tape;
use patrickstar::{Block, Context, ParameterSpec, Params};
use patrickstar_actors::types::{Precision, Step};

const BATCH: usize = 3;
const TIME: usize = 13;

fn model(tied: bool, exact_gelu: bool) -> Gpt2Config {
    Gpt2Config {
        vocab: 301,
        context: 17,
        hidden: 24,
        layers: 2,
        heads: 3,
        dropout: 0.0,
        tied,
        layer_norm_eps: 1e-5,
        exact_gelu,
        initializer_range: 0.2,
        divide_above: gpt2::DIVIDE_ABOVE,
    }
}

/// Wide enough for two panels to a linear layer.
fn in_panels() -> Gpt2Config {
    Gpt2Config { hidden: 48, divide_above: 0, ..model(true, false) }
}

/// Parameters and gradients in plain vectors.
struct Memory {
    specs: Vec<ParameterSpec>,
    weights: BTreeMap<String, Vec<f32>>,
    gradients: BTreeMap<String, Vec<f32>>,
}

impl Memory {
    fn new(blocks: &[Box<dyn Block>]) -> Self {
        let mut specs: Vec<ParameterSpec> = blocks.iter().flat_map(|block| block.parameters()).collect();
        specs.dedup_by_key(|spec| spec.name.clone());
        let mut weights = BTreeMap::new();
        for spec in &specs {
            let mut values = vec![0f32; spec.shape.iter().product()];
            rng::fill(spec.init, 11, &spec.name, 0, &mut values);
            // Biases and norms of exactly 0 and 1 would hide mistakes.
            values.iter_mut().enumerate().for_each(|(i, value)| *value += 0.01 * ((i * 31 % 17) as f32 - 8.0) / 8.0);
            weights.insert(spec.name.clone(), values);
        }
        let gradients = weights.iter().map(|(name, values)| (name.clone(), vec![0.0; values.len()])).collect();
        Memory { specs, weights, gradients }
    }

    fn params(&mut self, block: &dyn Block, tile_panels: usize) -> Params {
        Params::new(block.parameters().iter().map(|spec| {
            let spec = self.specs.iter().find(|known| known.name == spec.name).unwrap();
            let columns: usize = spec.shape[1..].iter().product();
            let rows_per_tile = spec.tile_rows.map_or(spec.shape[0], |rows| rows * tile_panels).max(1);
            let (weight, gradient) =
                (self.weights[&spec.name].as_ptr(), self.gradients.get_mut(&spec.name).unwrap().as_mut_ptr());
            let tiles = (0..spec.shape[0])
                .step_by(rows_per_tile)
                .map(|row| ParamTile {
                    row_start: row,
                    rows: rows_per_tile.min(spec.shape[0] - row),
                    weight: weight.wrapping_add(row * columns).cast(),
                    gradient: gradient.wrapping_add(row * columns).cast(),
                })
                .collect();
            let param = Param::new(&spec.name, &spec.shape, Precision::Fp32, spec.tile_rows);
            // SAFETY: the vectors outlive the parameters and are not resized.
            unsafe { param.bind(tiles) };
            param
        }))
    }
}

fn data() -> (Tensor, Tensor) {
    let draw = |i: usize, salt: usize| ((i * 7919 + salt) % 301) as u32;
    let ids: Vec<u32> = (0..BATCH * TIME).map(|i| draw(i, 5)).collect();
    let targets: Vec<i64> = (0..BATCH * TIME).map(|i| if i % 6 == 5 { -100 } else { i64::from(draw(i, 77)) }).collect();
    let shape = (BATCH, TIME);
    (Tensor::from_vec(ids, shape, &Device::Cpu).unwrap(), Tensor::from_vec(targets, shape, &Device::Cpu).unwrap())
}

fn context(block: usize) -> Context {
    let counted = (0..BATCH * TIME).filter(|i| i % 6 != 5).count();
    Context { seed: 1, step: Step(1), micro: 0, block, training: true, targets: None, target_count: counted }
}

/// Loss, and gradients in `memory`, block by block with recompute as the engine does it.
fn run(blocks: &[Box<dyn Block>], memory: &mut Memory, backward: bool, tile_panels: usize) -> f64 {
    let (ids, targets) = data();
    let mut inputs = vec![ids];
    for (index, block) in blocks[..blocks.len() - 1].iter().enumerate() {
        let params = memory.params(block.as_ref(), tile_panels);
        let input = Tape::forgetting(&Compute::Cpu).constant(inputs[index].clone());
        inputs.push(block.forward(&input, &params, &context(index)).unwrap().tensor().unwrap());
    }
    let (mut upstream, mut loss) = (None, 0.0);
    for (index, block) in blocks.iter().enumerate().rev() {
        let params = memory.params(block.as_ref(), tile_panels);
        let mut ctx = context(index);
        let input = inputs[index].clone();
        let tape = if backward { Tape::recording(&Compute::Cpu) } else { Tape::forgetting(&Compute::Cpu) };
        let input = if index == 0 { tape.constant(input) } else { tape.input(input) };
        ctx.targets = (index == blocks.len() - 1).then(|| targets.clone());
        let output = block.forward(&input, &params, &ctx).unwrap();
        if index == blocks.len() - 1 {
            loss = f64::from(output.tensor().unwrap().to_scalar::<f32>().unwrap());
        }
        if !backward {
            return loss;
        }
        upstream = tape.backward(&output, upstream.take(), &input).unwrap();
    }
    loss
}

/// The same model in ordinary differentiable candle operations.
fn plain(config: &Gpt2Config, vars: &BTreeMap<String, Var>) -> candle_core::Result<Tensor> {
    let (ids, targets) = data();
    let get = |name: &str| vars[name].as_tensor().clone();
    let norm = |x: &Tensor, prefix: &str| -> candle_core::Result<Tensor> {
        let mean = x.mean_keepdim(D::Minus1)?;
        let centred = x.broadcast_sub(&mean)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = centred.broadcast_div(&(variance + config.layer_norm_eps)?.sqrt()?)?;
        normed.broadcast_mul(&get(&format!("{prefix}.weight")))?.broadcast_add(&get(&format!("{prefix}.bias")))
    };
    let linear = |x: &Tensor, prefix: &str| -> candle_core::Result<Tensor> {
        let (b, t, d) = x.dims3()?;
        let y = x.reshape((b * t, d))?.matmul(&get(&format!("{prefix}.weight")).t()?)?;
        y.broadcast_add(&get(&format!("{prefix}.bias")))?.reshape((b, t, ()))
    };
    let embedded = get("transformer.wte.weight").index_select(&ids.flatten_all()?, 0)?;
    let positions = get("transformer.wpe.weight").narrow(0, 0, TIME)?;
    let mut x = embedded.reshape((BATCH, TIME, config.hidden))?.broadcast_add(&positions)?;
    let mask: Vec<f32> = (0..TIME * TIME).map(|i| if i % TIME > i / TIME { f32::NEG_INFINITY } else { 0.0 }).collect();
    let mask = Tensor::from_vec(mask, (TIME, TIME), &Device::Cpu)?;
    for layer in 0..config.layers {
        let prefix = format!("transformer.h.{layer}");
        let head = config.hidden / config.heads;
        let qkv = linear(&norm(&x, &format!("{prefix}.ln_1"))?, &format!("{prefix}.attn.c_attn"))?;
        let part = |i: usize| -> candle_core::Result<Tensor> {
            let part = qkv.narrow(2, i * config.hidden, config.hidden)?;
            part.reshape((BATCH, TIME, config.heads, head))?.transpose(1, 2)?.contiguous()
        };
        let scores = (part(0)?.matmul(&part(1)?.t()?.contiguous()?)? * (1.0 / (head as f64).sqrt()))?;
        let probabilities = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
        let attended = probabilities.matmul(&part(2)?)?.transpose(1, 2)?.contiguous()?;
        let attended = attended.reshape((BATCH, TIME, config.hidden))?;
        x = (x + linear(&attended, &format!("{prefix}.attn.c_proj"))?)?;
        let up = linear(&norm(&x, &format!("{prefix}.ln_2"))?, &format!("{prefix}.mlp.c_fc"))?;
        let active = if config.exact_gelu { up.gelu_erf()? } else { up.gelu()? };
        x = (&x + linear(&active, &format!("{prefix}.mlp.c_proj"))?)?;
    }
    let x = norm(&x, "transformer.ln_f")?.reshape((BATCH * TIME, config.hidden))?;
    let head = get(if config.tied { "transformer.wte.weight" } else { "lm_head.weight" });
    let log_probabilities = candle_nn::ops::log_softmax(&x.matmul(&head.t()?)?, D::Minus1)?;
    let targets = targets.flatten_all()?.to_vec1::<i64>()?;
    let counted = targets.iter().filter(|&&target| target >= 0).count();
    let mut choice = vec![0f32; targets.len() * config.vocab];
    for (row, &target) in targets.iter().enumerate().filter(|(_, target)| **target >= 0) {
        choice[row * config.vocab + target as usize] = -1.0 / counted as f32;
    }
    (log_probabilities * Tensor::from_vec(choice, (targets.len(), config.vocab), &Device::Cpu)?)?.sum_all()
}

#[test]
fn gradients_equal_those_of_autograd_on_a_plain_copy() {
    for config in [model(true, false), model(false, true), in_panels()] {
        let blocks = blocks(&config);
        let mut memory = Memory::new(&blocks);
        let loss = run(&blocks, &mut memory, true, 1);
        let vars: BTreeMap<String, Var> = memory
            .specs
            .iter()
            .map(|spec| {
                let tensor =
                    Tensor::from_vec(memory.weights[&spec.name].clone(), spec.shape.clone(), &Device::Cpu).unwrap();
                (spec.name.clone(), Var::from_tensor(&tensor).unwrap())
            })
            .collect();
        let reference = plain(&config, &vars).unwrap();
        assert!((loss - f64::from(reference.to_scalar::<f32>().unwrap())).abs() < 1e-5);
        let store = reference.backward().unwrap();
        for (name, var) in &vars {
            let expected = store.get(var.as_tensor()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let ours = &memory.gradients[name];
            let norm = expected.iter().map(|x| x * x).sum::<f32>().sqrt();
            let distance = ours.iter().zip(&expected).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
            assert!(distance <= 1e-4 * norm, "{name}: {distance} of {norm}");
        }
    }
}

#[test]
fn gradients_equal_finite_differences_along_random_directions() {
    let config = model(true, false);
    let blocks = blocks(&config);
    let mut memory = Memory::new(&blocks);
    run(&blocks, &mut memory, true, 1);
    let names: Vec<String> = memory.weights.keys().cloned().collect();
    for name in names {
        let original = memory.weights[&name].clone();
        let gradient = memory.gradients[&name].clone();
        // Half along the gradient, half random: a derivative far above the noise of fp32.
        let norm = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
        let mut direction = vec![0f32; original.len()];
        rng::fill(patrickstar::Init::Normal { std: 0.5 / (original.len() as f32).sqrt() }, 3, &name, 0, &mut direction);
        direction.iter_mut().zip(&gradient).for_each(|(d, g)| *d += g / norm);
        let mut at = |scale: f32| {
            let moved = original.iter().zip(&direction).map(|(w, d)| w + scale * d).collect();
            memory.weights.insert(name.clone(), moved);
            run(&blocks, &mut memory, false, 1)
        };
        let epsilon = 4e-3;
        let numeric = (at(epsilon) - at(-epsilon)) / f64::from(2.0 * epsilon);
        at(0.0);
        let analytic: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
        assert!((numeric - analytic).abs() <= 1e-2 * analytic.abs() + 2e-4, "{name}: {numeric} and {analytic}");
    }
}

#[test]
fn tiling_a_parameter_over_chunks_changes_no_bit() {
    for config in [model(true, false), in_panels()] {
        let blocks = blocks(&config);
        let mut whole = Memory::new(&blocks);
        let mut tiled = Memory::new(&blocks);
        assert_eq!(run(&blocks, &mut whole, true, 1000).to_bits(), run(&blocks, &mut tiled, true, 1).to_bits());
        assert!(whole.gradients == tiled.gradients);
    }
}
