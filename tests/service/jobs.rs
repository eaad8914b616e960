//! The life of a job as a client sees it.

use std::io::{BufRead, BufReader};

use serde_json::{Value, json};

use crate::client::Service;

#[test]
fn a_job_goes_from_upload_to_result() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let file = service.training_file();
    let body = json!({
        "model": "gpt-tiny", "training_file": file, "suffix": "river", "metadata": { "team": "a" },
        "method": { "type": "supervised", "supervised": { "hyperparameters": { "n_epochs": 2 } } },
        "patrickstar": { "checkpoint": { "every": 5, "keep": 3 } },
    });
    let created = service.post("/v1/fine_tuning/jobs", &body).ok();
    assert_eq!(
        (created["object"].as_str(), created["status"].as_str()),
        (Some("fine_tuning.job"), Some("validating_files"))
    );
    let id = created["id"].as_str().unwrap();
    let job = service.until_status(id, "succeeded");
    let steps = job["patrickstar"]["total_steps"].as_u64().unwrap();
    // Two passes over 40 conversations of a hundred bytes, in batches of 256 tokens.
    assert!(steps > 20, "{job}");
    assert_eq!(job["trained_tokens"], steps * 256);
    assert!(job["finished_at"].as_i64() >= job["created_at"].as_i64());
    let model = job["fine_tuned_model"].as_str().unwrap();
    assert!(model.starts_with("ft:gpt-tiny:patrickstar:river:"), "{model}");
    assert_eq!(service.get(&format!("/v1/models/{model}")).ok()["owned_by"], id);

    let losses = service.losses(id);
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), (1..=steps).collect::<Vec<_>>());
    let (first, last) = (f64::from_bits(losses[0].1), f64::from_bits(losses[losses.len() - 1].1));
    assert!(last < first - 0.5, "{first} to {last}");

    let checkpoints = service.get(&format!("/v1/fine_tuning/jobs/{id}/checkpoints")).ok();
    let checkpoints = checkpoints["data"].as_array().unwrap();
    assert_eq!(checkpoints.len(), 3, "{checkpoints:?}");
    assert_eq!(checkpoints[0]["step_number"], steps);
    assert_eq!(checkpoints[0]["metrics"]["train_loss"].as_f64(), Some(last));

    let results = job["result_files"][0].as_str().unwrap();
    let table = service.get(&format!("/v1/files/{results}/content"));
    let table = String::from_utf8(table.body).unwrap();
    assert_eq!(table.lines().count() as u64, steps + 1);
    assert!(table.starts_with("step,train_loss,"), "{table}");
}

#[test]
fn a_validation_file_gives_losses_and_changes_no_bit() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let file = service.training_file();
    let settings = json!({ "train.steps": 12, "train.log_every": 100, "checkpoint.every": 5, "model.dropout": 0.1 });
    let body = |validation: Option<&str>| {
        json!({
            "model": "gpt-tiny", "training_file": file, "validation_file": validation, "seed": 5, "patrickstar": settings,
        })
    };
    let create = |body: &Value| service.post("/v1/fine_tuning/jobs", body).ok()["id"].as_str().unwrap().to_owned();
    let (plain, validated) = (create(&body(None)), create(&body(Some(&file))));
    assert_eq!(service.show(&validated)["validation_file"], file.as_str());
    service.request("DELETE", &format!("/v1/files/{file}"), &[], b"").error(400);
    let job = service.until_status(&validated, "succeeded");
    service.until_status(&plain, "succeeded");

    let events = service.get(&format!("/v1/fine_tuning/jobs/{validated}/events?limit=100")).ok();
    let mut found: Vec<(u64, f64)> = events["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|event| Some((event["data"]["step"].as_u64()?, event["data"]["valid_loss"].as_f64()?)))
        .collect();
    found.sort_by_key(|(step, _)| *step);
    // As often as checkpoints, and at the end, whatever else is logged.
    assert_eq!(found.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [5, 10, 12]);
    assert!(found.windows(2).all(|pair| pair[1].1 < pair[0].1), "{found:?}");
    let checkpoints = service.get(&format!("/v1/fine_tuning/jobs/{validated}/checkpoints")).ok();
    for checkpoint in checkpoints["data"].as_array().unwrap() {
        let step = checkpoint["step_number"].as_u64().unwrap();
        let (_, loss) = found.iter().find(|(of, _)| *of == step).unwrap();
        assert_eq!(checkpoint["metrics"]["valid_loss"].as_f64(), Some(*loss), "{checkpoint}");
    }
    let results = job["result_files"][0].as_str().unwrap();
    let table = String::from_utf8(service.get(&format!("/v1/files/{results}/content")).body).unwrap();
    let last = table.lines().last().unwrap();
    assert!(last.starts_with("12,") && last.ends_with(&format!(",,{},", found[2].1)), "{table}");

    let losses = |job: &str| {
        let all = service.losses(job);
        all.into_iter().filter(|(step, _)| [1, 12].contains(step)).collect::<Vec<_>>()
    };
    assert_eq!(losses(&plain), losses(&validated));

    let unknown = body(Some("file-000000000000000000000000"));
    let refused = service.post("/v1/fine_tuning/jobs", &unknown).error(400);
    assert!(refused.contains("no such file to train on"), "{refused}");
}

