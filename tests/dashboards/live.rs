//! A real Prometheus scrapes a real service while it trains, and is asked everything that boards, rules and alerts will ever ask.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::boards::{Board, OF_GPU};
use crate::client::{Service, until};
use crate::contract::declared;
use crate::expression::answerable;
use crate::repository;
use crate::server::{Server, encoded, free_port, get};

/// A slow machine shared by others gets its data late, not never.
const PATIENCE: Duration = Duration::from_secs(120);
const SCRAPES: usize = 200;
/// Far beyond what a scrape may take: only a scrape that waits for a step would need it.
const SLOW_SCRAPE: Duration = Duration::from_millis(250);

/// Said even where the output of tests that pass is not shown.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn installed(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

#[test]
fn rules_are_valid_and_alerts_fire_when_they_should() {
    if !installed("promtool") {
        return say("not run: rules and alerts (no promtool: apt-get install prometheus)");
    }
    for arguments in [
        &["check", "config", "prometheus.yml"][..],
        &["check", "rules", "rules.yml", "alerts.yml"],
        &["test", "rules", "alerts_test.yml"],
    ] {
        let output =
            Command::new("promtool").args(arguments).current_dir(repository("dashboards/prometheus")).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
}

#[test]
fn every_query_of_every_board_and_rule_has_data_while_a_model_trains() {
    if !installed("prometheus") || !installed("promtool") {
        return say("not run: boards against a real Prometheus (apt-get install prometheus)");
    }
    let directory = tempfile::tempdir().unwrap();
    let service = Service::start(&directory.path().join("data"));
    let job = train(&service);
    let metrics = service.address.rsplit_once(':').unwrap().1.parse().unwrap();
    let prometheus = free_port();
    let mut server = scrape(directory.path(), metrics, prometheus);
    let start = Instant::now();
    let mut open = questions_of_boards();
    open.extend(questions_of_rules(prometheus, start));
    let asked = open.len();
    while !open.is_empty() {
        assert_eq!(service.show(&job)["status"], "running", "{}", service.show(&job)["error"]);
        server.assert_running("prometheus");
        open.retain(|question| !question.has_data(prometheus));
        let names: Vec<_> = open.iter().map(|question| format!("{}: {}", question.place, question.text)).collect();
        assert!(start.elapsed() < PATIENCE, "without data after {PATIENCE:?}:\n{}", names.join("\n"));
        std::thread::sleep(Duration::from_millis(500));
    }
    say(&format!("{asked} queries of boards and rules have data after {:.0} s", start.elapsed().as_secs_f64()));
    for rule in rules(prometheus).unwrap() {
        assert_eq!(rule["health"], "ok", "{rule}");
        assert_ne!(rule["state"], "firing", "a training that is well raises an alert: {rule}");
    }
    check_exposition(&get(metrics, "/metrics").unwrap());
    time_scrapes(metrics);
    // With the worker go the series of its job; the service's own stay.
    service.order(&job, "pause").ok();
    let left = until("the job's series to go", || get(metrics, "/metrics").filter(|text| !text.contains(&job)));
    assert!(left.contains("patrickstar_service_jobs{status=\"paused\"} 1\n"), "{left}");
}

/// Trains on the CPU until it is killed, on a device and a host so small that chunks move between all tiers.
fn train(service: &Service) -> String {
    let settings = json!({
        "model.context": 32, "train.seq_len": 32, "train.micro_batches": 2, "train.steps": 100_000_000,
        "train.recompute": "full", "train.log_every": 100, "checkpoint.every": 200, "telemetry.tensorboard": false,
        "telemetry.device_peak_flops": 1e12,
        "memory": { "device": "2600KiB", "host": "700KiB", "disk": "4MB", "chunk": "32KiB" },
    });
    let file = service.training_file();
    let body = json!({
        "model": "gpt-tiny", "training_file": file, "validation_file": file, "seed": 5, "patrickstar": settings,
    });
    let job = service.post("/v1/fine_tuning/jobs", &body).ok()["id"].as_str().unwrap().to_owned();
    service.until_step(&job, 10);
    job
}

/// A Prometheus with the repository's rules, which looks every second.
fn scrape(directory: &Path, metrics: u16, port: u16) -> Server {
    let rules = repository("dashboards/prometheus");
    let config = format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [\"{0}/rules.yml\", \"{0}/alerts.yml\"]\n\
         scrape_configs:\n  - job_name: patrickstar\n    static_configs: [{{targets: [\"127.0.0.1:{metrics}\"]}}]\n",
        rules.display()
    );
    let path = directory.join("prometheus.yml");
    std::fs::write(&path, config).unwrap();
    Server::start(
        Command::new("prometheus")
            .arg(format!("--config.file={}", path.display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("tsdb").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .arg("--log.level=error"),
    )
}

struct Question {
    place: String,
    text: String,
    path: String,
    /// A valid query is enough.
    may_be_empty: bool,
}

impl Question {
    fn query(place: String, text: String) -> Self {
        let path = format!("/api/v1/query?query={}", encoded(&text));
        Question { place, text, path, may_be_empty: false }
    }

    /// Whether there is an answer with a number in it; a query that is wrong ends the test.
    fn has_data(&self, port: u16) -> bool {
        let Some(answer) = get(port, &self.path).and_then(|body| serde_json::from_str::<Value>(&body).ok()) else {
            return false;
        };
        assert_eq!(answer["status"], "success", "{}: {}: {answer}", self.place, self.text);
        let found = answer["data"]["result"].as_array().or(answer["data"].as_array());
        let is_number = |series: &Value| series["value"][1] != "NaN";
        self.may_be_empty || found.is_some_and(|found| found.iter().any(is_number))
    }
}

/// Queries of all panels and variables of all boards.
fn questions_of_boards() -> Vec<Question> {
    let mut questions = Vec::new();
    for board in Board::all() {
        for query in board.queries() {
            let question = Question::query(query.place, board.fill(&query.expression));
            questions.push(Question { may_be_empty: query.gpu_only, ..question });
        }
        for variable in board.variables().iter().filter(|variable| variable["type"] == "query") {
            let definition = variable["definition"].as_str().unwrap();
            let inside = definition.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')')).unwrap();
            let (selector, label) = inside.rsplit_once(", ").unwrap();
            let path = format!("/api/v1/label/{label}/values?match[]={}", encoded(&board.fill(selector)));
            let place = format!("{} / variable {}", board.uid, variable["name"]);
            questions.push(Question { place, text: definition.to_owned(), path, may_be_empty: false });
        }
    }
    questions
}

/// Series that rules record, and what alerts look at.
fn questions_of_rules(port: u16, start: Instant) -> Vec<Question> {
    let rules = loop {
        match rules(port) {
            Some(rules) if !rules.is_empty() => break rules,
            _ => assert!(start.elapsed() < PATIENCE, "prometheus does not load the rules"),
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    let questions = |rule: &Value| {
        let name = rule["name"].as_str().unwrap().to_owned();
        let queries = match rule["type"].as_str() {
            Some("recording") => vec![name.clone()],
            _ => answerable(rule["query"].as_str().unwrap()),
        };
        queries.into_iter().map(move |query| Question::query(name.clone(), query)).collect::<Vec<_>>()
    };
    rules.iter().flat_map(questions).collect()
}

/// All rules with their state; `None` while Prometheus does not answer.
fn rules(port: u16) -> Option<Vec<Value>> {
    let answer: Value = serde_json::from_str(&get(port, "/api/v1/rules")?).ok()?;
    let groups = answer["data"]["groups"].as_array()?;
    Some(groups.iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect())
}

/// Everything that is declared is there, described and well named.
fn check_exposition(text: &str) {
    for name in declared().into_iter().filter(|name| !OF_GPU.contains(name)) {
        assert!(text.contains(&format!("# HELP {name} ")), "{name} is declared and not published");
    }
    assert!(!text.contains(" summary\n"), "a histogram without buckets");
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    assert!(output.status.success(), "promtool check metrics: {}", String::from_utf8_lossy(&output.stderr));
}

/// The training goes on meanwhile, as fast as it can.
fn time_scrapes(port: u16) {
    let mut times: Vec<Duration> = (0..SCRAPES)
        .map(|_| {
            let start = Instant::now();
            assert!(get(port, "/metrics").is_some());
            start.elapsed()
        })
        .collect();
    times.sort();
    let (median, worst) = (times[SCRAPES / 2], times[SCRAPES - 1]);
    say(&format!("a scrape while training: median {median:?}, slowest of {SCRAPES} {worst:?}"));
    assert!(median < SLOW_SCRAPE, "a scrape takes {median:?}");
}
