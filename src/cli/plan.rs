//! `patrickstar plan`.

use std::process::ExitCode;

use super::args::PlanArgs;
use super::error::DOES_NOT_FIT;
use super::{CliError, output};
use crate::config::Sources;
use crate::data::Tokenizer;
use crate::plan::{KnownRates, Plan, Rates};
use crate::train::model::build;
use crate::train::program::Program;

pub fn run(args: PlanArgs) -> Result<ExitCode, CliError> {
    let mut config = Sources::process(args.source.config, args.source.set).load()?.config;
    let tokenizer = Tokenizer::load(&config.data.tokenizer).map_err(crate::Error::from)?;
    let (_, blocks) = build(&mut config, &tokenizer)?;
    let program = Program::new(&blocks, config.model.embedding)?;
    let plan = Plan::new(&config, &program)?;
    let scaled = |value: Option<f64>, unit: f64| value.map(|value| value * unit);
    let known =
        KnownRates { compute: scaled(args.compute, 1e12), link: scaled(args.link, 1e9), host: scaled(args.host, 1e9) };
    let rates = Rates::of(&config.compute, &known)?;
    let bound = plan.bound(&rates);
    let predicted = plan.predicted_step(&config, &known);
    if args.json {
        let mut value = serde_json::to_value(&plan).map_err(std::io::Error::from)?;
        value["fits"] = plan.fits().into();
        value["rates"] = serde_json::to_value(rates).map_err(std::io::Error::from)?;
        value["bound"] = serde_json::to_value(bound).map_err(std::io::Error::from)?;
        value["predicted_step_s"] = predicted.map(|step| step.as_secs_f64()).into();
        output::json(&value)?;
    } else {
        plan.lines(&bound, predicted).iter().try_for_each(|line| output::line(line))?;
    }
    Ok(if plan.fits() { ExitCode::SUCCESS } else { ExitCode::from(DOES_NOT_FIT) })
}