#[test]
fn lists_are_paged_and_filtered() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let file = service.training_file();
    let mut ids: Vec<String> = Vec::new();
    for index in 0..5 {
        let body = json!({
            "model": "gpt-tiny", "training_file": file, "patrickstar": { "train.steps": 2 },
            "metadata": if index % 2 == 0 { json!({ "team": "a" }) } else { json!({}) },
        });
        ids.push(service.post("/v1/fine_tuning/jobs", &body).ok()["id"].as_str().unwrap().to_owned());
    }
    ids.reverse();
    let page = service.get("/v1/fine_tuning/jobs?limit=2").ok();
    assert_eq!((page["has_more"].as_bool(), page["last_id"].as_str()), (Some(true), Some(ids[1].as_str())));
    let rest = service.get(&format!("/v1/fine_tuning/jobs?limit=3&after={}", ids[1])).ok();
    let rest_ids: Vec<&str> = rest["data"].as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap()).collect();
    assert_eq!((rest_ids, rest["has_more"].as_bool()), (ids[2..].iter().map(String::as_str).collect(), Some(false)));
    assert_eq!(service.get("/v1/fine_tuning/jobs?metadata%5Bteam%5D=a").ok()["data"].as_array().unwrap().len(), 3);
    assert_eq!(service.get("/v1/fine_tuning/jobs?metadata=null").ok()["data"].as_array().unwrap().len(), 2);
    for bad in ["after=ftjob-0", "after=ftjob-000000000000000000000000", "limit=0", "limit=x", "limit=101"] {
        service.get(&format!("/v1/fine_tuning/jobs?{bad}")).error(400);
    }
    // First come, first served.
    for id in &ids {
        service.until_status(id, "succeeded");
    }
    let starts: Vec<i64> = ids.iter().map(|id| service.show(id)["finished_at"].as_i64().unwrap()).collect();
    assert!(starts.is_sorted_by(|a, b| a >= b), "{starts:?}");
}

#[test]
fn pause_and_resume_change_no_bit() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let file = service.training_file();
    let settings = json!({ "train.steps": 300, "model.dropout": 0.1 });
    let whole = service.job(&file, &settings);
    service.until_status(&whole, "succeeded");

    let paused = service.job(&file, &settings);
    service.until_step(&paused, 10);
    assert_eq!(service.order(&paused, "pause").ok()["status"], "paused");
    service.order(&paused, "pause").error(400);
    // Another job may use the device meanwhile.
    let other = service.job(&file, &json!({ "train.steps": 2 }));
    service.until_status(&other, "succeeded");
    let shown = service.show(&paused);
    assert_eq!(shown["status"], "paused");
    assert!(shown["patrickstar"]["step"].as_u64() < Some(300), "{shown}");
    assert!(service.order(&paused, "resume").ok()["status"] == "queued");
    service.until_status(&paused, "succeeded");
    assert_eq!(service.losses(&paused), service.losses(&whole));
}

