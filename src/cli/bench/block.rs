//! `bench block`: one transformer layer by itself, on whichever backend the program computes.

#![expect(unsafe_code, reason = "binds parameters to memory of its own")]

use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use patrickstar_actors::types::{Precision, Step};
use serde_json::{Value, json};

use super::traffic::{Rates, Traffic};
use crate::Error;
use crate::config;
use crate::model::block::{Block, Context};
use crate::model::compute::Compute;
use crate::model::gpt2::{self, Gpt2Config};
use crate::model::param::{Param, ParamTile, Params};
use crate::model::tape::Tape;
use crate::train::device::Device;

/// What is measured.
pub struct Shape {
    pub hidden: usize,
    pub heads: usize,
    pub batch: usize,
    pub seq_len: usize,
}

/// A layer with weights and gradients of its own.
struct Layer {
    block: Box<dyn Block>,
    params: Params,
    compute: Compute,
    input: Tensor,
    upstream: Tensor,
    /// Keep the memory that `params` are bound to.
    _memory: Vec<Tensor>,
}

/// The layer alone, or with `copies` in turns with chunks that travel both ways.
pub fn run(shape: &Shape, seconds: f64, copies: bool) -> Result<Value, Error> {
    let device = Device::open(&config::Compute::default())?;
    let layer = Layer::new(shape, device.compute)?;
    layer.measure(seconds / 10.0)?;
    if copies {
        return beside_copies(&layer, &Traffic::new(device.backend)?, seconds);
    }
    let (passes, total) = layer.measure(seconds)?;
    let per_pass = total.as_secs_f64() / passes as f64;
    let (d, tokens) = (shape.hidden as f64, (shape.batch * shape.seq_len) as f64);
    let flops = 6.0 * 12.0 * d * d * tokens + 6.0 * tokens * shape.seq_len as f64 * d;
    Ok(json!({
        "hidden": shape.hidden, "heads": shape.heads, "batch": shape.batch, "seq_len": shape.seq_len,
        "passes": passes, "block_s": per_pass, "tflops": flops / per_pass / 1e12,
    }))
}

/// What copies and computing cost each other. In turns, for a card slows down as it warms up.
fn beside_copies(layer: &Layer, traffic: &Traffic, seconds: f64) -> Result<Value, Error> {
    const TURNS: usize = 3;
    let each = seconds / TURNS as f64;
    let mean = |sum: f64| sum / TURNS as f64;
    let rates = |rates: Rates| [rates.to_device, rates.to_host];
    let (mut alone_s, mut beside_s) = (0.0, 0.0);
    let (mut copies_alone, mut copies_beside) = ([0.0; 2], [0.0; 2]);
    for _ in 0..TURNS {
        let (passes, total) = layer.measure(each)?;
        alone_s += total.as_secs_f64() / passes as f64;
        let ((passes, total), beside) = traffic.beside(|| layer.measure(each))?;
        beside_s += total.as_secs_f64() / passes as f64;
        let ((), alone) = traffic.beside(|| {
            std::thread::sleep(Duration::from_secs_f64(each / 2.0));
            Ok(())
        })?;
        for (sum, rate) in copies_alone.iter_mut().zip(rates(alone)).chain(copies_beside.iter_mut().zip(rates(beside)))
        {
            *sum += rate;
        }
    }
    let gbps = |[to_device, to_host]: [f64; 2]| json!({"h2d": mean(to_device) / 1e9, "d2h": mean(to_host) / 1e9});
    Ok(json!({
        "block_alone_s": mean(alone_s), "block_beside_copies_s": mean(beside_s), "slowed_by": beside_s / alone_s - 1.0,
        "copies_alone_gbps": gbps(copies_alone), "copies_beside_gbps": gbps(copies_beside),
        "copies_of_alone": copies_beside.iter().sum::<f64>() / copies_alone.iter().sum::<f64>(),
    }))
}

impl Layer {
    fn new(shape: &Shape, compute: Compute) -> Result<Self, Error> {
        let model = Gpt2Config {
            vocab: 1,
            context: shape.seq_len,
            hidden: shape.hidden,
            layers: 1,
            heads: shape.heads,
            dropout: 0.0,
            tied: true,
            layer_norm_eps: 1e-5,
            exact_gelu: false,
            initializer_range: 0.02,
            divide_above: gpt2::DIVIDE_ABOVE,
        };
        let block = gpt2::blocks(&model).swap_remove(1);
        let (precision, dtype) = match compute {
            Compute::Cpu => (Precision::Fp32, DType::F32),
            #[cfg(feature = "cuda")]
            Compute::Cuda(_) => (Precision::Bf16, DType::BF16),
        };
        let random = |dims: &[usize], std: f32| Tensor::randn(0f32, std, dims, &compute.device())?.to_dtype(dtype);
        let (mut memory, mut params) = (Vec::new(), Vec::new());
        for spec in block.parameters() {
            let weight = random(&spec.shape, 0.02)?;
            let gradient = weight.zeros_like()?;
            let tile = ParamTile {
                row_start: 0,
                rows: spec.shape[0],
                weight: compute.address(&weight)?,
                gradient: compute.address(&gradient)?.cast_mut(),
            };
            let param = Param::new(&spec.name, &spec.shape, precision, None);
            // SAFETY: the tensors live as long as the layer, and nobody else has them.
            unsafe { param.bind(vec![tile]) };
            params.push(param);
            memory.extend([weight, gradient]);
        }
        let dims = [shape.batch, shape.seq_len, shape.hidden];
        let (input, upstream) = (random(&dims, 1.0)?, random(&dims, 1.0)?);
        Ok(Layer { block, params: Params::new(params), compute, input, upstream, _memory: memory })
    }

    /// Passes until `seconds` are over, and the time they took.
    fn measure(&self, seconds: f64) -> Result<(u64, Duration), Error> {
        /// Passes that are queued before anybody looks at the clock.
        const QUEUED: u64 = 10;
        let began = Instant::now();
        let mut passes = 0;
        while began.elapsed().as_secs_f64() < seconds {
            (0..QUEUED).try_for_each(|_| self.pass())?;
            passes += QUEUED;
            self.compute.synchronize()?;
        }
        Ok((passes, began.elapsed()))
    }

    fn pass(&self) -> Result<(), Error> {
        let context =
            Context { seed: 0, step: Step(1), micro: 0, block: 1, training: true, targets: None, target_count: 1 };
        let forward = Tape::forgetting(&self.compute).constant(self.input.clone());
        self.block.forward(&forward, &self.params, &context)?.tensor()?;
        let tape = Tape::recording(&self.compute);
        let input = tape.input(self.input.clone());
        let output = self.block.forward(&input, &self.params, &context)?;
        tape.backward(&output, Some(self.upstream.clone()), &input)?;
        Ok(())
    }
}
