//! What a training publishes after each step.
//!
//! Totals of the runtime become increments here, so that a second engine under the same registry goes on counting where the
//! first one stopped. Seconds are recorded once a step and read by their sums: the exporter's counters hold whole numbers.
//! Series are looked up once a step. What changes within a step is shown by a thread beside it (`live`).

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use patrickstar_actors::health::ActorStatus;
use patrickstar_actors::stats::Stats;
use patrickstar_actors::types::{Kind, Precision};

use super::names::{Counter, Gauge, Histogram};
use super::registry::Registry;
use super::{chunks, live, memory};
use crate::config::Config;
use crate::error::Error;
use crate::telemetry::peak::device_peak_flops;
use crate::telemetry::periodic::Periodic;
use crate::train::Engine;
use crate::train::device::is_cuda;
use crate::train::engine::StepReport;
use crate::train::pace::WholeStep;

/// Publishes one training.
pub struct TrainingMetrics {
    registry: Arc<Registry>,
    /// What was counted up to the last step.
    stats: Stats,
    actors: Vec<ActorStatus>,
    saving_since: Option<Instant>,
    _live: Periodic,
}

impl TrainingMetrics {
    /// Says which training it is, and shows everything that is known before the first step.
    pub fn new(registry: Arc<Registry>, engine: &Engine) -> Result<Self, Error> {
        describe_job(&registry, engine);
        // Counters begin at 0 and not at their first increment, which `rate` would not see.
        count_step(&registry, 0, 0, false, false);
        for counter in [Counter::Checkpoints, Counter::CheckpointBytes] {
            registry.counter(counter, &[]).increment(0);
        }
        let actors = engine.runtime().actors();
        actors.iter().for_each(|status| count_actor(&registry, status, 0, 0));
        chunks::count(&registry, engine, &Stats::default());
        memory::show_peaks(&registry, engine);
        registry.gauge(Gauge::JobProgress, &[]).set(progress(engine));
        // A training that hangs in its first step has made no progress since it began.
        registry.gauge(Gauge::TrainStep, &[]).set(engine.current_step().0 as f64);
        registry.gauge(Gauge::JobLastStep, &[]).set(now());
        let actors = without_counts(actors);
        let kinds = engine.precision().persistent_kinds().iter().copied().chain([Kind::Gradient]).collect();
        let live = live::start(Arc::clone(&registry), engine.runtime().view(), kinds)
            .map_err(|error| Error::Failed(format!("there is no thread for live metrics: {error}")))?;
        Ok(TrainingMetrics { registry, stats: Stats::default(), actors, saving_since: None, _live: live })
    }

    /// Publishes a step. A step whose loss ends the training counts too:
    /// whoever looks at the graph wants to see why it ends.
    pub fn step(&mut self, engine: &Engine, report: &StepReport, whole: &WholeStep) {
        let registry = &self.registry;
        show_step(registry, engine, report);
        let stats = &report.stats;
        let finite = report.loss.is_finite() && (stats.gradient_norm.is_finite() || stats.overflow);
        count_step(registry, 1, whole.tokens, stats.overflow, !finite);
        registry.histogram(Histogram::StepDuration, &[]).record(whole.time);
        let phases = report.phases;
        for (phase, time) in [
            ("data", whole.time.saturating_sub(stats.elapsed + whole.saving + whole.validation)),
            ("forward", phases.forward),
            ("backward", phases.backward),
            ("optimizer", phases.optimizer),
            ("checkpoint", whole.saving),
            ("validation", whole.validation),
        ] {
            registry.histogram(Histogram::PhaseDuration, &[phase]).record(time);
        }
        registry.gauge(Gauge::JobProgress, &[]).set(progress(engine));
        if let Some(left) = whole.time_left {
            registry.gauge(Gauge::JobEstimatedFinish, &[]).set(now() + left.as_secs_f64());
        }

        // Not the report's counters: those leave out what happened between two steps.
        let stats = engine.runtime().stats();
        let new = stats.since(&self.stats);
        chunks::count(registry, engine, &new);
        chunks::record_times(registry, &new);
        self.stats = stats;
        memory::show_peaks(registry, engine);
        chunks::record_ages(registry, engine);

        let actors = engine.runtime().actors();
        for (status, before) in actors.iter().zip(&self.actors) {
            let (handled, restarts) = (status.handled - before.handled, status.restarts - before.restarts);
            count_actor(registry, status, handled, restarts);
            let busy = status.busy.saturating_sub(before.busy);
            registry.histogram(Histogram::ActorHandleDuration, &[status.actor]).record(busy);
        }
        self.actors = actors;
    }

