//! The configuration changes while the service runs and a job trains.

use serde_json::{Value, json};

use crate::client::{Service, until};
use crate::observe::narrow;

fn config(service: &Service) -> Value {
    service.get("/v1/patrickstar/config").ok()
}

fn put(service: &Service, body: &Value) -> crate::client::Answer {
    let headers = [("Content-Type", "application/json")];
    service.request("PUT", "/v1/patrickstar/config", &headers, body.to_string().as_bytes())
}

fn set(service: &Service, key: &str, value: Value) -> Value {
    put(service, &json!({ "set": { key: value } })).ok()
}

fn messages(service: &Service, job: &str) -> Vec<String> {
    service.events(job).iter().map(|event| event["message"].as_str().unwrap().to_owned()).collect()
}

fn until_told(service: &Service, job: &str, told: &str) {
    until(told, || messages(service, job).iter().any(|message| message.contains(told)).then_some(()));
}

#[test]
fn retuning_a_running_job_changes_no_bit() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let file = service.training_file();
    let mut settings = narrow(600);
    settings["memory.device"] = json!("3200KiB");
    // Room for groups that leave the device: host memory is taken once, for those that did not live there at first.
    settings["memory.disk"] = json!("1MiB");
    let whole = service.job(&file, &settings);
    service.until_status(&whole, "succeeded");

    let job = service.job(&file, &settings);
    let waiting = service.job(&file, &json!({ "train.steps": 3 }));
    service.until_step(&job, 5);
    let changes = json!({ "set": {
        "actors.eviction": { "policy": "lru", "prefetch": 0 }, "memory.device": "2900KiB",
    } });
    let changed = put(&service, &changes).ok();
    assert_eq!(changed["applied"].as_array().map(Vec::len), Some(3), "{changed}");
    assert_eq!(changed["needs_restart"], json!([]));
    until_told(&service, &job, "memory.device is");
    // Too little for any step: the job says so and goes on as it is.
    set(&service, "memory.device", json!("300KiB"));
    until_told(&service, &job, "memory.device of at least");
    let restart = set(&service, "train.lr", json!(0.5));
    assert_eq!(restart["needs_restart"], json!(["train.lr"]));
    service.until_status(&job, "succeeded");
    assert_eq!(service.losses(&job), service.losses(&whole));
    service.until_status(&waiting, "succeeded");
    // It was created before the changes, and was told of them when it began.
    assert!(messages(&service, &waiting).contains(&"actors.eviction.policy is lru".to_owned()));
}

#[test]
fn a_wrong_configuration_changes_nothing() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let before = config(&service);
    assert_eq!((before["object"].as_str(), before["source"].is_null()), (Some("config"), true));
    assert!(before["live"].as_array().unwrap().contains(&json!("memory.device")));
    for (body, named) in [
        (json!({ "set": { "train.lr": 0.1, "train.batch": 0 } }), "train.batch"),
        (json!({ "set": { "actors.eviction.polcy": "lru" } }), "actors.eviction.policy"),
        (json!({ "memory": { "device": "12 parsecs" } }), "12 parsecs"),
        (json!([]), "JSON object"),
    ] {
        assert!(put(&service, &body).error(400).contains(named), "{body}");
    }
    assert_eq!(config(&service), before);
    // A whole one, with a change, and back to the defaults.
    let mut whole = before["config"].clone();
    whole["train"]["steps"] = json!(9);
    assert_eq!(put(&service, &whole).ok()["needs_restart"], json!(["train.steps"]));
    let job = service.job(&service.training_file(), &json!({}));
    assert_eq!(service.until_status(&job, "succeeded")["patrickstar"]["total_steps"], 9);
    assert_eq!(put(&service, &json!({})).ok()["needs_restart"], json!(["train.steps"]));
    assert_eq!(config(&service), before);
    service.job(&service.training_file(), &json!({ "train.steps": 1 }));
    let body = json!({ "model": "gpt-tiny", "training_file": service.training_file(),
        "patrickstar": { "service": { "log_level": "trace" } } });
    assert!(service.post("/v1/fine_tuning/jobs", &body).error(400).contains("service.log_level"));
}

#[test]
fn the_file_is_read_again_when_it_changes_and_at_sighup() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("base.toml");
    let write = |text: &str| std::fs::write(&file, text).unwrap();
    write("[actors.eviction]\nprefetch = 3\n");
    let prefetch = |service: &Service| config(service)["config"]["actors"]["eviction"]["prefetch"].as_u64().unwrap();
    let path = file.to_str().unwrap();
    for arguments in [vec![path], vec![path, "--watch-config"]] {
        write("[actors.eviction]\nprefetch = 3\n");
        let watches = arguments.len() > 1;
        let service = Service::start_with(&data.path().join(format!("data-{watches}")), &arguments, None);
        let again = |text: &str| {
            write(text);
            if !watches {
                service.signal("HUP");
            }
        };
        assert_eq!((prefetch(&service), config(&service)["source"].as_str()), (3, Some(path)));
        again("[actors.eviction]\nprefetch = 5\n");
        until("the new configuration", || (prefetch(&service) == 5).then_some(()));
        again("[actors.eviction]\nprefetch = \"many\"\n");
        again("[actors.eviction]\nprefetch = 6\n");
        until("the next configuration", || (prefetch(&service) == 6).then_some(()));
    }
}

#[test]
fn too_many_requests_are_refused_until_the_limit_is_raised() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let refused = || {
        let answers = (0..30).map(|_| service.get("/v1/models"));
        answers.filter(|answer| answer.status == 429).collect::<Vec<_>>()
    };
    assert!(refused().is_empty());
    set(&service, "service.requests_per_second", json!(5));
    let answers = refused();
    assert!((10..=25).contains(&answers.len()), "{} of 30", answers.len());
    assert!(answers[0].head.to_lowercase().contains("retry-after: 1"), "{}", answers[0].head);
    assert_eq!(answers[0].json()["error"]["code"], "rate_limit_exceeded");
    assert_eq!(service.get("/livez").status, 200);
    until("a request to pass", || {
        Some(put(&service, &json!({ "set": { "service.requests_per_second": 0 } })))
            .filter(|answer| answer.status == 200)
    });
    assert!(refused().is_empty());
}
