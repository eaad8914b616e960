//! `patrickstar bench`: each measurement beside its limit, in one run.

mod block;
mod golden;
mod kernels;
mod memory;
mod parity;
mod peers;
mod step;
mod traffic;

use std::process::ExitCode;

use serde_json::Value;

use super::args::{BenchArgs, BenchCommand};
use super::{CliError, output};

pub fn run(args: BenchArgs) -> Result<ExitCode, CliError> {
    let (value, pass) = match args.what {
        BenchCommand::Adam => (memory::adam()?, true),
        BenchCommand::Copy => (memory::copy()?, true),
        BenchCommand::Step { shape, batch, steps, no_kernels, set } => {
            (step::run(shape, batch, steps, !no_kernels, set)?, true)
        }
        BenchCommand::Block { hidden, heads, batch, seq_len, seconds, beside_copies } => {
            (block::run(&block::Shape { hidden, heads, batch, seq_len }, seconds, beside_copies)?, true)
        }
        BenchCommand::Kernels { torch } => (kernels::run(torch.as_deref())?, true),
        BenchCommand::Peers { ours, peers } => (peers::run(&ours, &peers)?, true),
        BenchCommand::Parity => parity::run()?,
        BenchCommand::Golden { dir, precision } => golden::run(&dir, precision)?,
    };
    if args.json {
        output::json(&value)?;
    } else if let Value::Object(fields) = &value {
        fields.iter().try_for_each(|(name, value)| output::line(&format!("{name:24} {value}")))?;
    } else if let Value::Array(rows) = &value {
        // Of the two that give arrays only this one names engines.
        let of_engines = rows.first().is_some_and(|row| row.get("engine").is_some());
        let lines = if of_engines { peers::table(rows) } else { kernels::table(rows) };
        lines.iter().try_for_each(|line| output::line(line))?;
    }
    Ok(if pass { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
