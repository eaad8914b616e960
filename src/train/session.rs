//! A whole run: data, engine, checkpoints, logs, report.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use patrickstar_actors::error::RuntimeError;
use patrickstar_actors::types::{Bytes, Step, Tier};
use serde::Serialize;

use super::drill::Drill;
use super::engine::{Engine, StepReport};
use super::model::{build, to_batch};
pub use super::observer::{Observer, Progress};
use super::pace::{Pace, WholeStep};
use super::sample::{Sampling, generate};
use super::save::Saving;
use super::start::find_checkpoint;
pub use super::start::{Start, checkpoints_dir, open_or_latest};
use super::validation::Validation;
use crate::checkpoint::{self, CheckpointMeta};
use crate::config::Config;
use crate::data::{Batches, Corpus, DataPosition, Tokenizer};
use crate::error::Error;
use crate::model::gpt2::Gpt2Config;
use crate::model::hf;
use crate::telemetry::metrics::{self, TrainingMetrics};
use crate::telemetry::report::{ChunkLabel, RunReport, StepPoint, write_report};
use crate::telemetry::tensorboard::EventWriter;
use crate::telemetry::trace::write_chrome_trace;

/// The result of a run, as `train --json` prints it last.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Steps done in total.
    pub steps: u64,
    /// Loss of the first step of the run.
    pub loss_first: f64,
    /// Mean loss of the last tenth of the steps (at least one).
    pub loss_last: f64,
    /// The latest loss on validation data.
    pub valid_loss: Option<f64>,
    /// Parameters.
    pub params: u64,
    /// `memory.device`.
    pub device_budget_bytes: u64,
    /// Weights and optimizer states.
    pub model_state_bytes: u64,
    /// Highest use of the device: chunks and non-model memory.
    pub device_peak_bytes: u64,
    /// Chunks copied between tiers.
    pub chunk_moves: u64,
    /// Share of the time that the compute thread waited, warm-up step aside.
    pub stall_ratio: f64,
    /// Throughput, warm-up step aside.
    pub tokens_per_second: f64,
    /// Whether a signal ended the run early.
    pub interrupted: bool,
    /// The last checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Generated text.
    pub sample: Option<String>,
    /// Files of the run, by what they are.
    pub files: Vec<(String, PathBuf)>,
}

/// A run that is set up.
pub struct Session {
    config: Config,
    model: Gpt2Config,
    tokenizer: Tokenizer,
    batches: Batches,
    validation: Option<Validation>,
    /// Where this process has a registry. It looks at the engine, so it goes first.
    metrics: Option<TrainingMetrics>,
    engine: Engine,
    history: Vec<StepPoint>,
    events: Option<EventWriter>,
    saving: Option<Saving>,
    last_checkpoint: Option<PathBuf>,
    /// The step whose states the output directory already has.
    saved: Option<Step>,
    run: RunTotals,
}

#[derive(Default)]
struct RunTotals {
    /// What saving took since the last step: the next one waits for it.
    saving: Duration,
    /// What the validation loss after it took.
    validation: Duration,
    timed_tokens: u64,
    timed_seconds: f64,
    timed_stall: f64,
    steps: u64,
    pace: Pace,
}

impl Session {
    /// Opens data and checkpoint, plans, and sets up the engine.
    pub fn open(mut config: Config, start: &Start, observer: &mut dyn Observer) -> Result<Self, Error> {
        config.validate()?;
        let output = config.train.output.clone();
        std::fs::create_dir_all(&output).map_err(|error| Error::io(&output, error))?;
        let tokenizer = Tokenizer::load(&config.data.tokenizer)?;
        let corpus = Arc::new(Corpus::open(&config.data.path, &tokenizer)?);
        let mut batches =
            Batches::new(corpus, config.train.seq_len, config.train.batch, config.train.seed, config.data.shuffle)?;
        let validation = Validation::open(&config, &tokenizer)?;
        let (model, blocks) = build(&mut config, &tokenizer)?;
        let checkpoint = find_checkpoint(&checkpoints_dir(&output), start, observer)?;
        let engine = match (&checkpoint, &config.model.path) {
            (Some(checkpoint), _) => {
                let engine = Engine::load(config.clone(), blocks, checkpoint)?;
                let position: DataPosition = serde_json::from_value(checkpoint.meta().data_position.clone())
                    .map_err(|error| Error::Failed(format!("the checkpoint's data position is unreadable: {error}")))?;
                batches.seek(&position)?;
                engine
            }
            (None, Some(path)) => {
                let weights = hf::Weights::open(path)?;
                Engine::with_weights(config.clone(), blocks, |name, row, out| weights.read_parameter(name, row, out))?
            }
            (None, None) => Engine::new(config.clone(), blocks)?,
        };
        let events = config
            .telemetry
            .tensorboard
            .then(|| EventWriter::create(&output).map_err(|error| Error::io(&output, error)))
            .transpose()?;
        let metrics =
            metrics::installed().map(|registry| TrainingMetrics::new(Arc::clone(registry), &engine)).transpose()?;
        let resumed_here = checkpoint.filter(|from| from.path().parent() == Some(&checkpoints_dir(&output)));
        Ok(Session {
            config,
            model,
            tokenizer,
            batches,
            validation,
            engine,
            history: Vec::new(),
            events,
            metrics,
            saving: None,
            saved: resumed_here.as_ref().map(|from| from.meta().step),
            last_checkpoint: resumed_here.map(|from| from.path().to_owned()),
            run: RunTotals::default(),
        })
    }

