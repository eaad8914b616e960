//! A small net of your own blocks, trained with its states in chunks.
//!
//! Run: `cargo run --release --example simple_net`
#![allow(clippy::print_stdout)]
use candle_core::{Device, Result, Tensor};
use patrickstar::model::ops;
use patrickstar::{Batch, Block, Config, Context, Engine, Init, MicroBatch, ParameterSpec, Params};

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
        let bound = 1.0 / (self.inner as f32).sqrt();
        vec![ParameterSpec {
            name: format!("{}.weight", self.name),
            shape: vec![self.out, self.inner],
            init: Init::Uniform { bound },
            decay: true,
            tile_rows: None,
        }]
    }

    fn forward(&self, x: &Tensor, params: &Params, ctx: &Context) -> Result<Tensor> {
        let weight = params.get(&format!("{}.weight", self.name))?;
        match &ctx.targets {
            Some(targets) if self.last => ops::linear_cross_entropy(x, weight, targets, ctx),
            _ if self.last => ops::logits(x, weight),
            _ => ops::gelu_tanh(&ops::linear(x, weight, None)?),
        }
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let sizes = [64, 256, 256, 4];
    let blocks = (0..3).map(|i| {
        let block = Dense { name: format!("dense.{i}"), inner: sizes[i], out: sizes[i + 1], last: i == 2 };
        Box::new(block) as Box<dyn Block>
    });
    let mut config = Config::default();
    config.memory.device = "2MiB".parse()?;
    config.train.lr = 3e-3;
    let mut engine = Engine::new(config, blocks.collect())?;
    let input = Tensor::randn(0f32, 1.0, (32, 64), &Device::Cpu)?;
    let targets = input.narrow(1, 0, 4)?.argmax(1)?;
    for step in 1..=50 {
        let micro = vec![MicroBatch { input: input.clone(), targets: targets.clone() }];
        let report = engine.step(&Batch { micro, target_count: 32 })?;
        if step % 10 == 0 {
            println!("step {step}: loss {:.4}, {} chunk moves", report.loss, report.stats.stats.chunk_moves());
        }
    }
    Ok(())
}
