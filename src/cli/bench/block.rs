//! `bench block`: one transformer layer by itself, on whichever backend the program computes.

#![expect(unsafe_code, reason = "binds parameters to memory of its own")]

use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use patrickstar_actors::types::{Precision, Step};
use serde_json::{Value, json};

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

pub fn run(shape: &Shape, seconds: f64) -> Result<Value, Error> {
    let layer = Layer::new(shape)?;
    layer.measure(seconds / 10.0)?;
    let (passes, total) = layer.measure(seconds)?;
    let per_pass = total.as_secs_f64() / passes as f64;
    let (d, tokens) = (shape.hidden as f64, (shape.batch * shape.seq_len) as f64);
    let flops = 6.0 * 12.0 * d * d * tokens + 6.0 * tokens * shape.seq_len as f64 * d;
    Ok(json!({
        "hidden": shape.hidden, "heads": shape.heads, "batch": shape.batch, "seq_len": shape.seq_len,
        "passes": passes, "block_s": per_pass, "tflops": flops / per_pass / 1e12,
    }))
}

impl Layer {
    fn new(shape: &Shape) -> Result<Self, Error> {
        let compute = Device::open(&config::Compute::default())?.compute;
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
