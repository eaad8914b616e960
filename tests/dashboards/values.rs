//! What is published is what the engine did.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use patrickstar::config::{Config, Size};
use patrickstar::data::{TokenBatch, Tokenizer};
use patrickstar::telemetry::metrics::{Counter, Gauge, Histogram, Registry, TrainingMetrics};
use patrickstar::train::model::{build, to_batch};
use patrickstar::train::pace::WholeStep;
use patrickstar::{Batch, Engine};
use patrickstar_actors::Access;
use patrickstar_actors::stats::{Direction, Pressure, Stats};
use patrickstar_actors::types::{Kind, Moment, Tier};

use crate::live::say;

const STEPS: u64 = 4;

fn config() -> Config {
    let mut config = Config::default();
    (config.model.hidden, config.model.layers, config.model.heads, config.model.context) = (32, 2, 2, 32);
    (config.train.batch, config.train.micro_batches, config.train.seq_len) = (4, 2, 32);
    config.train.recompute = patrickstar::config::Recompute::Full;
    config.memory.device = "2600KiB".parse().unwrap();
    config.memory.chunk = Size::Bytes("32KiB".parse().unwrap());
    config
}

fn batch() -> Batch {
    let input: Vec<u32> = (0..4 * 32).map(|position| position % 251).collect();
    let target = input.iter().map(|token| token + 1).collect();
    to_batch(&TokenBatch { sequences: 4, seq_len: 32, input, target }, 2).unwrap()
}

/// Counters just before and just after they were published the last time: actors fetch ahead whenever they can.
struct Counted {
    before: Stats,
    after: Stats,
    /// The time of all steps.
    whole: Duration,
}

impl Counted {
    fn assert_published(&self, published: f64, pick: impl Fn(&Stats) -> f64) {
        let (before, after) = (pick(&self.before), pick(&self.after));
        assert!((before..=after).contains(&published), "{published} is not in {before}..={after}");
    }
}

/// Trains an engine of its own, and returns what it counted and how long publishing a step took at best.
fn train(registry: &Arc<Registry>) -> (Engine, Counted, Duration) {
    let mut config = config();
    let (_, blocks) = build(&mut config, &Tokenizer::load("bytes").unwrap()).unwrap();
    let mut engine = Engine::new(config, blocks).unwrap();
    let mut metrics = TrainingMetrics::new(Arc::clone(registry), &engine).unwrap();
    let mut quickest = Duration::MAX;
    let mut before = Stats::default();
    let mut whole = Duration::ZERO;
    for _ in 0..STEPS {
        let report = engine.step(&batch()).unwrap();
        before = engine.runtime().stats();
        let start = Instant::now();
        let (saving, validation) = (Duration::from_millis(5), Duration::from_millis(3));
        let time = report.stats.elapsed + Duration::from_millis(10) + saving + validation;
        let time_left = Some(Duration::from_secs(60));
        metrics.step(&engine, &report, &WholeStep { tokens: 128, time, saving, validation, time_left });
        whole += time;
        quickest = quickest.min(start.elapsed());
    }
    metrics.checkpoint_begun();
    metrics.checkpoint_done(4096);
    let after = engine.runtime().stats();
    (engine, Counted { before, after, whole }, quickest)
}

/// The value of a series: its name, and its labels as the exporter writes them.
fn value(text: &str, name: &str, labels: &str) -> f64 {
    let series = if labels.is_empty() { format!("{name} ") } else { format!("{name}{{{labels}}} ") };
    let line = text.lines().find(|line| line.starts_with(&series)).unwrap_or_else(|| panic!("{series}: {text}"));
    line[series.len()..].parse().unwrap()
}

