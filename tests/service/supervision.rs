//! Workers that hang, jobs that make way, clients that are slow, and what systemd is told.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Service, until};
use crate::observe::narrow;

#[test]
fn a_worker_that_hangs_is_killed_and_its_job_goes_on() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start_with(data.path(), &["--hang-timeout", "3"], None);
    let file = service.training_file();
    let settings = json!({ "train.steps": 300, "checkpoint.every": 20, "model.dropout": 0.1 });
    let whole = service.job(&file, &settings);
    service.until_status(&whole, "succeeded");
    let job = service.job(&file, &settings);
    service.until_step(&job, 30);
    // It lives, and does nothing any more.
    let worker = service.workers()[0].to_string();
    assert!(Command::new("kill").args(["-s", "STOP", &worker]).status().unwrap().success());
    service.until_status(&job, "succeeded");
    let told = service.events(&job).iter().any(|event| {
        event["level"] == "warn"
            && event["message"].as_str().unwrap().contains("made no progress for 3 s and was killed")
    });
    assert!(told, "{:?}", service.events(&job));
    assert_eq!(service.losses(&job), service.losses(&whole));
}

#[test]
fn a_job_makes_way_for_a_more_important_one_and_keeps_its_bits() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let file = service.training_file();
    let settings = json!({ "train.steps": 400, "model.dropout": 0.1 });
    let whole = service.job(&file, &settings);
    service.until_status(&whole, "succeeded");
    let job = service.job(&file, &settings);
    service.until_step(&job, 10);
    let equal = service.job(&file, &json!({ "train.steps": 2 }));
    let urgent = service.job(&file, &json!({ "train.steps": 30, "priority": 7 }));
    let one_runs = || assert!(service.workers().len() <= 1, "two workers share a device");
    until("the urgent job", || {
        one_runs();
        (service.show(&urgent)["status"] == "succeeded").then_some(())
    });
    let shown = service.show(&job);
    assert!(shown["patrickstar"]["step"].as_u64() < Some(400), "it did not make way: {shown}");
    service.until_status(&job, "succeeded");
    service.until_status(&equal, "succeeded");
    let (first, second) = (&service.show(&job)["finished_at"], &service.show(&equal)["finished_at"]);
    assert!(first.as_i64() <= second.as_i64(), "one of equal priority came first");
    let told = |event: &Value| event["message"].as_str().unwrap().starts_with(&format!("Makes way for job {urgent}"));
    assert!(service.events(&job).iter().any(told));
    assert_eq!(service.losses(&job), service.losses(&whole));
}

#[test]
fn clients_that_are_too_slow_are_let_go() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let answer = |sent: String| {
        let address = service.address.clone();
        std::thread::spawn(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            stream.write_all(sent.as_bytes()).unwrap();
            let began = Instant::now();
            let mut whole = String::new();
            let _ = stream.read_to_string(&mut whole);
            (whole, began.elapsed())
        })
    };
    let head = format!(
        "POST /v1/fine_tuning/jobs HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\n",
        service.address
    );
    let (head_only, half_a_body) = (answer(head.clone()), answer(format!("{head}Content-Length: 1000\r\n\r\n{{")));
    for slow in [head_only, half_a_body] {
        let (text, time) = slow.join().unwrap();
        assert!(text.starts_with("HTTP/1.1 408"), "{text}");
        assert!(time > Duration::from_secs(3), "{time:?}: an honest client would have been cut off");
    }
    assert_eq!(service.get("/livez").status, 200);
}

#[test]
fn systemd_hears_of_start_life_and_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_patrickstar"))
        .args(["serve", "--listen", "127.0.0.1:0", "--data"])
        .arg(directory.path().join("data"))
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", "1500000")
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let hear = || {
        let mut bytes = [0; 256];
        let count = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..count]).trim().to_owned()
    };
    assert_eq!(hear(), "READY=1");
    assert_eq!((hear(), hear()), ("WATCHDOG=1".to_owned(), "WATCHDOG=1".to_owned()));
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    until("the end", || (hear() == "STOPPING=1").then_some(()));
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_running_job_is_traced() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let trace = |action: &str, body: Value| service.post(&format!("/v1/patrickstar/trace/{action}"), &body);
    assert!(trace("start", json!({})).error(400).contains("0 jobs run"));
    let job = service.job(&service.training_file(), &narrow(1_000_000));
    service.until_step(&job, 3);
    service.get("/v1/patrickstar/trace").error(404);
    let begun = trace("start", json!({ "job": job })).ok();
    assert_eq!((begun["job"].as_str(), begun["status"].as_str()), (Some(job.as_str()), Some("recording")));
    let step = service.show(&job)["patrickstar"]["step"].as_u64().unwrap();
    service.until_step(&job, step + 3);
    let ended = trace("stop", json!({})).ok();
    assert!(ended["spans"].as_u64() > Some(10) && ended["status"] == "ready", "{ended}");
    let whole = service.get(&format!("/v1/patrickstar/trace?job={job}")).ok();
    let events = whole["traceEvents"].as_array().unwrap();
    let spans = events.iter().filter(|event| event["ph"] == "X").count() as u64;
    assert_eq!(Some(spans), ended["spans"].as_u64());
    assert!(events.iter().any(|event| event["name"].as_str().is_some_and(|name| name.starts_with("forward"))));
    // Nothing is recorded any more.
    assert!(trace("stop", json!({ "job": job })).ok()["spans"].as_u64() < Some(10));
    trace("start", json!({ "job": "ftjob-000000000000000000000000" })).error(404);
}
