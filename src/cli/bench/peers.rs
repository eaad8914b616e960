//! `bench peers`: our step beside those of other engines on the same shapes, in one table.
//!
//! Reads what `bench step --json` printed and what the peer harness did: JSON objects, alone or at the end of lines among
//! others.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::Error;

const OURS: &str = "patrickstar";

/// One object a measurement, ours first; `of_best_peer` is its speed over that of the fastest peer on the same shape and batch.
pub fn run(ours: &Path, peers: &[PathBuf]) -> Result<Value, Error> {
    let mut rows = measurements(ours, OURS)?;
    for path in peers {
        rows.extend(measurements(path, "peer")?);
    }
    let peers: Vec<Value> = rows.iter().filter(|row| row["engine"] != OURS).cloned().collect();
    for row in &mut rows {
        let same = |peer: &&Value| ["shape", "batch"].into_iter().all(|key| peer[key] == row[key]);
        let best = peers.iter().filter(same).filter_map(|peer| peer["tflops"].as_f64()).reduce(f64::max);
        if let (Some(tflops), Some(best)) = (row["tflops"].as_f64(), best) {
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
    let mut row = json!({"engine": value["peer"].as_str().unwrap_or(engine)});
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
        let ours = write(
            "ours.json",
            "{\"shape\":\"4b\",\"batch\":4,\"tflops\":200.0}\n{\"shape\":\"4b\",\"batch\":32,\"tflops\":480.0}\n",
        );
        // As the harness writes them: a line of its own for each batch.
        let line = |peer: &str, batch: u64, rest: &str| {
            format!("RESULT {{\"peer\": \"{peer}\", \"shape\": \"4b\", \"batch\": {batch}, {rest}}}\n")
        };
        let text = [
            "loading\n".to_owned(),
            line("fsdp2", 4, "\"tflops\": 50.0"),
            line("fsdp2", 16, "\"tflops\": 160.0"),
            line("fsdp2", 32, "\"error\": \"out of memory\""),
            line("deepspeed", 4, "\"tflops\": 40.0"),
        ];
        let peers = write("peers.log", &text.concat());
        let Value::Array(rows) = run(&ours, &[peers]).unwrap() else { panic!("not an array") };
        let of_best: Vec<Option<f64>> = rows.iter().map(|row| row["of_best_peer"].as_f64()).collect();
        assert_eq!(of_best, [Some(4.0), None, Some(1.0), Some(1.0), None, Some(0.8)]);
        let lines = table(&rows);
        assert!(lines[1].starts_with("patrickstar") && lines[1].ends_with("4.00"), "{lines:?}");
        assert!(lines[3].starts_with("fsdp2"), "{lines:?}");
        assert!(lines[5].ends_with("out of memory"), "{lines:?}");
        let empty = write("empty.json", "nothing here");
        assert!(run(&empty, &[]).unwrap_err().to_string().contains("holds no measurement"));
    }
}
