//! `train --metrics` where it cannot serve: one line that says what to do.

use std::net::TcpListener;
use std::process::Command;

fn refused(address: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_patrickstar"))
        .args(["train", "--metrics", address, "--set", "train.output=/nowhere/at/all"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

#[test]
fn an_address_that_cannot_be_served_is_named_before_anything_begins() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let error = refused(&address);
    assert!(error.contains(&address) && error.contains("choose another address with --metrics"), "{error}");
    for nonsense in ["9464", "localhost", "127.0.0.1", "127.0.0.1:99999"] {
        let error = refused(nonsense);
        assert!(error.contains("telemetry.metrics_listen") && error.contains("127.0.0.1:9464"), "{nonsense}: {error}");
    }
}
