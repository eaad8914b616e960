//! Trains a GPT on a directory of text through the library.
//!
//! Run: `cargo run --release --example pretrain -- PATH`
#![allow(clippy::print_stdout)]
use std::sync::atomic::AtomicBool;

use patrickstar::Config;
use patrickstar::train::engine::StepReport;
use patrickstar::train::session::{Observer, Progress, Session, Start};

struct Print;

impl Observer for Print {
    fn step(&mut self, report: &StepReport, progress: &Progress) {
        println!("step {}: loss {:.3}, {:.0} tokens/s", report.stats.step.0, report.loss, progress.tokens_per_second);
    }

    fn message(&mut self, text: &str) {
        println!("{text}");
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = Config::default();
    config.data.path = std::env::args().nth(1).unwrap_or_else(|| ".".into()).into();
    (config.model.hidden, config.model.layers, config.model.heads, config.model.context) = (128, 4, 4, 64);
    (config.train.batch, config.train.micro_batches, config.train.seq_len, config.train.steps) = (8, 2, 64, 30);
    config.train.lr = 1e-3;
    config.train.output = "runs/pretrain".into();
    config.memory.device = "12MB".parse()?;
    let session = Session::open(config, &Start::Fresh, &mut Print)?;
    let summary = session.run(&AtomicBool::new(false), &mut Print)?;
    println!("loss {:.3} to {:.3}", summary.loss_first, summary.loss_last);
    Ok(())
}
