//! Training data as a form, read while it is sent: neither the files nor their lines have to fit in memory.

use std::io::{Cursor, Read};
use std::path::PathBuf;

use serde_json::Value;
use ureq::SendBody;
use ureq::http::header::CONTENT_TYPE;

use super::{Client, ClientError};
use crate::data::JsonLines;

/// Separates the parts of the form. Lines of JSON cannot hold it: they begin otherwise.
const EDGE: &str = "patrickstar-training-file";

impl Client {
    /// Uploads text files, directories of them, or lines of JSON as one training file; returns what the service calls it.
    pub fn upload(&self, paths: &[PathBuf]) -> Result<Value, ClientError> {
        let name = paths.first().and_then(|path| path.file_stem()).and_then(|name| name.to_str()).unwrap_or("training");
        // A quote would end the name in the form's header.
        let name: String = name.chars().filter(|letter| !letter.is_control() && !"\"\\".contains(*letter)).collect();
        let part = |name: &str| format!("--{EDGE}\r\nContent-Disposition: form-data; name=\"{name}\"");
        let head =
            format!("{}\r\n\r\nfine-tune\r\n{}; filename=\"{name}.jsonl\"\r\n\r\n", part("purpose"), part("file"));
        let tail = format!("\r\n--{EDGE}--\r\n");
        let lines = JsonLines::open(paths)?;
        let mut form = Cursor::new(head).chain(lines).chain(Cursor::new(tail));
        let request = self.with_token(self.agent.post(format!("{}/v1/files", self.url)));
        let request = request.header(CONTENT_TYPE, format!("multipart/form-data; boundary={EDGE}"));
        self.answer(request.send(SendBody::from_reader(&mut form)))
    }
}
