//! The real clients of OpenAI, in the versions that `tests/service/install_clients` installs, against one service each.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::client::Service;

const PYTHON: [&str; 3] = ["1.109.1", "2.54.0", "3.54.0"];
const NODE: &str = "7.57.0";

/// Where the clients are installed.
fn root() -> PathBuf {
    let given = std::env::var_os("PATRICKSTAR_CLIENTS").map(PathBuf::from);
    given.unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/patrickstar-clients")
    })
}

/// Whether the client is there. Outside of CI its absence is told; there it is an error.
fn installed(client: &Path) -> bool {
    let there = client.exists();
    let in_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(there || !in_ci, "{} is missing: run tests/service/install_clients", client.display());
    if !there {
        // Past the test runner, which would hide it.
        let _ = writeln!(std::io::stderr(), "not run: {}: run tests/service/install_clients", client.display());
    }
    there
}

fn drive(program: &Path, arguments: &[&str]) {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let output = Command::new(program).args(arguments).arg(format!("http://{}", service.address)).output().unwrap();
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success(), "{said}\n{complained}");
    assert!(said.contains("completions; openai"), "{said}\n{complained}");
}

#[test]
fn the_python_client_works_unchanged() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/service/openai_client.py");
    for version in PYTHON {
        let python = root().join(format!("python-{version}/bin/python"));
        if installed(&python) {
            drive(&python, &[script]);
        }
    }
}

#[test]
fn the_node_client_works_unchanged() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/service/openai_client.mjs");
    let place = root().join(format!("node-{NODE}"));
    if installed(&place) {
        drive(Path::new("node"), &[script, place.to_str().unwrap()]);
    }
}
