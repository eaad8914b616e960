//! `kill -9` at random instants: a resumed run ends in the same bits as an uninterrupted one.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

const STEPS: u64 = 40;

fn command(directory: &Path, output: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_patrickstar"));
    let text = directory.join("text.txt");
    for pair in [
        "model.hidden=32".to_owned(),
        "model.layers=2".into(),
        "model.heads=2".into(),
        "model.context=32".into(),
        "memory.device=3MB".into(),
        "memory.chunk=32KiB".into(),
        format!("train.steps={STEPS}"),
        "train.batch=4".into(),
        "train.seq_len=32".into(),
        "train.micro_batches=1".into(),
        "model.dropout=0.1".into(),
        "checkpoint.every=2".into(),
        "checkpoint.keep=2".into(),
        format!("data.path={}", text.display()),
        format!("train.output={}", directory.join(output).display()),
        "train.sample_tokens=0".into(),
    ] {
        command.args(["--set", &pair]);
    }
    let mut train = Command::new(command.get_program());
    train.arg("train").args(command.get_args()).args(["--resume", "--json"]);
    train.stderr(Stdio::piped()).stdout(Stdio::piped());
    train
}

/// Weights and optimizer states: every group file of the last checkpoint.
fn states(directory: &Path, output: &str) -> Vec<(String, Vec<u8>)> {
    let last = directory.join(output).join(format!("checkpoints/step-{STEPS:06}"));
    let mut files: Vec<_> = std::fs::read_dir(last)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn twenty_kills_cost_no_bit() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("text.txt"), "pack my box with five dozen liquor jugs. ".repeat(300)).unwrap();
    let whole = command(directory.path(), "whole").output().unwrap();
    assert!(whole.status.success());
    let began = std::time::Instant::now();
    assert!(command(directory.path(), "timed").output().unwrap().status.success());
    let mut run = began.elapsed();

    let mut kills = 0;
    let mut round = 0u32;
    // A run that got through is started over: the instants must hit all phases, start-up and saving too.
    while kills < 20 {
        let mut child =
            command(directory.path(), "killed").stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        // Fractions of the golden ratio spread over the run without repeating.
        let fraction = (f64::from(round) * 0.618_033_988_75).fract();
        std::thread::sleep(Duration::from_secs_f64(run.as_secs_f64() * fraction * 0.6));
        child.kill().unwrap();
        if child.wait().unwrap().code().is_none() {
            kills += 1;
        } else {
            // Got through: the machine was busier when the run was timed.
            run = run.mul_f64(0.9);
        }
        round += 1;
        assert!(round < 200, "only {kills} of {round} runs could be killed in time");
        if round.is_multiple_of(7) {
            let finish = command(directory.path(), "killed").output().unwrap();
            assert!(finish.status.success(), "{}", String::from_utf8_lossy(&finish.stderr));
            let line = String::from_utf8_lossy(&finish.stdout).lines().last().unwrap_or_default().to_owned();
            let summary: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(summary["steps"], STEPS);
            assert!(states(directory.path(), "killed") == states(directory.path(), "whole"), "after {kills} kills");
            std::fs::remove_dir_all(directory.path().join("killed")).unwrap();
        }
    }
}
