//! What metrics, documentation, boards and rules promise each other. Needs no Prometheus.

use std::collections::{BTreeSet, HashSet};
use std::process::Command;

use patrickstar::telemetry::metrics::{Counter, Gauge, Histogram, docs};
use serde_json::Value;

use crate::boards::{Board, GPU_ONLY};
use crate::expression::names;
use crate::sources::sources;
use crate::{read, repository};

/// Names of all metrics, without the endings that a histogram's series have.
pub fn declared() -> BTreeSet<&'static str> {
    let counters = Counter::ALL.iter().map(|metric| metric.family().name);
    let gauges = Gauge::ALL.iter().map(|metric| metric.family().name);
    counters.chain(gauges).chain(Histogram::ALL.iter().map(|metric| metric.family().name)).collect()
}

/// The metric that a series belongs to, if there is one.
fn metric_of(series: &str) -> Option<&'static str> {
    let histogram = |metric: &&Histogram| {
        let stem = series.strip_prefix(metric.family().name);
        stem.is_some_and(|ending| ["_bucket", "_sum", "_count"].contains(&ending))
    };
    if let Some(metric) = Histogram::ALL.iter().find(histogram) {
        return Some(metric.family().name);
    }
    let plain = declared().into_iter().find(|name| *name == series)?;
    let bare_histogram = Histogram::ALL.iter().any(|metric| metric.family().name == plain);
    (!bare_histogram).then_some(plain)
}

/// The lines of rules and their tests, without comments.
fn rules(file: &str) -> String {
    let text = read(&repository("dashboards/prometheus").join(file));
    text.lines().filter(|line| !line.trim_start().starts_with('#')).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_documentation_lists_every_metric_as_it_is() {
    let (path, text) = (repository("docs/METRICS.md"), docs::markdown());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert!(read(&path) == text, "docs/METRICS.md is stale: run UPDATE_DOCS=1 cargo test --test dashboards");
}

#[test]
fn names_of_metrics_are_spelled_once() {
    let spelled_here = ["src/telemetry/metrics/names.rs", "actors/src/monitor.rs"].map(repository);
    let mut files = Vec::new();
    ["src", "actors/src"].iter().for_each(|root| sources(&repository(root), &mut files));
    for path in files.iter().filter(|path| !spelled_here.contains(path)) {
        let text = read(path);
        for name in declared() {
            assert!(!text.contains(&format!("\"{name}")), "{} spells {name}: use the enum", path.display());
        }
        // One that is declared nowhere would not be noticed above.
        for call in ["counter!(\"", "gauge!(\"", "histogram!(\""] {
            assert!(!text.contains(call), "{} makes a metric by {call}...: declare it in names.rs", path.display());
        }
    }
}

#[test]
fn boards_and_rules_name_metrics_that_exist_and_leave_none_out() {
    let recorded = rules("rules.yml");
    let mut used = BTreeSet::new();
    let mut check = |place: &str, text: &str| {
        for (name, _) in names(text).into_iter().filter(|(name, _)| !name.ends_with(':')) {
            if name.contains(':') {
                assert!(recorded.contains(&format!("record: {name}\n")), "{place}: nobody records {name}");
            } else {
                let metric = metric_of(name);
                used.insert(metric.unwrap_or_else(|| panic!("{place}: there is no metric {name}")));
            }
        }
    };
    for query in Board::all().iter().flat_map(Board::queries) {
        check(&query.place, &query.expression);
    }
    for file in ["rules.yml", "alerts.yml", "alerts_test.yml"] {
        check(file, &rules(file));
    }
    let unused: Vec<_> = declared().into_iter().filter(|name| !used.contains(name)).collect();
    assert!(unused.is_empty(), "on no board and in no rule: {unused:?}");
}

#[test]
fn every_alert_says_what_to_do() {
    let readme = read(&repository("dashboards/README.md"));
    let alerts = rules("alerts.yml");
    let tested = rules("alerts_test.yml");
    for alert in alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        assert!(readme.contains(&format!("`{alert}`")), "dashboards/README.md does not explain {alert}");
        assert!(tested.contains(&format!("alertname: {alert}\n")), "alerts_test.yml does not make {alert} fire");
    }
}

#[test]
fn boards_are_what_their_sources_say() {
    let output = Command::new("python3").arg(repository("dashboards/build.py")).arg("--check").output();
    let output = output.expect("python3 runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn boards_are_complete() {
    let boards = Board::all();
    let uids: HashSet<&str> = boards.iter().map(|board| board.uid.as_str()).collect();
    assert_eq!((boards.len(), uids.len()), (4, 4));
    let mut gpu_only = 0;
    for board in &boards {
        let json = &board.json;
        assert!(json["editable"] == false && json["schemaVersion"] == 39 && json.get("id").is_none(), "{}", board.uid);
        assert_eq!(json["templating"]["list"][0]["name"], "datasource");
        let mut cells = HashSet::new();
        for panel in json["panels"].as_array().unwrap() {
            occupy(panel, &mut cells);
        }
        for panel in board.panels() {
            check_panel(panel);
        }
        gpu_only += GPU_ONLY.iter().filter(|(uid, title)| *uid == board.uid && has(board, title)).count();
        for query in board.queries().iter().filter(|query| !query.gpu_only) {
            check_filters(&query.place, &query.expression);
        }
    }
    assert_eq!(gpu_only, GPU_ONLY.len(), "the list of GPU-only panels names one that is gone");
}

fn has(board: &Board, title: &str) -> bool {
    board.panels().any(|panel| panel["title"] == title)
}

/// Panels lie inside of the grid and not on each other.
fn occupy(panel: &Value, cells: &mut HashSet<(u64, u64)>) {
    let [x, y, width, height] = ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().unwrap());
    assert!(x + width <= 24, "{}", panel["title"]);
    for cell in (x..x + width).flat_map(|x| (y..y + height).map(move |y| (x, y))) {
        assert!(cells.insert(cell), "{} lies on another panel", panel["title"]);
    }
}

fn check_panel(panel: &Value) {
    let title = panel["title"].as_str().unwrap();
    assert!(panel["description"].as_str().is_some_and(|text| text.ends_with('.')), "{title} has no description");
    assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{title} has no unit");
    assert!(panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["value"].is_null(), "{title}");
    assert!(!panel["targets"].as_array().unwrap().is_empty(), "{title} asks for nothing");
    assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
}

/// Every selector takes its board's variables into account.
fn check_filters(place: &str, expression: &str) {
    let by_process = "{job=~\"$job\", instance=~\"$instance\"";
    for (name, after) in names(expression) {
        assert!(after.starts_with(by_process), "{place}: {name} shows jobs that were not chosen");
        let of_process = [Gauge::BuildInfo.family().name, Counter::LogMessages.family().name].contains(&name);
        let of_service = name.starts_with("patrickstar_service_") || of_process;
        let per_job = name.starts_with("patrickstar_") && !of_service;
        assert!(!per_job || after[by_process.len()..].starts_with(", job_id=~\"$job_id\""), "{place}: {name}");
    }
}
