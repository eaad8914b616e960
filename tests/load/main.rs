//! What many clients cost a training, and how long they wait: 200 that poll a job once a second and 50 that follow its events,
//! against the same job alone, in turns.
//!
//! It takes minutes and wants a calm machine, so it runs when it is asked for, all built for speed: program and
//! clients share the machine.
//!
//! ```sh
//! cargo test --release --test load -- --ignored --nocapture
//! ```
//!
//! Speeds are printed beside their targets; what is asserted is that every answer came, and every step once.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test
#![allow(clippy::print_stdout)] // what it measures is what it prints

#[path = "../service/client.rs"]
#[allow(dead_code)] // helpers that other tests need
mod client;
mod crowd;

use std::time::{Duration, Instant};

use serde_json::json;

use client::Service;
use crowd::{Crowd, Heard};

/// Turns of each kind, and the length of one: a minute under load in all.
const TURNS: usize = 3;
const TURN: Duration = Duration::from_secs(20);
/// Before a turn is measured: caches are warm, streams have caught up.
const SETTLE: Duration = Duration::from_secs(2);
const POLLERS: usize = 200;
const STREAMS: usize = 50;

/// What a turn showed.
struct Turn {
    steps_per_second: f64,
    service_mib: f64,
}

fn measure(service: &Service, job: &str) -> Turn {
    std::thread::sleep(SETTLE);
    let step = || service.show(job)["patrickstar"]["step"].as_u64().unwrap();
    let (first, began) = (step(), Instant::now());
    std::thread::sleep(TURN);
    let steps = step() - first;
    Turn { steps_per_second: steps as f64 / began.elapsed().as_secs_f64(), service_mib: resident_mib(service.pid()) }
}

fn resident_mib(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
}

fn load_average() -> String {
    std::fs::read_to_string("/proc/loadavg").unwrap().split(' ').next().unwrap().to_owned()
}

fn quantile(sorted: &[Duration], share: f64) -> f64 {
    let index = ((sorted.len() - 1) as f64 * share).round() as usize;
    sorted[index].as_secs_f64() * 1e3
}

fn mean(turns: &[Turn]) -> f64 {
    turns.iter().map(|turn| turn.steps_per_second).sum::<f64>() / turns.len() as f64
}

#[test]
#[ignore = "takes minutes and wants a calm machine"]
fn many_clients_beside_one_training() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    println!("load average before the job: {}", load_average());
    // Steps of some tens of milliseconds: far shorter than those of models that are worth the trouble.
    let settings = json!({
        "train.steps": 1_000_000, "checkpoint.every": 500, "model.hidden": 128, "model.layers": 4, "model.heads": 4,
        "train.batch": 8, "memory.chunk": "512KiB",
    });
    let job = service.job(&service.training_file(), &settings);
    service.until_step(&job, 50);

    let (mut alone, mut together) = (Vec::new(), Vec::new());
    let mut heard = vec![Heard::default(); STREAMS];
    let mut waits = Vec::new();
    for turn in 0..TURNS {
        alone.push(measure(&service, &job));
        let crowd = Crowd::gather(&service.address, &job, POLLERS, heard);
        together.push(measure(&service, &job));
        let seen = crowd.dismiss();
        heard = seen.heard;
        waits.extend(seen.waits);
        let (without, with) = (&alone[turn], &together[turn]);
        println!(
            "turn {}: {:.2} steps/s alone, {:.2} with clients ({:+.1} %); service {:.1} and {:.1} MiB; load average {}",
            turn + 1,
            without.steps_per_second,
            with.steps_per_second,
            100.0 * (with.steps_per_second / without.steps_per_second - 1.0),
            without.service_mib,
            with.service_mib,
            load_average()
        );
    }
    waits.sort_unstable();
    println!("\n| what | figure | target |\n|---|---|---|");
    println!(
        "| training with {POLLERS} pollers and {STREAMS} streams, against alone | {:.3} | > 0.92 |",
        mean(&together) / mean(&alone)
    );
    println!("| GET of the job, median of {} | {:.1} ms | |", waits.len(), quantile(&waits, 0.5));
    println!("| GET of the job, 99th percentile | {:.1} ms | < 50 ms |", quantile(&waits, 0.99));
    let (first, last) = (together[0].service_mib, together[TURNS - 1].service_mib);
    println!(
        "| memory of the service, last turn against first | {:.3} ({first:.1} to {last:.1} MiB) | flat |",
        last / first
    );

    let expected = POLLERS * TURNS * (TURN.as_secs() as usize) * 9 / 10;
    assert!(waits.len() > expected, "{} answers of at least {expected}", waits.len());
    for stream in &heard {
        let steps = stream.steps.len() as u64;
        assert!(stream.steps.iter().copied().eq(1..=steps), "a stream lost a step or heard one twice");
        assert!(steps > 100, "a stream heard {steps} steps");
    }
}
