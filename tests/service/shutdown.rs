//! How the service ends when it is asked to.

use serde_json::json;

use crate::client::{Service, until};

#[test]
fn sigterm_saves_a_checkpoint_and_loses_no_step() {
    let data = tempfile::tempdir().unwrap();
    let mut service = Service::start(data.path());
    let file = service.training_file();
    let job = service.job(&file, &json!({ "train.steps": 400, "checkpoint.every": 0 }));
    service.until_step(&job, 20);
    assert_eq!(service.get("/readyz").status, 200);
    let workers = service.workers();
    service.terminate();
    assert_eq!(service.wait().code(), Some(0));
    assert!(workers.iter().all(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists()), "a worker is left");

    service.restart();
    let shown = service.show(&job);
    assert_eq!(shown["status"], "running", "{shown}");
    let checkpoints = service.get(&format!("/v1/fine_tuning/jobs/{job}/checkpoints")).ok();
    assert_eq!(checkpoints["data"][0]["step_number"], shown["patrickstar"]["step"]);
    service.until_status(&job, "succeeded");
    assert_eq!(service.losses(&job).len(), 400);
}

#[test]
fn a_second_sigterm_ends_it_at_once() {
    let data = tempfile::tempdir().unwrap();
    let mut service = Service::start(data.path());
    let job = service.job(&service.training_file(), &json!({ "train.steps": 1_000_000 }));
    service.until_step(&job, 1);
    let worker = service.workers()[0];
    // A stopped worker saves nothing: the service waits for it until it is told again.
    let signal = |name: &str| {
        assert!(std::process::Command::new("kill").args([name, &worker.to_string()]).status().unwrap().success());
    };
    signal("-STOP");
    service.terminate();
    until("readyz to refuse", || (service.get("/readyz").status == 503).then_some(()));
    service.upload("late.jsonl", "fine-tune", b"{}").error(503);
    assert_eq!(service.get("/livez").status, 200);
    service.terminate();
    assert_eq!(service.wait().code(), Some(143));
    signal("-CONT");
    until("the worker to leave by itself", || {
        let gone = !std::path::Path::new(&format!("/proc/{worker}")).exists();
        let zombie =
            std::fs::read_to_string(format!("/proc/{worker}/status")).is_ok_and(|text| text.contains("State:\tZ"));
        (gone || zombie).then_some(())
    });
}
