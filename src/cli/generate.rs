//! `patrickstar generate`.

use std::process::ExitCode;

use super::args::GenerateArgs;
use super::{CliError, output};
use crate::train::engine::StepReport;
use crate::train::sample::{Sampler, Sampling};
use crate::train::session::{Observer, Progress, open_or_latest};

struct Notes;

impl Observer for Notes {
    fn step(&mut self, _: &StepReport, _: &Progress) {}
    fn message(&mut self, text: &str) {
        output::note(text);
    }
}

pub fn run(args: GenerateArgs) -> Result<ExitCode, CliError> {
    let checkpoint = open_or_latest(&args.checkpoint, &mut Notes)?;
    let mut sampler = Sampler::load(&checkpoint, |_| {})?;
    let sampling =
        Sampling { temperature: args.temperature, top_k: args.top_k, top_p: 1.0, seed: args.seed, stream: 0 };
    let text = sampler.begin(&args.prompt, sampling)?.run(args.tokens)?;
    if args.json {
        output::json(&serde_json::json!({"step": checkpoint.meta().step, "text": text}))?;
    } else {
        output::line(&text)?;
    }
    Ok(ExitCode::SUCCESS)
}
