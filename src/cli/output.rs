//! The only place that prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::error::Error;
use std::io::{self, Write};

use serde::Serialize;

/// Writes a line to stdout. A reader that left (`| head`) ends the process quietly, as it would any filter.
pub fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result,
    }
}

/// Writes a value as one line of JSON to stdout.
pub fn json<T: Serialize>(value: &T) -> io::Result<()> {
    line(&serde_json::to_string(value).map_err(io::Error::from)?)
}

/// Writes an error and its causes as one line to stderr.
pub fn error(error: &dyn Error) {
    // Nobody is left to tell when stderr is closed.
    let _closed = writeln!(io::stderr(), "error: {}", chain(error));
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Some messages already say why.
        let why = error.to_string();
        if !text.contains(&why) {
            text.push_str(": ");
            text.push_str(&why);
        }
        cause = error.source();
    }
    text.replace('\n', " ")
}

/// Writes a line for people to stderr, so that stdout stays for results.
pub fn note(text: &str) {
    // Nobody is left to tell when stderr is closed.
    let _closed = writeln!(io::stderr(), "{text}");
}