#[test]
fn a_cancelled_job_ends_and_stays_so() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let file = service.training_file();
    let running = service.job(&file, &json!({ "train.steps": 1_000_000 }));
    let waiting = service.job(&file, &json!({ "train.steps": 1_000_000 }));
    let last = service.job(&file, &json!({ "train.steps": 2, "priority": -1 }));
    service.until_step(&running, 3);
    assert_eq!(service.request("DELETE", &format!("/v1/files/{file}"), &[], b"").status, 400);
    for job in [&waiting, &running] {
        assert_eq!(service.order(job, "cancel").ok()["status"], "cancelled");
        assert!(service.order(job, "cancel").error(400).contains("is cancelled"));
        service.order(job, "resume").error(400);
    }
    service.until_status(&last, "succeeded");
    assert_eq!(service.show(&running)["status"], "cancelled");
    assert_eq!(service.show(&waiting)["patrickstar"]["step"], 0);
    assert_eq!(service.request("DELETE", &format!("/v1/files/{file}"), &[], b"").ok()["deleted"], true);
    service.get(&format!("/v1/files/{file}")).error(404);
}

#[test]
fn a_bad_file_fails_its_job_with_the_line() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let good = json!({ "prompt": "2+2=", "completion": "4" }).to_string();
    let file = service.upload("bad.jsonl", "fine-tune", format!("{good}\n{{\"prompt\": 1}}\n").as_bytes()).ok();
    let job = service.job(file["id"].as_str().unwrap(), &json!({}));
    let error = service.until_status(&job, "failed")["error"].clone();
    assert_eq!(error["code"], "invalid_training_file");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("line 2") && !message.contains(data.path().to_str().unwrap()), "{message}");
    let large = service.job(&service.training_file(), &json!({ "memory": { "device": "100KB", "chunk": "64KiB" } }));
    let error = service.until_status(&large, "failed")["error"].clone();
    assert_eq!(error["code"], "insufficient_memory");
    assert!(error["message"].as_str().unwrap().contains("memory.device"), "{error}");
}

#[test]
fn a_plan_says_whether_it_fits() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let plan = |body: Value| service.post("/v1/patrickstar/plan", &body);
    let fits = plan(json!({ "model": "gpt-tiny" })).ok();
    assert_eq!((fits["fits"].as_bool(), fits["problems"].as_array().map(Vec::len)), (Some(true), Some(0)));
    assert!(fits["parameters"].as_u64() > Some(10_000), "{fits}");
    let too_small = plan(json!({ "model": "gpt-tiny", "patrickstar": { "memory.device": "70KB" } })).ok();
    assert_eq!(too_small["fits"], false);
    assert!(too_small["problems"][0].as_str().unwrap().contains("memory.device"), "{too_small}");
    let unknown = plan(json!({ "model": "gpt-tiny", "patrickstar": { "memory": { "devise": 1 } } }));
    assert!(unknown.error(400).contains("did you mean `memory.device`"));
}

#[test]
fn a_stream_goes_on_where_it_was_cut() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let job = service.job(&service.training_file(), &json!({ "train.steps": 60 }));
    let path = format!("/v1/patrickstar/jobs/{job}/stream");
    // Followed live, cut off, and followed to the end.
    let mut ids = Vec::new();
    let live = BufReader::new(service.send("GET", &path, &[], b"").unwrap());
    for line in live.lines().map(Result::unwrap) {
        ids.extend(line.strip_prefix("id: ").map(str::to_owned));
        if ids.len() >= 7 {
            break;
        }
    }
    let last = ids.last().unwrap().clone();
    let rest = service.request("GET", &path, &[("Last-Event-ID", &last)], b"");
    assert!(rest.head.contains("text/event-stream"), "{}", rest.head);
    let text = String::from_utf8(rest.body).unwrap();
    ids.extend(text.lines().filter_map(|line| line.strip_prefix("id: ").map(str::to_owned)));
    assert!(text.contains("event: end\n"), "{text}");
    assert_eq!(ids.len(), service.events(&job).len());
    let numbers: Vec<u64> = ids.iter().map(|id| id.parse().unwrap()).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    service.request("GET", &path, &[("Last-Event-ID", "x")], b"").error(400);
}
