//! PyTorch's attention beside ours: the same shapes, timed the same way, in the same run.

use std::path::Path;
use std::process::Command;

use serde::Deserialize;
use serde_json::Value;

use crate::Error;

const SCRIPT: &str = include_str!("sdpa.py");

#[derive(Deserialize)]
struct Times {
    forward_s: f64,
    backward_s: f64,
}

/// Adds `sdpa_s` and `of_sdpa` (its time over ours) to the rows of attention.
pub fn add(rows: &mut [Value], python: &Path) -> Result<(), Error> {
    let shape = |row: &Value| row["shape"].as_str().unwrap_or_default().replace(' ', "");
    let mut shapes: Vec<String> = rows.iter().filter(|row| row["name"] == "attention_forward").map(shape).collect();
    shapes.dedup();
    let failed = |reason: String| {
        Error::Failed(format!(
            "{} could not time PyTorch's attention: {reason}; leave out --torch, or name an interpreter that has torch",
            python.display()
        ))
    };
    let output =
        Command::new(python).args(["-c", SCRIPT]).args(&shapes).output().map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(failed(text.lines().last().unwrap_or_default().to_owned()));
    }
    let times: Vec<Times> = serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()))?;
    for row in rows.iter_mut() {
        let Some(index) = shapes.iter().position(|known| *known == shape(row)) else { continue };
        let seconds = match (row["name"].as_str(), times.get(index)) {
            (Some("attention_forward"), Some(times)) => times.forward_s,
            (Some("attention_backward"), Some(times)) => times.backward_s,
            _ => continue,
        };
        row["sdpa_s"] = seconds.into();
        row["of_sdpa"] = (seconds / row["s"].as_f64().unwrap_or(f64::NAN)).into();
    }
    Ok(())
}