    /// The loss on validation data is known anew.
    pub fn validated(&self, loss: f64) {
        self.registry.gauge(Gauge::ValidLoss, &[]).set(loss);
    }

    /// A checkpoint is being written from now on.
    pub fn checkpoint_begun(&mut self) {
        self.saving_since = Some(Instant::now());
    }

    /// It is safe on disk, where it takes `bytes`.
    pub fn checkpoint_done(&mut self, bytes: u64) {
        if let Some(since) = self.saving_since.take() {
            self.registry.histogram(Histogram::CheckpointDuration, &[]).record(since.elapsed());
        }
        self.registry.counter(Counter::Checkpoints, &[]).increment(1);
        self.registry.counter(Counter::CheckpointBytes, &[]).increment(bytes);
        self.registry.gauge(Gauge::CheckpointLastSuccess, &[]).set(now());
    }
}

/// What stays the same in a run.
fn describe_job(registry: &Registry, engine: &Engine) {
    let (config, plan) = (engine.config(), engine.plan());
    let device = if is_cuda(&config.compute) { "cuda" } else { "cpu" };
    registry.gauge(Gauge::JobInfo, &[&model_name(config), precision_name(engine.precision()), device]).set(1.0);
    let show = |gauge, value| registry.gauge(gauge, &[]).set(value);
    show(Gauge::JobStart, now());
    show(Gauge::TrainPlannedSteps, config.train.steps as f64);
    show(Gauge::ModelParameters, plan.parameters as f64);
    show(Gauge::ModelStateBytes, plan.model_states.0 as f64);
    show(Gauge::ChunkSizeBytes, plan.chunk.0 as f64);
    if let Some(peak) = device_peak_flops(config, engine.compute(), engine.precision()) {
        registry.gauge(Gauge::DevicePeakFlops, &[precision_name(engine.precision())]).set(peak);
    }
    // Absent for models of the user's own, whose operations nobody has counted.
    if let Some(flops) = plan.flops {
        show(Gauge::ModelStepFlops, flops);
    }
}

fn model_name(config: &Config) -> String {
    let path = config.model.path.as_ref().and_then(|path| path.file_name());
    path.map_or_else(|| config.model.preset.clone(), |name| name.to_string_lossy().into_owned())
}

fn precision_name(precision: Precision) -> &'static str {
    match precision {
        Precision::Fp32 => "fp32",
        Precision::Bf16 => "bf16",
        Precision::Fp16 => "fp16",
    }
}

fn show_step(registry: &Registry, engine: &Engine, report: &StepReport) {
    for (gauge, value) in [
        (Gauge::TrainStep, report.stats.step.0 as f64),
        (Gauge::JobLastStep, now()),
        (Gauge::TrainLoss, report.loss),
        (Gauge::TrainLearningRate, report.learning_rate),
        (Gauge::TrainGradientNorm, report.stats.gradient_norm),
        (Gauge::TrainLossScale, f64::from(engine.loss_scale().scale)),
    ] {
        registry.gauge(gauge, &[]).set(value);
    }
}

fn count_step(registry: &Registry, steps: u64, tokens: u64, overflow: bool, non_finite: bool) {
    for (counter, count) in [
        (Counter::TrainSteps, steps),
        (Counter::TrainTokens, tokens),
        (Counter::OverflowSteps, u64::from(overflow)),
        (Counter::NonFiniteSteps, u64::from(non_finite)),
    ] {
        registry.counter(counter, &[]).increment(count);
    }
}

fn count_actor(registry: &Registry, status: &ActorStatus, handled: u64, restarts: u64) {
    registry.counter(Counter::ActorMessages, &[status.actor]).increment(handled);
    registry.counter(Counter::ActorRestarts, &[status.actor]).increment(restarts);
}

/// The actors before they did anything: what they did before the first step counts with it.
fn without_counts(actors: Vec<ActorStatus>) -> Vec<ActorStatus> {
    actors.into_iter().map(|status| ActorStatus { handled: 0, restarts: 0, busy: Duration::ZERO, ..status }).collect()
}

fn progress(engine: &Engine) -> f64 {
    engine.current_step().0 as f64 / engine.config().train.steps.max(1) as f64
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}
