//! What can be seen of a running job: its chunks and its actors.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::client::{Service, until};

/// Narrow, so that chunks have to move.
pub fn narrow(steps: u64) -> Value {
    json!({
        "train.steps": steps, "train.recompute": "full", "train.micro_batches": 2, "train.seq_len": 32, "model.context": 32, "memory.device": "2600KiB", "memory.chunk": "32KiB",
    })
}

fn chunk_map(service: &Service, job: &str) -> Value {
    let path = format!("/v1/patrickstar/jobs/{job}/chunks");
    // A worker that is still being set up says so.
    until("a chunk map", || Some(service.get(&path)).filter(|answer| answer.status != 503)).ok()
}

#[test]
fn chunks_of_a_running_job_are_seen_where_they_are() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let job = service.job(&service.training_file(), &narrow(1_000_000));
    service.until_step(&job, 3);
    let map = chunk_map(&service, &job);
    assert_eq!((map["object"].as_str(), map["job"].as_str()), (Some("chunk_map"), Some(job.as_str())));
    assert!(map["step"].as_u64() >= Some(3), "{map}");
    let tiers = map["tiers"].as_array().unwrap();
    assert_eq!(tiers.iter().map(|tier| tier["tier"].as_str().unwrap()).collect::<Vec<_>>(), ["device", "host", "disk"]);
    for tier in tiers {
        assert!(tier["used_bytes"].as_u64() <= tier["capacity_bytes"].as_u64(), "{tier}");
    }
    let chunks = map["chunks"].as_array().unwrap();
    let kinds: HashSet<&str> = chunks.iter().map(|chunk| chunk["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, HashSet::from(["weight", "momentum", "variance", "gradient"]));
    let states = ["free", "compute", "hold", "hold_after_forward", "hold_after_backward", "move", "released"];
    assert!(chunks.iter().all(|chunk| states.contains(&chunk["state"].as_str().unwrap())), "{map}");
    // Whatever lies in a tier has a slot there; some chunks have one in two.
    for tier in tiers {
        let here = chunks.iter().filter(|chunk| chunk["tier"] == tier["tier"]).count() as u64;
        assert!(here * 32_768 <= tier["used_bytes"].as_u64().unwrap(), "{tier}: {here} chunks");
    }
    assert!(chunks.iter().any(|chunk| chunk["tier"] == "device") && chunks.iter().any(|chunk| chunk["tier"] == "host"));
    until("the map to change", || (chunk_map(&service, &job)["chunks"] != map["chunks"]).then_some(()));

    service.order(&job, "pause").ok();
    let path = format!("/v1/patrickstar/jobs/{job}/chunks");
    until("the worker to leave", || (service.get(&path).status == 400).then_some(()));
    assert!(service.get(&path).error(400).contains("does not run"));
    service.get("/v1/patrickstar/jobs/ftjob-000000000000000000000000/chunks").error(404);
}

#[test]
fn actors_of_all_running_jobs_are_listed() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let list = || service.get("/v1/patrickstar/actors").ok()["data"].as_array().unwrap().clone();
    let alone = list();
    assert_eq!(alone.len(), 1, "{alone:?}");
    assert_eq!((alone[0]["name"].as_str(), alone[0]["job"].is_null()), (Some("supervisor"), true));
    let job = service.job(&service.training_file(), &narrow(1_000_000));
    service.until_step(&job, 3);
    let actors = until("actors of the job", || Some(list()).filter(|actors| actors.len() > 1));
    let names: Vec<&str> =
        actors.iter().filter(|actor| actor["job"] == job).map(|actor| actor["name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 8, "{names:?}");
    let eviction = actors.iter().find(|actor| actor["name"] == "eviction").unwrap();
    assert_eq!((eviction["state"].as_str(), eviction["restarts"].as_u64()), (Some("running"), Some(0)));
    assert!(eviction["processed"].as_u64() > Some(0) && eviction["mailbox"].is_u64(), "{eviction}");
    let supervisor = actors.iter().find(|actor| actor["name"] == "supervisor").unwrap();
    assert!(supervisor["processed"].as_u64() > Some(0), "{supervisor}");
}

/// The value of a series of the service's `/metrics`; `None` where it is absent.
fn metric(service: &Service, series: &str) -> Option<f64> {
    let answer = service.get("/metrics");
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    let line = text.lines().find(|line| line.starts_with(series))?;
    line.rsplit_once(' ').and_then(|(_, value)| value.parse().ok())
}

#[test]
fn a_running_job_says_when_it_will_be_done_and_an_ended_one_is_counted() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let ended = |outcome: &str| {
        metric(&service, &format!("patrickstar_service_jobs_finished_total{{outcome=\"{outcome}\"}}")).unwrap()
    };
    assert_eq!(["succeeded", "failed", "cancelled"].map(ended), [0.0; 3]);
    let job = service.job(&service.training_file(), &narrow(1_000_000));
    service.until_step(&job, 3);
    let path = format!("/v1/fine_tuning/jobs/{job}");
    let finish = until("an estimate", || service.get(&path).ok()["estimated_finish"].as_i64());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    assert!(finish > now, "a million steps are not done at {finish}, now is {now}");
    let of_job = format!("job_id=\"{job}\"");
    let progress = format!("patrickstar_job_progress_ratio{{{of_job}}}");
    let share = until("the worker's metrics", || metric(&service, &progress));
    assert!(share > 0.0 && share < 0.1, "{share}");
    // The request that asks is one of them.
    assert!(metric(&service, "patrickstar_service_http_requests_in_flight") >= Some(1.0));

    service.order(&job, "cancel").ok();
    until("the worker to leave", || metric(&service, &progress).is_none().then_some(()));
    assert_eq!(["succeeded", "failed", "cancelled"].map(ended), [0.0, 0.0, 1.0]);
    assert!(service.get(&path).ok()["estimated_finish"].is_null(), "it does not run any more");
    let short = service.job(&service.training_file(), &narrow(2));
    service.until_status(&short, "succeeded");
    assert_eq!(ended("succeeded"), 1.0);
}