    /// Trains to `train.steps`, or until `stop` turns true; then saves and writes the report.
    pub fn run(mut self, stop: &AtomicBool, observer: &mut dyn Observer) -> Result<Summary, Error> {
        let interrupted = match self.train(stop, observer) {
            Ok(interrupted) => interrupted,
            Err(error) => return Err(self.stopped(error, observer)),
        };
        self.save(observer)?;
        self.finish_saving(observer)?;
        // Generation is not part of the recorded steps.
        self.engine.runtime().timeline().set_enabled(false);
        let sample = self.sample()?;
        let summary = self.summary(interrupted, sample)?;
        Ok(summary)
    }

    /// Whether `stop` ended it.
    fn train(&mut self, stop: &AtomicBool, observer: &mut dyn Observer) -> Result<bool, Error> {
        let total = self.config.train.steps;
        let drill = Drill::from_environment()?;
        while self.engine.current_step().0 < total {
            if stop.load(Ordering::Relaxed) {
                observer.message("stopping after this step: saving a checkpoint");
                return Ok(true);
            }
            observer.before_step(&self.engine)?;
            if let Some(drill) = &drill {
                drill.before(Step(self.engine.current_step().0 + 1), self.engine.compute())?;
            }
            self.step(observer)?;
            let step = self.engine.current_step().0;
            if self.config.checkpoint.every > 0 && step.is_multiple_of(self.config.checkpoint.every) && step < total {
                self.waits_for_saving(|session| session.save(observer))?;
            }
        }
        Ok(false)
    }

    /// Work of a checkpoint that the next step waits for.
    fn waits_for_saving(&mut self, work: impl FnOnce(&mut Self) -> Result<(), Error>) -> Result<(), Error> {
        let began = Instant::now();
        work(self)?;
        self.run.saving += began.elapsed();
        Ok(())
    }

    /// What became of a step that failed, with the way back: states in memory may be of two steps, those of the last
    /// checkpoint are whole.
    fn stopped(&mut self, error: Error, observer: &mut dyn Observer) -> Error {
        // One that is being written may still become whole; if not, the one before it counts.
        if let Err(saving) = self.finish_saving(observer) {
            tracing::warn!("the checkpoint that was being written is lost: {saving}");
        }
        let advice = match &self.last_checkpoint {
            Some(path) => format!("{} is whole, --resume goes on from it", path.display()),
            None => {
                "there is no checkpoint yet, so begin again; checkpoint.every saves one every so many steps".to_owned()
            }
        };
        Error::Stopped { step: self.engine.current_step().0 + 1, source: Box::new(error), advice }
    }

    fn step(&mut self, observer: &mut dyn Observer) -> Result<(), Error> {
        let began = Instant::now();
        let recorded = self.config.telemetry.trace_steps;
        let left = self.config.train.steps - self.engine.current_step().0;
        // An observer may record at other times.
        if left <= recorded {
            self.engine.runtime().timeline().set_enabled(true);
        }
        let tokens = self.batches.next_batch();
        let batch = to_batch(&tokens, self.config.train.micro_batches)?;
        let report = self.engine.step(&batch)?;
        let (saving, validation) = (std::mem::take(&mut self.run.saving), std::mem::take(&mut self.run.validation));
        let time = began.elapsed() + saving + validation;
        let time_left = self.run.pace.after(time).map(|each| each.mul_f64((left - 1) as f64));
        let whole = WholeStep { tokens: tokens.input.len() as u64, time, saving, validation, time_left };
        if let Some(metrics) = &mut self.metrics {
            metrics.step(&self.engine, &report, &whole);
        }
        if !report.loss.is_finite() {
            return Err(Error::Failed(format!(
                "the loss is {} in step {}: lower train.lr and resume from the last checkpoint",
                report.loss, report.stats.step.0
            )));
        }
        if report.stats.overflow {
            observer.message(&format!(
                "step {}: gradients overflowed fp16, nothing was updated; the loss is scaled by {} from now on",
                report.stats.step.0,
                self.engine.loss_scale().scale
            ));
        }
        let valid_loss = self.validate(report.stats.step)?;
        self.note(&report, &whole, valid_loss, observer)?;
        self.waits_for_saving(|session| session.reap_saving(observer))
    }

