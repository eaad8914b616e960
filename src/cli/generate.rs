//! `patrickstar generate`.

use std::process::ExitCode;

use super::args::GenerateArgs;
use super::{CliError, output};
use crate::config::Config;
use crate::data::Tokenizer;
use crate::train::Engine;
use crate::train::engine::StepReport;
use crate::train::model::build;
use crate::train::sample::{Sampling, generate};
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
    let mut config: Config = toml::from_str(&checkpoint.meta().config_toml)
        .map_err(|error| crate::Error::Failed(format!("the checkpoint's configuration is unreadable: {error}")))?;
    let tokenizer = Tokenizer::load(&config.data.tokenizer).map_err(crate::Error::from)?;
    let (model, blocks) = build(&mut config, &tokenizer)?;
    let mut engine = Engine::load(config, blocks, &checkpoint)?;
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, seed: args.seed };
    let text = generate(&mut engine, &tokenizer, &args.prompt, args.tokens, model.context, sampling)?;
    if args.json {
        output::json(&serde_json::json!({"step": checkpoint.meta().step, "text": text}))?;
    } else {
        output::line(&text)?;
    }
    Ok(ExitCode::SUCCESS)
}
