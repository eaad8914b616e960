//! The loss on data that is not trained on: exact, and without a trace in the training.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

use std::process::Command;

use patrickstar::config::{Recompute, Size};
use patrickstar::data::{TokenBatch, Tokenizer};
use patrickstar::model::gpt2;
use patrickstar::train::model::{build, to_batch};
use patrickstar::{Batch, Config, Engine};
use patrickstar_actors::types::{Kind, Precision};
use serde_json::Value;

const SEQUENCES: usize = 4;
const SEQ_LEN: usize = 32;

/// So little memory that chunks move between all tiers.
fn config(precision: Precision, clip_norm: f64) -> Config {
    let mut config = Config::default();
    (config.model.hidden, config.model.layers, config.model.heads, config.model.context) = (32, 3, 2, SEQ_LEN);
    (config.train.batch, config.train.micro_batches, config.train.seq_len) = (SEQUENCES, 2, SEQ_LEN);
    (config.model.precision, config.train.clip_norm) = (precision, clip_norm);
    config.train.recompute = Recompute::Full;
    config.memory.device = "2600KiB".parse().unwrap();
    config.memory.chunk = Size::Bytes("32KiB".parse().unwrap());
    config
}

fn engine(mut config: Config) -> Engine {
    let (_, blocks) = build(&mut config, &Tokenizer::load("bytes").unwrap()).unwrap();
    Engine::new(config, blocks).unwrap()
}

fn batch(first: u32, micro_batches: usize) -> Batch {
    let input: Vec<u32> = (0..(SEQUENCES * SEQ_LEN) as u32).map(|position| (first + position * 7) % 251).collect();
    let target = input.iter().map(|token| (token + 7) % 251).collect();
    to_batch(&TokenBatch { sequences: SEQUENCES, seq_len: SEQ_LEN, input, target }, micro_batches).unwrap()
}

/// Losses of steps, then every state.
fn train(config: Config, look: bool) -> Vec<u64> {
    let mut engine = engine(config);
    let mut bits = Vec::new();
    for step in 0..6 {
        bits.push(engine.step(&batch(step, 2)).unwrap().loss.to_bits());
        if look {
            // Of another size too, and with updates still to come under the next forward.
            (0..2).for_each(|_| assert!(engine.evaluate(&batch(100, 4)).unwrap().is_finite()));
        }
    }
    for name in engine.parameter_names() {
        bits.extend(engine.parameter(&name).unwrap().iter().map(|value| u64::from(value.to_bits())));
        for kind in [Kind::Momentum, Kind::Variance] {
            let state = engine.optimizer_state(&name, kind).unwrap();
            bits.extend(state.iter().map(|value| u64::from(value.to_bits())));
        }
    }
    assert!(engine.runtime().stats().chunk_moves() > 0, "nothing travelled: the test shows nothing");
    bits
}

#[test]
fn linears_in_panels_train_in_chunks_smaller_than_a_matrix_with_the_same_bits() {
    let with = |chunk: &str, divide_above: usize| {
        let mut config = config(Precision::Bf16, 0.0);
        (config.model.hidden, config.model.divide_above) = (256, divide_above);
        config.memory.device = "24MiB".parse().unwrap();
        config.memory.chunk = Size::Bytes(chunk.parse().unwrap());
        let (_, blocks) = build(&mut config, &Tokenizer::load("bytes").unwrap()).unwrap();
        Engine::new(config, blocks)
    };
    let losses = |engine: Result<Engine, patrickstar::Error>| {
        let mut engine = engine.unwrap();
        (0..3).map(|step| engine.step(&batch(step, 2)).unwrap().loss.to_bits()).collect::<Vec<u64>>()
    };
    // The first matrix has 768 rows of 256, 384 KiB in 16 bits; panels have 128 rows, of 1024 at most.
    let error = with("288KiB", gpt2::DIVIDE_ABOVE).err().expect("a matrix does not fit into a chunk");
    assert!(error.to_string().contains("set the chunk size to at least 393216"), "{error}");
    assert_eq!(losses(with("288KiB", 8 << 10)), losses(with("576KiB", 8 << 10)));
}

#[test]
fn the_loss_is_that_which_a_step_begins_with() {
    let mut engine = engine(config(Precision::Bf16, 1.0));
    for step in 0..3 {
        let (batch, other) = (batch(step, 2), batch(step, 4));
        let before = engine.evaluate(&batch).unwrap();
        // Other parts, another order of sums, the same mean.
        assert!((engine.evaluate(&other).unwrap() - before).abs() < 1e-5);
        assert_eq!(engine.step(&batch).unwrap().loss.to_bits(), before.to_bits());
    }
}

#[test]
fn dropout_is_for_training_only() {
    let mut dropped = config(Precision::Fp32, 1.0);
    dropped.model.dropout = 0.5;
    let loss = engine(dropped).evaluate(&batch(0, 2)).unwrap();
    assert_eq!(loss.to_bits(), engine(config(Precision::Fp32, 1.0)).evaluate(&batch(0, 2)).unwrap().to_bits());
}

#[test]
fn looking_at_it_changes_no_bit_of_the_training() {
    for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp16] {
        // Groups that are stepped together under the next forward, and each as soon as it is reduced.
        for clip_norm in [1.0, 0.0] {
            let with_dropout = || {
                let mut config = config(precision, clip_norm);
                config.model.dropout = 0.1;
                config
            };
            assert!(train(with_dropout(), true) == train(with_dropout(), false), "{precision:?} {clip_norm}");
        }
    }
}

/// A run of the command: its lines, of which the last is the summary.
fn run(directory: &std::path::Path, name: &str, more: &[&str]) -> Vec<Value> {
    let data = directory.join("text.txt");
    std::fs::write(&data, "the quick brown fox jumps over the lazy dog. ".repeat(200)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_patrickstar"));
    command.args(["train", "--json"]);
    let sets = [
        format!("data.path={}", data.display()),
        format!("train.output={}", directory.join(name).display()),
        "train.steps=5".to_owned(),
        "train.batch=4".to_owned(),
        "train.seq_len=32".to_owned(),
        "model.hidden=32".to_owned(),
        "model.layers=2".to_owned(),
        "model.heads=2".to_owned(),
        "model.context=32".to_owned(),
        "memory.device=8MB".to_owned(),
        "train.log_every=1".to_owned(),
    ];
    for set in sets.iter().map(String::as_str).chain(more.iter().copied()) {
        command.args(["--set", set]);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_run_looks_every_so_many_steps_and_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let validation = directory.path().join("validation.txt");
    // Shorter than a sequence: it counts all the same.
    std::fs::write(&validation, "the lazy dog").unwrap();
    let path = format!("data.validation_path={}", validation.display());
    let looked = run(directory.path(), "looked", &[&path, "train.eval_every=2"]);
    let (summary, steps) = looked.split_last().unwrap();
    let found: Vec<u64> =
        steps.iter().filter(|line| line["valid_loss"].is_f64()).map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(found, [2, 4, 5]);
    assert_eq!(summary["valid_loss"], steps[4]["valid_loss"]);
    let plain = run(directory.path(), "plain", &[]);
    let losses = |lines: &[Value]| lines.iter().map(|line| line["loss"].as_f64().map(f64::to_bits)).collect::<Vec<_>>();
    assert_eq!(losses(&looked), losses(&plain));
    assert!(plain.last().unwrap()["valid_loss"].is_null());
}