    /// The loss on validation data, if it is due.
    fn validate(&mut self, step: Step) -> Result<Option<f64>, Error> {
        let Some(validation) = self.validation.as_ref().filter(|validation| validation.is_due(step)) else {
            return Ok(None);
        };
        let began = Instant::now();
        let loss = validation.loss(&mut self.engine)?;
        self.run.validation = began.elapsed();
        if let Some(metrics) = &self.metrics {
            metrics.validated(loss);
        }
        Ok(Some(loss))
    }

    fn note(
        &mut self,
        report: &StepReport,
        &WholeStep { tokens, time, time_left, .. }: &WholeStep,
        valid_loss: Option<f64>,
        observer: &mut dyn Observer,
    ) -> Result<(), Error> {
        let seconds = time.as_secs_f64();
        let tokens_per_second = tokens as f64 / seconds;
        let device = report.stats.device;
        // The first step records the trace and moves chunks on demand: not what the run is like.
        if self.run.steps > 0 {
            self.run.timed_tokens += tokens;
            self.run.timed_seconds += seconds;
            self.run.timed_stall += report.stats.stats.stall().as_secs_f64();
        }
        self.run.steps += 1;
        self.history.push(StepPoint {
            step: report.stats.step.0,
            loss: report.loss,
            valid_loss,
            tokens_per_second,
            stall_ratio: report.stall_ratio(),
            gradient_norm: Some(report.stats.gradient_norm),
        });
        let progress = Progress {
            tokens_per_second,
            device_used: Bytes(device.used.0 + report.stats.non_model_peak.0),
            device_budget: self.config.memory.device,
            host_used: report.stats.host.used,
            time_left,
            valid_loss,
        };
        self.write_scalars(report, &progress)?;
        observer.step(report, &progress);
        Ok(())
    }

    fn write_scalars(&mut self, report: &StepReport, progress: &Progress) -> Result<(), Error> {
        let Some(events) = &mut self.events else { return Ok(()) };
        let step = report.stats.step.0;
        let scalars = [
            ("train/loss", report.loss),
            ("train/learning_rate", report.learning_rate),
            ("train/gradient_norm", report.stats.gradient_norm),
            ("speed/tokens_per_second", progress.tokens_per_second),
            ("speed/stall_ratio", report.stall_ratio()),
            ("memory/device_bytes", progress.device_used.0 as f64),
            ("memory/host_bytes", progress.host_used.0 as f64),
            ("chunks/moves", report.stats.stats.chunk_moves() as f64),
        ];
        let output = self.config.train.output.clone();
        let validation = progress.valid_loss.map(|loss| ("valid/loss", loss));
        for (tag, value) in scalars.into_iter().chain(validation) {
            events.scalar(step, tag, value as f32).map_err(|error| Error::io(&output, error))?;
        }
        if step.is_multiple_of(10) {
            events.flush().map_err(|error| Error::io(&output, error))?;
        }
        Ok(())
    }

    fn save(&mut self, observer: &mut dyn Observer) -> Result<(), Error> {
        self.finish_saving(observer)?;
        if self.saved == Some(self.engine.current_step()) {
            return Ok(());
        }
        observer.before_save()?;
        let root = checkpoints_dir(&self.config.train.output);
        let meta = self.meta()?;
        self.saving = Some(self.engine.save(&root, self.config.checkpoint.keep, meta)?);
        if let Some(metrics) = &mut self.metrics {
            metrics.checkpoint_begun();
        }
        self.saved = Some(self.engine.current_step());
        Ok(())
    }

    fn reap_saving(&mut self, observer: &mut dyn Observer) -> Result<(), Error> {
        if self.saving.as_ref().is_some_and(Saving::is_finished) { self.finish_saving(observer) } else { Ok(()) }
    }

    fn finish_saving(&mut self, observer: &mut dyn Observer) -> Result<(), Error> {
        if let Some(saving) = self.saving.take() {
            let path = saving.finish()?;
            if let Some(metrics) = &mut self.metrics {
                metrics.checkpoint_done(checkpoint::bytes_on_disk(&path));
            }
            // Only one is under way at a time, and `saved` is its step.
            if let Some(step) = self.saved {
                observer.saved(step, &path);
            }
            self.last_checkpoint = Some(path);
        }
        Ok(())
    }

