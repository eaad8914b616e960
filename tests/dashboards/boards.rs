//! What the tests want of a board.

use serde_json::Value;

use crate::{read, repository};

/// Panels whose metrics come from a GPU's driver or its own exporter: board and title.
pub const GPU_ONLY: [(&str, &str); 7] = [
    ("patrickstar-memory", "Neighbours on the GPU"),
    ("patrickstar-training", "Busy and held back"),
    ("patrickstar-training", "Other processes on the GPU"),
    ("patrickstar-training", "Temperature"),
    ("patrickstar-training", "Power"),
    ("patrickstar-training", "Tensor cores"),
    ("patrickstar-training", "PCIe"),
];

/// Metrics that only a GPU's driver can tell.
pub const OF_GPU: [&str; 8] = [
    "patrickstar_device_busy_ratio",
    "patrickstar_device_energy_joules_total",
    "patrickstar_device_free_bytes",
    "patrickstar_device_neighbour_bytes",
    "patrickstar_device_neighbours",
    "patrickstar_device_power_watts",
    "patrickstar_device_temperature_celsius",
    "patrickstar_device_throttled",
];

pub struct Board {
    pub uid: String,
    pub json: Value,
}

pub struct Query {
    /// Where it stands, for messages.
    pub place: String,
    pub expression: String,
    pub gpu_only: bool,
}

impl Board {
    /// All boards, in the order of their file names.
    pub fn all() -> Vec<Board> {
        let mut files: Vec<_> =
            std::fs::read_dir(repository("dashboards/boards")).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let board = |path: &std::path::PathBuf| {
            let json: Value = serde_json::from_str(&read(path)).unwrap();
            Board { uid: json["uid"].as_str().unwrap().to_owned(), json }
        };
        files.iter().map(board).collect()
    }

    /// Panels that show data; rows do not.
    pub fn panels(&self) -> impl Iterator<Item = &Value> {
        self.json["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row")
    }

    pub fn variables(&self) -> &[Value] {
        self.json["templating"]["list"].as_array().unwrap()
    }

    /// Every query of every panel.
    pub fn queries(&self) -> Vec<Query> {
        let of_panel = |panel: &Value| {
            let title = panel["title"].as_str().unwrap();
            let gpu_only = GPU_ONLY.contains(&(self.uid.as_str(), title));
            let place = format!("{} / {title}", self.uid);
            let targets = panel["targets"].as_array().unwrap();
            let expressions = targets.iter().map(|target| target["expr"].as_str().unwrap().to_owned());
            expressions.map(|expression| Query { place: place.clone(), expression, gpu_only }).collect::<Vec<_>>()
        };
        self.panels().flat_map(of_panel).collect()
    }

    /// An expression as Grafana would send it, with all jobs chosen and a short rate interval.
    pub fn fill(&self, expression: &str) -> String {
        let mut filled = expression.replace("$__rate_interval", "10s");
        // Longer names first: `$job` is the beginning of `$job_id`.
        let mut variables: Vec<&Value> = self.variables().iter().collect();
        variables.sort_by_key(|variable| std::cmp::Reverse(variable["name"].as_str().unwrap().len()));
        for variable in variables {
            let value = variable["allValue"].as_str().or(variable["current"]["value"].as_str()).unwrap_or("");
            filled = filled.replace(&format!("${}", variable["name"].as_str().unwrap()), value);
        }
        filled
    }
}
