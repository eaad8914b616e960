//! `kill -9` of workers and of the service: every accepted job finishes with the bits of an undisturbed run.

use serde_json::json;

use crate::client::{Service, kill, until};

/// Long enough to be killed in the middle.
const STEPS: u64 = 300;

fn settings() -> serde_json::Value {
    json!({ "train.steps": STEPS, "checkpoint.every": 20, "model.dropout": 0.1 })
}

fn undisturbed(service: &Service, file: &str) -> Vec<(u64, u64)> {
    let job = service.job(file, &settings());
    service.until_status(&job, "succeeded");
    let losses = service.losses(&job);
    assert_eq!(losses.len() as u64, STEPS);
    losses
}

#[test]
fn a_worker_may_be_killed_at_any_time() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let file = service.training_file();
    let whole = undisturbed(&service, &file);
    let job = service.job(&file, &settings());
    for step in [1, 47, 110] {
        service.until_step(&job, step);
        let worker = until("a worker", || service.workers().first().copied());
        assert!(kill(worker));
        until("the death to be noticed", || (!service.workers().contains(&worker)).then_some(()));
    }
    let shown = service.until_status(&job, "succeeded");
    assert_eq!(service.losses(&job), whole);
    let deaths = service.events(&job).into_iter().filter(|event| event["level"] == "warn").count();
    assert!(deaths >= 2, "{deaths} deaths were told, {shown}");
}

#[test]
fn a_worker_that_always_dies_fails_its_job_with_the_reason() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start_with(data.path(), &["--max-restarts", "1"], None);
    let file = service.training_file();
    let job = service.job(&file, &json!({ "train.steps": 1_000_000, "checkpoint.every": 0 }));
    for _ in 0..2 {
        let worker = until("a worker", || service.workers().first().copied());
        assert!(kill(worker));
        until("its death", || (!service.workers().contains(&worker)).then_some(()));
    }
    let error = service.until_status(&job, "failed")["error"].clone();
    assert_eq!(error["code"], "worker_died");
    assert!(error["message"].as_str().unwrap().contains("signal: 9"), "{error}");
    // The next job is none the worse for it.
    let next = service.job(&file, &json!({ "train.steps": 2 }));
    service.until_status(&next, "succeeded");
}

#[test]
fn the_service_may_be_killed_at_any_time() {
    let data = tempfile::tempdir().unwrap();
    let mut service = Service::start(data.path());
    let file = service.training_file();
    let whole = undisturbed(&service, &file);
    let job = service.job(&file, &settings());
    let queued = service.job(&file, &json!({ "train.steps": 3 }));
    let mut seen = Vec::new();
    for step in [0, 30, 140] {
        service.until_step(&job, step);
        seen.extend(service.events(&job).into_iter().map(|event| event["id"].clone()));
        service.kill();
        service.restart();
    }
    service.until_status(&job, "succeeded");
    service.until_status(&queued, "succeeded");
    assert_eq!(service.losses(&job), whole);
    let kept: Vec<_> = service.events(&job).into_iter().map(|event| event["id"].clone()).collect();
    assert!(seen.iter().all(|id| kept.contains(id)), "an event that was seen is lost");
}
