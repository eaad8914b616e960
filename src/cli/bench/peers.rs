//! `bench peers`: our step beside those of other engines on the same shapes, in one table.
//!
//! Reads what `bench step --json` printed and what the peer harness did: JSON objects, alone or at the end of lines among
//! others.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::Error;

/// One object a measurement, ours first; `of_best_peer` is its speed over that of the fastest peer.
pub fn run(ours: &Path, peers: &[PathBuf]) -> Result<Value, Error> {
    let mut rows = measurements(ours, "patrickstar")?;
    for path in peers {
        rows.extend(measurements(path, "peer")?);
    }
    let best_peer = |rows: &[Value]| {
        let peers = rows.iter().filter(|row| row["engine"] != "patrickstar");
        peers.filter_map(|row| row["tflops"].as_f64()).fold(f64::NAN, f64::max)
    };
    let best = best_peer(&rows);
    for row in &mut rows {
        if let (Some(tflops), false) = (row["tflops"].as_f64(), best.is_nan()) {
            row["of_best_peer"] = (tflops / best).into();
        }
    }
    Ok(Value::Array(rows))
}

fn measurements(path: &Path, engine: &str) -> Result<Vec<Value>, Error> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
    let found: Vec<Value> = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(&line[line.find('{')?..]).ok())
        .filter(|value| value.get("tflops").is_some() || value.get("error").is_some())
        .map(|value| row(engine, &value))
        .collect();
    if found.is_empty() {
        return Err(Error::Failed(format!(
            "{} holds no measurement: pass what `bench step --json` or the peer harness printed",
            path.display()
        )));
    }
    Ok(found)
}

fn row(engine: &str, value: &Value) -> Value {
    let named = ["system", "engine", "name"].into_iter().find_map(|key| value[key].as_str()).unwrap_or(engine);
    let mut row = json!({"engine": named});
    for key in ["shape", "batch", "params_b", "median_s", "tflops", "tok_s", "gpu_peak_gb", "rss_peak_gb", "error"] {
        if let Some(field) = value.get(key) {
            row[key] = field.clone();
        }
    }
    row
}

/// The rows as lines for people.
pub fn table(rows: &[Value]) -> Vec<String> {
    let header = format!(
        "{:14} {:>6} {:>6} {:>9} {:>10} {:>9} {:>8} {:>8}  {}",
        "engine", "shape", "batch", "step s", "TFLOP/s", "tokens/s", "GPU GB", "host GB", "of the best peer"
    );
    let line = |row: &Value| {
        let text = |key: &str| match &row[key] {
            Value::Null => "-".to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let number =
            |key: &str, digits: usize| row[key].as_f64().map_or("-".to_owned(), |number| format!("{number:.digits$}"));
        let end = match row["error"].as_str() {
            Some(error) => error.to_owned(),
            None => number("of_best_peer", 2),
        };
        format!(
            "{:14} {:>6} {:>6} {:>9} {:>10} {:>9} {:>8} {:>8}  {end}",
            text("engine"),
            text("shape"),
            text("batch"),
            number("median_s", 3),
            number("tflops", 1),
            number("tok_s", 0),
            number("gpu_peak_gb", 1),
            number("rss_peak_gb", 1),
        )
    };
    std::iter::once(header).chain(rows.iter().map(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_stands_beside_the_best_peer_and_failures_say_why() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let ours = write("ours.json", r#"{"shape":"1b","batch":16,"tflops":464.0,"median_s":0.244}"#);
        let peers = write(
            "peers.log",
            "loading\nRESULT {\"system\": \"torch\", \"tflops\": 376.0}\nRESULT {\"system\": \"fsdp\", \"error\": \"out of memory\"}\n",
        );
        let Value::Array(rows) = run(&ours, &[peers]).unwrap() else { panic!("not an array") };
        assert_eq!(rows.len(), 3);
        assert!((rows[0]["of_best_peer"].as_f64().unwrap() - 464.0 / 376.0).abs() < 1e-9);
        let lines = table(&rows);
        assert!(lines[1].starts_with("patrickstar") && lines[1].ends_with("1.23"), "{lines:?}");
        assert!(lines[3].ends_with("out of memory"), "{lines:?}");
        let empty = write("empty.json", "nothing here");
        assert!(run(&empty, &[]).unwrap_err().to_string().contains("holds no measurement"));
    }
}
