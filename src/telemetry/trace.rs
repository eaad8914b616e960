//! Chrome trace events, which Perfetto and chrome://tracing open.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use patrickstar_actors::timeline::{ResidencySnapshot, Span, Track};
use serde_json::json;

const TRACKS: [(Track, &str); 10] = [
    (Track::Compute, "compute"),
    (Track::Stall, "stall"),
    (Track::HostToDevice, "copy host to device"),
    (Track::DeviceToHost, "copy device to host"),
    (Track::ActivationsOut, "activations to host memory"),
    (Track::ActivationsBack, "activations back"),
    (Track::Disk, "disk"),
    (Track::Reduction, "reduction"),
    (Track::Optimizer, "optimizer in host memory"),
    (Track::DeviceOptimizer, "optimizer on the device"),
];

/// Writes one line a span, in place only when it is complete.
pub fn write_chrome_trace(path: &Path, spans: &[Span], snapshots: &[ResidencySnapshot]) -> io::Result<()> {
    let scratch = path.with_extension("json.tmp");
    let mut file = BufWriter::new(File::create(&scratch)?);
    file.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n")?;
    let mut first = true;
    let mut emit = |event: serde_json::Value| -> io::Result<()> {
        if !std::mem::take(&mut first) {
            file.write_all(b",\n")?;
        }
        serde_json::to_writer(&mut file, &event).map_err(io::Error::from)
    };
    emit(json!({"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "patrickstar"}}))?;
    for (tid, (_, name)) in TRACKS.iter().enumerate() {
        emit(json!({"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}))?;
        emit(json!({"ph": "M", "pid": 1, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}))?;
    }
    for span in spans {
        let tid = TRACKS.iter().position(|(track, _)| *track == span.track);
        let micros = |time: std::time::Duration| time.as_nanos() as f64 / 1e3;
        emit(json!({
            "ph": "X", "pid": 1, "tid": tid, "name": span.name,
            "ts": micros(span.start), "dur": micros(span.end.saturating_sub(span.start)),
            "args": {"chunk": span.chunk, "kind": span.kind, "bytes": span.bytes},
        }))?;
    }
    // Use of the tiers at each moment, drawn where that moment's compute begins.
    let passes: Vec<&Span> = spans.iter().filter(|span| span.track == Track::Compute).collect();
    for (snapshot, pass) in snapshots.iter().zip(passes) {
        let [device, host, disk] = snapshot.used;
        emit(json!({
            "ph": "C", "pid": 1, "name": "chunk bytes", "ts": pass.start.as_nanos() as f64 / 1e3,
            "args": {"device": device, "host": host, "disk": disk},
        }))?;
    }
    file.write_all(b"\n]}\n")?;
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    std::fs::rename(&scratch, path)
}
