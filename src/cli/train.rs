//! `patrickstar train`.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::args::TrainArgs;
use super::progress::Steps;
use super::{CliError, output};
use crate::Error;
use crate::config::{Config, Sources};
use crate::telemetry::metrics::listener::listen;
use crate::train::engine::StepReport;
use crate::train::session::{Observer, Progress, Session, Start};

pub fn run(args: TrainArgs) -> Result<ExitCode, CliError> {
    let mut set = args.source.set.clone();
    if let Some(data) = &args.data {
        set.push(format!("data.path={}", data.display()));
    }
    if let Some(address) = &args.metrics {
        set.push(format!("telemetry.metrics_listen={address}"));
    }
    let config = Sources::process(args.source.config.clone(), set).load()?.config;
    let stop = stop_flag()?;
    let start = match args.resume {
        None => Start::Fresh,
        Some(None) => Start::Latest,
        Some(Some(path)) => Start::At(path),
    };
    let mut observer = Lines::new(config.train.steps, config.train.log_every, args.json);
    serve_metrics(&config, &mut observer)?;
    let session = Session::open(config, &start, &mut observer)?;
    observer.message(&session.engine().plan().headline());
    let summary = session.run(&stop, &mut observer)?;
    observer.steps.finish();
    if args.json {
        output::json(&summary)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(sample) = &summary.sample {
        output::line(&format!("sample:\n{sample}\n"))?;
    }
    output::line(&format!(
        "{} steps, loss {:.4} to {:.4}, {:.0} tokens/s, {} chunk moves, {:.2} % stalled, device peak {} of {} for {} of model states",
        summary.steps,
        summary.loss_first,
        summary.loss_last,
        summary.tokens_per_second,
        summary.chunk_moves,
        100.0 * summary.stall_ratio,
        patrickstar_actors::types::Bytes(summary.device_peak_bytes),
        patrickstar_actors::types::Bytes(summary.device_budget_bytes),
        patrickstar_actors::types::Bytes(summary.model_state_bytes),
    ))?;
    if let Some(checkpoint) = &summary.checkpoint {
        output::line(&format!("checkpoint: {}", checkpoint.display()))?;
    }
    for (what, path) in &summary.files {
        output::line(&format!("{what}: {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Serves metrics where the configuration says so; the run directory names the job.
fn serve_metrics(config: &Config, observer: &mut dyn Observer) -> Result<(), Error> {
    config.validate()?;
    let Some(address) = config.metrics_address() else { return Ok(()) };
    let directory = config.train.output.file_name().unwrap_or(config.train.output.as_os_str());
    listen(address, &directory.to_string_lossy())?;
    observer.message(&format!("metrics at http://{address}/metrics"));
    Ok(())
}

/// Turns true at the first SIGINT or SIGTERM; the second one ends the process at once.
fn stop_flag() -> Result<Arc<AtomicBool>, CliError> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .map_err(|error| Error::Failed(format!("signals cannot be handled: {error}")))?;
    }
    Ok(stop)
}

/// A progress bar on a terminal, a line every few steps elsewhere; JSON lines on request.
struct Lines {
    steps: Steps,
    every: u64,
    json: bool,
}

impl Lines {
    fn new(total: u64, every: u64, json: bool) -> Self {
        Lines { steps: Steps::new(total, json), every: every.max(1), json }
    }
}

impl Observer for Lines {
    fn step(&mut self, report: &StepReport, progress: &Progress) {
        let step = report.stats.step.0;
        let validation = progress.valid_loss.map(|loss| format!("  validation {loss:.4}")).unwrap_or_default();
        let text = format!(
            "loss {:.4}{validation}  {:.0} tok/s  stall {:.1} %  device {} / {}  host {}",
            report.loss,
            progress.tokens_per_second,
            100.0 * report.stall_ratio(),
            progress.device_used,
            progress.device_budget,
            progress.host_used,
        );
        let worth_a_line =
            step == 1 || step.is_multiple_of(self.every) || step == self.steps.total() || progress.valid_loss.is_some();
        self.steps.step(step, &text, worth_a_line);
        if self.json && worth_a_line {
            let mut line = serde_json::json!({
                "step": step, "loss": report.loss, "learning_rate": report.learning_rate,
                "gradient_norm": report.stats.gradient_norm, "tokens_per_second": progress.tokens_per_second,
                "stall_ratio": report.stall_ratio(), "chunk_moves": report.stats.stats.chunk_moves(),
            });
            if let Some(loss) = progress.valid_loss {
                line["valid_loss"] = loss.into();
            }
            // A reader that left is noticed at the last line, which matters.
            let _ = output::json(&line);
        }
    }

    fn message(&mut self, text: &str) {
        self.steps.message(text);
    }
}
