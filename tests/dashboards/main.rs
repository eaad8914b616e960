//! Metrics, boards and alerts: their contract with each other, and a real Prometheus that scrapes a real service.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

mod boards;
#[path = "../service/client.rs"]
#[allow(dead_code, clippy::print_stdout)] // the service's own tests need more of it
mod client;
mod contract;
mod endpoint;
mod expression;
mod live;
mod server;
#[path = "../sources/mod.rs"]
mod sources;
mod values;

use std::path::{Path, PathBuf};

/// A file of the repository.
fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