#[test]
fn a_training_is_published_as_it_was_and_the_next_one_goes_on_counting() {
    let registry = Arc::new(Registry::new(None).unwrap());
    let (engine, counted, quickest) = train(&registry);
    say(&format!("publishing a step took {quickest:?}"));
    let text = registry.render();
    let counter = |counter: Counter, labels: &str| value(&text, counter.family().name, labels);
    let gauge = |gauge: Gauge, labels: &str| value(&text, gauge.family().name, labels);
    assert_eq!(counter(Counter::TrainSteps, ""), STEPS as f64);
    assert_eq!(counter(Counter::TrainTokens, ""), 128.0 * STEPS as f64);
    assert_eq!((counter(Counter::Checkpoints, ""), counter(Counter::NonFiniteSteps, "")), (1.0, 0.0));
    assert_eq!(gauge(Gauge::TrainStep, ""), STEPS as f64);

    let down = Direction::HostToDevice as usize;
    assert!(counted.before.moves[down] > 0, "nothing travelled: the test shows nothing");
    let ends = "from=\"host\",to=\"device\"";
    counted.assert_published(counter(Counter::ChunkMoves, ends), |stats| stats.moves[down] as f64);
    counted.assert_published(counter(Counter::ChunkMovedBytes, ends), |stats| stats.bytes[down] as f64);
    counted.assert_published(counter(Counter::ChunkPrefetches, "outcome=\"useful\""), |stats| {
        stats.prefetch_useful as f64
    });
    counted.assert_published(counter(Counter::AdamParameters, "side=\"host\""), |stats| stats.stepped_on_host as f64);

    counted.assert_published(counter(Counter::MemoryPressure, "tier=\"device\",action=\"evict\""), |stats| {
        stats.pressure[Tier::Device.index()][Pressure::Evict as usize] as f64
    });

    let steps = format!("{}_sum", Histogram::StepDuration.family().name);
    assert!((value(&text, &steps, "") - counted.whole.as_secs_f64()).abs() < 1e-9);
    let phases = format!("{}_sum", Histogram::PhaseDuration.family().name);
    let phase = |phase: &str| value(&text, &phases, &format!("phase=\"{phase}\""));
    assert!(["forward", "backward"].iter().all(|&name| phase(name) > 0.0));
    assert!((phase("data") - 0.01 * STEPS as f64).abs() < 1e-9);
    assert!((phase("checkpoint") - 0.005 * STEPS as f64).abs() < 1e-9);
    assert!((phase("validation") - 0.003 * STEPS as f64).abs() < 1e-9);
    let all: f64 =
        ["data", "forward", "backward", "optimizer", "checkpoint", "validation"].into_iter().map(phase).sum();
    assert!((all - counted.whole.as_secs_f64()).abs() < 1e-6, "{all} of {:?}", counted.whole);
    let copies = format!("{}_sum", Histogram::CopyDuration.family().name);
    // Sums of differences round.
    let copied = value(&text, &copies, ends);
    assert!(copied >= counted.before.busy[down].as_secs_f64() - 1e-9);
    assert!(copied <= counted.after.busy[down].as_secs_f64() + 1e-9);

    let accesses = |result: &str| counter(Counter::ChunkAccesses, &format!("result=\"{result}\""));
    // Each block asks for its chunks in both passes.
    let asked = counted.after.hits + counted.after.misses;
    assert!(accesses("miss") > 0.0 && accesses("hit") + accesses("miss") == asked as f64, "{asked}");
    let chunks = Gauge::Chunks.family().name;
    let counts = text.lines().filter(|line| line.starts_with(&format!("{chunks}{{"))).map(|line| {
        let (_, count) = line.rsplit_once(' ').unwrap();
        count.parse::<f64>().unwrap()
    });
    // All of them, at whichever instant they were counted.
    assert_eq!(counts.sum::<f64>(), engine.runtime().layout().chunk_count() as f64);
    let samples = |histogram: Histogram| value(&text, &format!("{}_count", histogram.family().name), "");
    assert!(samples(Histogram::ChunkResidency) >= samples(Histogram::ChunkIdle) && samples(Histogram::ChunkIdle) > 0.0);
    assert!(samples(Histogram::ChunkReuseGap) > 0.0);
    assert_eq!(counter(Counter::CheckpointBytes, ""), 4096.0);
    assert_eq!(gauge(Gauge::JobProgress, ""), STEPS as f64 / engine.config().train.steps as f64);
    let left =
        gauge(Gauge::JobEstimatedFinish, "") - SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((30.0..=60.0).contains(&left), "{left} s are left");
    assert!(gauge(Gauge::ActorMailboxCapacity, "actor=\"reduction\"") > 0.0);
    let busy = format!("{}_sum", Histogram::ActorHandleDuration.family().name);
    assert!(value(&text, &busy, "actor=\"reduction\"") > 0.0);

    let runtime = engine.runtime();
    assert_eq!(gauge(Gauge::DevicePeak, ""), runtime.device_peak().0 as f64);

    let (_, second, _) = train(&registry);
    let both = registry.render();
    assert_eq!(value(&both, Counter::TrainSteps.family().name, ""), 2.0 * STEPS as f64);
    let moves = value(&both, Counter::ChunkMoves.family().name, ends) - counter(Counter::ChunkMoves, ends);
    second.assert_published(moves, |stats| stats.moves[down] as f64);
}

/// Waits for a series to be what is wanted.
fn until_shown(registry: &Registry, gauge: Gauge, labels: &str, wanted: impl Fn(f64) -> bool) {
    let series = format!("{}{{{labels}}} ", gauge.family().name);
    let start = Instant::now();
    loop {
        let text = registry.render();
        let shown = text.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok());
        if shown.is_some_and(&wanted) {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{series} is {shown:?}:\n{text}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_changes_within_a_step_is_shown_before_it_ends() {
    let registry = Arc::new(Registry::new(None).unwrap());
    let mut config = config();
    let (_, blocks) = build(&mut config, &Tokenizer::load("bytes").unwrap()).unwrap();
    let mut engine = Engine::new(config, blocks).unwrap();
    let _metrics = TrainingMetrics::new(Arc::clone(&registry), &engine).unwrap();
    // Nobody publishes this step: to whoever looks from outside it has not ended.
    engine.step(&batch()).unwrap();
    engine.drain().unwrap();
    let runtime = engine.runtime();
    let peak = runtime.tier_use(Tier::Device).peak.0 as f64;
    until_shown(&registry, Gauge::MemoryPeak, "tier=\"device\"", |shown| shown >= peak && peak > 0.0);
    until_shown(&registry, Gauge::ActorLastProgress, "actor=\"reduction\"", |shown| shown > 0.0);
    let chunk = runtime.layout().chunks().iter().find(|info| info.kind == Kind::Weight).unwrap().id;
    let in_use = "tier=\"device\",kind=\"weight\",state=\"compute\"";
    let lease = runtime.access_untraced(Moment(0), Tier::Device, vec![(chunk, Access::Read)]).unwrap();
    until_shown(&registry, Gauge::Chunks, in_use, |shown| shown == 1.0);
    drop(lease);
    until_shown(&registry, Gauge::Chunks, in_use, |shown| shown == 0.0);
}
