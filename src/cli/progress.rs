//! How far something is: a bar on a terminal, lines elsewhere.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

use super::output;

/// Steps done of a known number, on stderr.
pub struct Steps {
    bar: Option<ProgressBar>,
    total: u64,
}

impl Steps {
    /// A bar where somebody watches, unless lines are wanted.
    pub fn new(total: u64, lines: bool) -> Self {
        let bar = (!lines && std::io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len} [{elapsed} < {eta}] {msg}");
            ProgressBar::new(total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Steps { bar, total }
    }

    /// Steps in all.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// What was not known at first.
    pub fn set_total(&mut self, total: u64) {
        self.total = total;
        if let Some(bar) = &self.bar {
            bar.set_length(total);
        }
    }

    /// Shows a step: always on a bar, as a line only if it is `worth_a_line`.
    pub fn step(&self, step: u64, text: &str, worth_a_line: bool) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(step);
                bar.set_message(text.to_owned());
            }
            None if worth_a_line => output::note(&format!("step {step}/{}  {text}", self.total)),
            None => {}
        }
    }

    /// A line for people, above the bar.
    pub fn message(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => output::note(text),
        }
    }

    /// Leaves the bar as it is.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.abandon();
        }
    }
}
