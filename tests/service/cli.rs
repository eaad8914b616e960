//! The commands that speak to a service: `submit` and `jobs`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};

use crate::client::Service;

fn command(service: &Service, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_patrickstar"));
    command.args(arguments).env("PATRICKSTAR_URL", format!("http://{}", service.address));
    command.env_remove("PATRICKSTAR_TOKEN").stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn patrickstar(service: &Service, arguments: &[&str]) -> Output {
    command(service, arguments).output().unwrap()
}

fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A configuration as `train` takes it, with its text beside it.
fn config(directory: &Path) -> PathBuf {
    let text = directory.join("text.txt");
    std::fs::write(&text, "what flows down comes up again, \"in time\".\n".repeat(200)).unwrap();
    let path = directory.join("small.toml");
    let settings = format!(
        "[model]\nhidden = 32\nlayers = 2\nheads = 2\ncontext = 32\n[memory]\ndevice = \"3MB\"\nchunk = \"32KiB\"\n\
         [train]\nsteps = 12\nbatch = 4\nseq_len = 32\nseed = 3\nlog_every = 1\noutput = \"{}\"\n[data]\npath = \"{}\"\n",
        directory.join("run").display(),
        text.display()
    );
    std::fs::write(&path, settings).unwrap();
    path
}

#[test]
fn a_submitted_configuration_trains_as_it_would_at_home() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let config = config(data.path());
    let config = config.to_str().unwrap();
    let home = patrickstar(&service, &["train", config, "--json"]);
    assert!(home.status.success(), "{}", said(&home));
    let at_home: Vec<u64> = lines(&home).iter().filter_map(|line| Some(line["loss"].as_f64()?.to_bits())).collect();
    assert_eq!(at_home.len(), 12);

    let away = patrickstar(&service, &["submit", config, "--wait", "--json", "--suffix", "home", "--priority", "-2"]);
    assert!(away.status.success(), "{}", said(&away));
    let heard = lines(&away);
    let job = heard.last().unwrap();
    assert_eq!((job["status"].as_str(), job["model"].as_str()), (Some("succeeded"), Some("gpt2")));
    assert_eq!(job["patrickstar"]["priority"], -2);
    let losses: Vec<u64> =
        heard.iter().filter_map(|event| Some(event["data"]["train_loss"].as_f64()?.to_bits())).collect();
    assert_eq!(losses, at_home);
    assert_eq!(heard.len() - 1, service.events(job["id"].as_str().unwrap()).len());
    assert!(said(&away).contains("left to the service: train.output"), "{}", said(&away));
}

#[test]
fn jobs_are_listed_shown_and_ordered_about() {
    let data = tempfile::tempdir().unwrap();
    let token = "a token of sixteen".replace(' ', "-");
    let service = Service::start_with(data.path(), &[], Some(&token));
    let secret = data.path().join("secret");
    std::fs::write(&secret, format!("{token}\n")).unwrap();
    let secret = secret.to_str().unwrap();
    let with_token = |arguments: &[&str]| patrickstar(&service, &[arguments, &["--token-file", secret]].concat());
    let text = data.path().join("a.jsonl");
    std::fs::write(&text, "{\"prompt\": \"what\", \"completion\": \"that\"}\n".repeat(100)).unwrap();
    let text = text.to_str().unwrap();
    let created =
        with_token(&["submit", "--model", "gpt-tiny", "--data", text, text, "--set", "train.steps=1000000", "--json"]);
    let id = lines(&created)[0]["id"].as_str().unwrap().to_owned();
    service.until_step(&id, 2);
    assert!(String::from_utf8_lossy(&with_token(&["jobs", "list"]).stdout).contains(&id));
    assert_eq!(lines(&with_token(&["jobs", "list", "--json"]))[0]["data"][0]["id"], id.as_str());
    let shown = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(shown(&with_token(&["jobs", "pause", &id])).starts_with(&format!("{id} paused\n")));
    assert_eq!(lines(&with_token(&["jobs", "resume", &id, "--json"]))[0]["status"], "queued");
    assert!(shown(&with_token(&["jobs", "show", &id])).contains("/1000000"));

    let watcher = command(&service, &["jobs", "watch", &id, "--token-file", secret]).spawn().unwrap();
    assert!(shown(&with_token(&["jobs", "cancel", &id])).contains("cancelled"));
    let watched = watcher.wait_with_output().unwrap();
    assert_eq!(watched.status.code(), Some(4), "{}", said(&watched));
    assert!(said(&watched).contains(&format!("error: job {id} was cancelled")), "{}", said(&watched));

    let refused = patrickstar(&service, &["jobs", "list"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("give a valid token") && said(&refused).lines().count() == 1, "{}", said(&refused));
    let again = with_token(&["jobs", "resume", &id]);
    assert!(!again.status.success() && said(&again).contains("is cancelled"), "{}", said(&again));
}

#[test]
fn the_exit_code_tells_the_outcome() {
    let data = tempfile::tempdir().unwrap();
    let mut service = Service::start(data.path());
    let config = config(data.path());
    let config = config.to_str().unwrap();
    let wait = |more: &[&str]| patrickstar(&service, &[&["submit", config, "--wait"], more].concat());
    let large = wait(&["--set", "memory.device=100KB"]);
    assert_eq!(large.status.code(), Some(3), "{}", said(&large));
    assert!(said(&large).contains("memory.device"), "{}", said(&large));
    let bad = data.path().join("bad.jsonl");
    std::fs::write(&bad, "{\"prompt\": 1}\n").unwrap();
    let bad = wait(&["--data", bad.to_str().unwrap()]);
    assert_eq!(bad.status.code(), Some(1), "{}", said(&bad));
    assert!(said(&bad).contains("line 1"), "{}", said(&bad));
    let unknown = patrickstar(&service, &["submit", config, "--model", "gpt-9"]);
    assert!(said(&unknown).contains("no such model: gpt-9"), "{}", said(&unknown));
    assert_eq!(unknown.status.code(), Some(1));
    service.kill();
    let nobody = patrickstar(&service, &["jobs", "list"]);
    assert_eq!(nobody.status.code(), Some(5), "{}", said(&nobody));
    assert!(said(&nobody).contains("patrickstar serve") && said(&nobody).lines().count() == 1, "{}", said(&nobody));
    let nobody = patrickstar(&service, &["jobs", "watch", "ftjob-0", "--patience", "0"]);
    assert_eq!(nobody.status.code(), Some(5), "{}", said(&nobody));
}

#[test]
fn a_watcher_outlives_the_service() {
    let data = tempfile::tempdir().unwrap();
    let mut service = Service::start(data.path());
    let job = service.job(&service.training_file(), &json!({ "train.steps": 300, "checkpoint.every": 20 }));
    let watcher: Child = command(&service, &["jobs", "watch", &job, "--json"]).spawn().unwrap();
    for step in [1, 150] {
        service.until_step(&job, step);
        service.kill();
        service.restart();
    }
    service.until_status(&job, "succeeded");
    let watched = watcher.wait_with_output().unwrap();
    assert!(watched.status.success(), "{}", said(&watched));
    let heard: Vec<Value> = lines(&watched).iter().map(|line| line["id"].clone()).collect();
    let mut expected: Vec<Value> = service.events(&job).into_iter().map(|event| event["id"].clone()).collect();
    expected.push(json!(job));
    assert_eq!(heard, expected);
    assert!(said(&watched).contains("waiting for the service"), "{}", said(&watched));
}
