//! The report of a run: one HTML file that needs nothing else.

use std::io;
use std::path::Path;

use patrickstar_actors::timeline::{ResidencySnapshot, Span};
use patrickstar_actors::types::{Bytes, GroupId, Kind};
use serde::Serialize;

/// What the report shows.
#[derive(Debug, Serialize)]
pub struct RunReport {
    /// Heading.
    pub title: String,
    /// Names and values at the top.
    pub summary: Vec<(String, String)>,
    /// Curves.
    pub steps: Vec<StepPoint>,
    /// The line that device use must not cross.
    pub device_budget: Bytes,
    /// Rows of the map, indexed by chunk.
    pub chunks: Vec<ChunkLabel>,
    /// Columns of the map.
    pub snapshots: Vec<ResidencySnapshot>,
    /// Bars of the timeline.
    pub spans: Vec<Span>,
    /// Generated text.
    pub sample: Option<String>,
}

/// One point of every curve.
#[derive(Clone, Debug, Serialize)]
pub struct StepPoint {
    /// The step.
    pub step: u64,
    /// Mean loss.
    pub loss: f64,
    /// Loss on validation data, where it was due.
    pub valid_loss: Option<f64>,
    /// Throughput.
    pub tokens_per_second: f64,
    /// Share of the step that the compute thread waited.
    pub stall_ratio: f64,
    /// Norm of the gradient before clipping.
    pub gradient_norm: Option<f64>,
}

/// What a row of the map is.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ChunkLabel {
    /// Kind of state.
    pub kind: Kind,
    /// Group of parameters.
    pub group: GroupId,
}

const PAGE: &str = include_str!("report.html");

/// Writes the page, in place only when it is complete.
pub fn write_report(path: &Path, report: &RunReport) -> io::Result<()> {
    let json = serde_json::to_string(report)?;
    // Inside a script element only `<` could end the data early; JSON may spell it as an escape.
    let page = PAGE.replacen("/*REPORT*/null", &json.replace('<', "\\u003c"), 1);
    let scratch = path.with_extension("html.tmp");
    std::fs::write(&scratch, page)?;
    std::fs::rename(&scratch, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_cannot_end_the_script_and_the_page_asks_nobody_for_anything() {
        let report = RunReport {
            title: "</script><b>".into(),
            summary: vec![],
            steps: vec![],
            device_budget: Bytes(1),
            chunks: vec![],
            snapshots: vec![],
            spans: vec![],
            sample: Some("<!--".into()),
        };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.html");
        write_report(&path, &report).unwrap();
        let page = std::fs::read_to_string(path).unwrap();
        assert_eq!(page.matches("</script>").count(), 1);
        assert!(page.contains("\\u003c/script>"));
        for outside in ["http://", "https://", "src=", "@import"] {
            let allowed = page.matches("http://www.w3.org/2000/svg").count();
            assert_eq!(page.matches(outside).count(), if outside == "http://" { allowed } else { 0 }, "{outside}");
        }
    }
}
