//! A small net of your own blocks, trained with its states in chunks.
//!
//! Run: `cargo run --release --example simple_net`
use candle_core::{Device, Result, Tensor};
use patrickstar::model::ops;
use patrickstar::{Activation, Batch, Block, Config, Context, Engine, Init, MicroBatch, ParameterSpec, Params};

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

    fn forward(&self, x: &Activation, params: &Params, ctx: &Context) -> Result<Activation> {
        let weight = params.get(&format!("{}.weight", self.name))?;
        match &ctx.targets {
            Some(targets) if self.last => ops::linear_cross_entropy(x, weight, targets, ctx),
            _ if self.last => ops::logits(x, weight),
            _ => ops::gelu_tanh(&ops::linear(x, weight, None)?),
        }
    }
}

#[allow(clippy::print_stdout)]
fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let sizes = [64, 256, 256, 256, 256, 4];
    let dense = |i| Dense { name: format!("dense.{i}"), inner: sizes[i], out: sizes[i + 1], last: i == 4 };
    let blocks = (0..5).map(|i| Box::new(dense(i)) as Box<dyn Block>);
    let mut config = Config::default();
    config.memory.device = "1MiB".parse()?; // The states need 2.4 MiB.
    config.train.lr = 1e-3;
    let mut engine = Engine::new(config, blocks.collect())?;
    for step in 1..=200 {
        let input = Tensor::randn(0f32, 1.0, (128, 64), &Device::Cpu)?;
        let targets = input.narrow(1, 0, 4)?.argmax(1)?;
        let report = engine.step(&Batch { micro: vec![MicroBatch { input, targets }], target_count: 128 })?;
        if step % 40 == 0 {
            println!("step {step}: loss {:.4}, {} chunk moves", report.loss, report.stats.stats.chunk_moves());
        }
    }
    Ok(())
}