    fn meta(&self) -> Result<CheckpointMeta, Error> {
        let json = |error: serde_json::Error| Error::Failed(format!("the checkpoint's description: {error}"));
        Ok(CheckpointMeta {
            data_position: serde_json::to_value(self.batches.position()).map_err(json)?,
            model: serde_json::to_value(&self.model).map_err(json)?,
            loss_history_tail: self
                .history
                .iter()
                .rev()
                .take(100)
                .rev()
                .map(|point| (point.step, point.loss))
                .collect(),
            ..self.engine.meta()?
        })
    }

    fn sample(&mut self) -> Result<Option<String>, Error> {
        let count = self.config.train.sample_tokens;
        if count == 0 {
            return Ok(None);
        }
        let sampling =
            Sampling { temperature: 0.8, top_k: Some(40), top_p: 1.0, seed: self.config.train.seed, stream: 0 };
        let prompt = self.config.train.sample_prompt.clone();
        let context = self.model.context;
        generate(&mut self.engine, &self.tokenizer, &prompt, count, context, sampling).map(Some)
    }

    fn summary(&mut self, interrupted: bool, sample: Option<String>) -> Result<Summary, Error> {
        let stats = self.engine.runtime().stats();
        let tail = (self.history.len() / 10).max(1);
        let last: Vec<f64> = self.history.iter().rev().take(tail).map(|point| point.loss).collect();
        let seconds = self.run.timed_seconds.max(1e-9);
        let mut summary = Summary {
            steps: self.engine.current_step().0,
            loss_first: self.history.first().map_or(f64::NAN, |point| point.loss),
            loss_last: last.iter().sum::<f64>() / last.len().max(1) as f64,
            valid_loss: self.history.iter().rev().find_map(|point| point.valid_loss),
            params: self.engine.plan().parameters,
            device_budget_bytes: self.config.memory.device.0,
            model_state_bytes: self.engine.plan().model_states.0,
            device_peak_bytes: self.engine.runtime().device_peak().0,
            chunk_moves: stats.chunk_moves(),
            stall_ratio: self.run.timed_stall / seconds,
            tokens_per_second: self.run.timed_tokens as f64 / seconds,
            interrupted,
            checkpoint: self.last_checkpoint.clone(),
            sample,
            files: Vec::new(),
        };
        if let Some(events) = &mut self.events {
            events.flush().map_err(|error| Error::io(&self.config.train.output, error))?;
            summary.files.push(("tensorboard".into(), self.config.train.output.clone()));
        }
        self.write_pages(&mut summary)?;
        Ok(summary)
    }

    fn write_pages(&mut self, summary: &mut Summary) -> Result<(), Error> {
        let (spans, snapshots) = self.engine.runtime().timeline().take().map_err(RuntimeError::from)?;
        let output = self.config.train.output.clone();
        if self.config.telemetry.trace_steps > 0 {
            let path = output.join("trace.json");
            write_chrome_trace(&path, &spans, &snapshots).map_err(|error| Error::io(&path, error))?;
            summary.files.push(("trace".into(), path));
        }
        if self.config.telemetry.report {
            let path = output.join("report.html");
            let layout = self.engine.runtime().layout();
            let report = RunReport {
                title: format!("patrickstar: {}", output.display()),
                summary: summary_lines(summary, &self.engine),
                steps: self.history.clone(),
                device_budget: self.config.memory.device,
                chunks: layout.chunks().iter().map(|info| ChunkLabel { kind: info.kind, group: info.group }).collect(),
                snapshots,
                spans,
                sample: summary.sample.clone(),
            };
            write_report(&path, &report).map_err(|error| Error::io(&path, error))?;
            summary.files.push(("report".into(), path));
        }
        Ok(())
    }

    /// The engine, for callers that look inside.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The newest checkpoint of this run, its own or the one that it goes on from.
    pub fn last_checkpoint(&self) -> Option<&Path> {
        self.last_checkpoint.as_deref()
    }
}

fn summary_lines(summary: &Summary, engine: &Engine) -> Vec<(String, String)> {
    let host = engine.runtime().tier_use(Tier::Host);
    [
        ("steps", summary.steps.to_string()),
        ("parameters", summary.params.to_string()),
        ("loss", format!("{:.4} to {:.4}", summary.loss_first, summary.loss_last)),
        ("model states", Bytes(summary.model_state_bytes).to_string()),
        ("device budget", Bytes(summary.device_budget_bytes).to_string()),
        ("device peak", Bytes(summary.device_peak_bytes).to_string()),
        ("host peak", host.peak.to_string()),
        ("chunk", engine.plan().chunk.to_string()),
        ("chunk moves", summary.chunk_moves.to_string()),
        ("stall", format!("{:.2} %", 100.0 * summary.stall_ratio)),
        ("tokens per second", format!("{:.0}", summary.tokens_per_second)),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}
