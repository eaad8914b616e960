//! The command line: one file a subcommand, printing only through [`output`].

pub mod args;
mod bench;
mod completions;
mod config;
mod doctor;
mod error;
mod generate;
mod jobs;
mod openapi;
pub mod output;
mod plan;
mod progress;
mod sample;
mod serve;
mod submit;
mod train;
mod worker;

pub use args::{Cli, Command};
pub use error::{CANCELLED, CliError, DOES_NOT_FIT, ERROR, UNREACHABLE};

use std::process::ExitCode;

use clap::Parser;

use crate::telemetry::logging;

/// Parses the arguments of this process, runs the command and reports what went wrong.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match logging(&cli).and_then(|()| run(cli.command)) {
        Ok(code) => code,
        Err(error) => {
            output::error(&error);
            error.exit_code()
        }
    }
}

/// Runs one command.
pub fn run(command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Train(args) => train::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Submit(args) => submit::run(args),
        Command::Jobs(args) => jobs::run(args),
        Command::Worker => worker::run(),
        Command::Sample => sample::run(),
        Command::Openapi => openapi::run(),
        Command::Plan(args) => plan::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Config(args) => config::run(args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions(args) => completions::run(&args),
    }
}

fn logging(cli: &Cli) -> Result<(), CliError> {
    let as_json = matches!(cli.log_format, args::LogFormat::Json);
    logging::init(&cli.log_level, as_json).map_err(|reason| CliError::Failed {
        doing: format!("`--log-level {}` is not a level or a filter", cli.log_level),
        source: reason.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        for line in [
            "config show a.toml --origin --set train.steps=2 --json",
            "config schema",
            "config validate",
            "doctor --json",
            "submit a.toml --data b.txt c.jsonl --wait --epochs 2",
            "submit --model gpt-tiny --data b.txt --url http://127.0.0.1:1 --token-file t",
            "jobs list --limit 5 --json",
            "jobs watch ftjob-0 --patience 5",
            "jobs resume ftjob-0 --url http://127.0.0.1:1",
            "completions bash",
        ] {
            Cli::try_parse_from(["patrickstar"].into_iter().chain(line.split(' '))).unwrap();
        }
    }
}
