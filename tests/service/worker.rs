//! A worker alone, with the test in the place of the service.

use std::io::{BufRead, BufReader, Lines, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use patrickstar::Config;
use patrickstar::config::{Placement, Policy};
use patrickstar::service::worker::protocol::{FromWorker, Policies, ToWorker};

struct Worker {
    child: Child,
    to: UnixStream,
    from: Lines<BufReader<UnixStream>>,
}

fn config(directory: &Path, output: &str) -> Config {
    let mut config = Config::default();
    let model = &mut config.model;
    (model.hidden, model.layers, model.heads, model.context, model.dropout) = (32, 3, 2, 32, 0.1);
    let train = &mut config.train;
    (train.steps, train.batch, train.seq_len) = (120, 4, 32);
    train.output = directory.join(output);
    config.data.path = directory.join("text.txt");
    config.checkpoint.every = 30;
    // Narrow, so that chunks have to move and policies matter.
    config.memory.device = "3MB".parse().unwrap();
    config.memory.chunk = "32KiB".parse().unwrap();
    std::fs::write(&config.data.path, "pack my box with five dozen liquor jugs. ".repeat(100)).unwrap();
    config
}

impl Worker {
    fn start(config: &Config) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_patrickstar"));
        let child = command.arg("worker").stdin(Stdio::from(OwnedFd::from(theirs))).spawn().unwrap();
        // The command still holds the worker's end.
        drop(command);
        let from = BufReader::new(ours.try_clone().unwrap()).lines();
        let mut worker = Worker { child, to: ours, from };
        worker.tell(&ToWorker::Start { config: Box::new(config.clone()) });
        worker
    }

    fn tell(&mut self, message: &ToWorker) {
        writeln!(self.to, "{}", serde_json::to_string(message).unwrap()).unwrap();
    }

    /// Follows to the worker's last word, acknowledging its steps; `at` may speak up after each of them.
    fn follow(mut self, losses: &mut Vec<(u64, u64)>, at: impl Fn(u64) -> Option<ToWorker>) -> FromWorker {
        loop {
            let line = self.from.next().expect("a last word").unwrap();
            let message: FromWorker = serde_json::from_str(&line).unwrap();
            if let FromWorker::Step(metrics) = &message {
                losses.push((metrics.step, metrics.train_loss.to_bits()));
                self.tell(&ToWorker::Stored { step: metrics.step });
                if let Some(order) = at(metrics.step) {
                    self.tell(&order);
                }
            }
            if message.is_last() {
                assert!(self.child.wait().unwrap().success());
                return message;
            }
        }
    }
}

#[test]
fn pausing_and_retuning_change_no_bit() {
    let directory = tempfile::tempdir().unwrap();
    let mut whole = Vec::new();
    let last = Worker::start(&config(directory.path(), "whole")).follow(&mut whole, |_| None);
    assert_eq!(last, FromWorker::Finished { step: 120 });

    let config = config(directory.path(), "parts");
    let mut parts = Vec::new();
    let orders = |step| match step {
        5 => Some(ToWorker::Retune(Policies { policy: Some(Policy::Lru), prefetch: Some(0), ..Policies::default() })),
        15 => Some(ToWorker::Retune(Policies {
            policy: Some(Policy::Opt),
            prefetch: Some(4),
            device: Some(3_800_000),
            headroom: Some(0.1),
            placement: Some(Placement::Host),
            ..Policies::default()
        })),
        40 => Some(ToWorker::Pause),
        _ => None,
    };
    let paused = Worker::start(&config).follow(&mut parts, orders);
    assert!(matches!(paused, FromWorker::Paused { step } if (40..120).contains(&step)), "{paused:?}");
    assert_eq!(Worker::start(&config).follow(&mut parts, |_| None), FromWorker::Finished { step: 120 });
    assert_eq!(parts, whole);
}

#[test]
fn a_checkpoint_holds_only_steps_that_the_service_has_stored() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path(), "run");
    let mut worker = Worker::start(&config);
    // Nothing is acknowledged: the worker waits at its first checkpoint and ends with the service.
    let mut steps = 0;
    while steps < 30 {
        let line = worker.from.next().unwrap().unwrap();
        steps += u64::from(matches!(serde_json::from_str(&line).unwrap(), FromWorker::Step(_)));
    }
    worker.to.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(worker.child.wait().unwrap().success());
    let saved = std::fs::read_dir(config.train.output.join("checkpoints")).map_or(0, Iterator::count);
    assert_eq!(saved, 0);
}

#[test]
fn what_a_caller_caused_is_not_worth_a_retry() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(directory.path(), "run");
    config.data.path = directory.path().join("nowhere.jsonl");
    let last = Worker::start(&config).follow(&mut Vec::new(), |_| None);
    let FromWorker::Failed { code, retry, .. } = last else { panic!("{last:?}") };
    assert_eq!((code.as_str(), retry), ("invalid_training_file", false));
    let alone = Command::new(env!("CARGO_BIN_EXE_patrickstar")).arg("worker").stdin(Stdio::null()).output().unwrap();
    assert!(String::from_utf8_lossy(&alone.stderr).contains("patrickstar serve"));
}
