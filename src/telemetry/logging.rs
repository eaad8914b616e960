//! What is logged, which may change while the program runs.

use std::sync::OnceLock;

use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, registry, reload};

use super::metrics::{Counter, count_with};

struct Logging {
    /// As the program was started.
    base: String,
    handle: reload::Handle<EnvFilter, Registry>,
}

static LOGGING: OnceLock<Logging> = OnceLock::new();

/// Counts what is logged, as the rule "for every line of logging also a counter" wants it.
struct CountMessages;

impl<S: tracing::Subscriber> Layer<S> for CountMessages {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        count_with(Counter::LogMessages, &[level_name(*event.metadata().level())]);
    }
}

fn level_name(level: tracing::Level) -> &'static str {
    match level {
        tracing::Level::ERROR => "error",
        tracing::Level::WARN => "warn",
        tracing::Level::INFO => "info",
        tracing::Level::DEBUG => "debug",
        tracing::Level::TRACE => "trace",
    }
}

/// Sends messages of `level` (or what a filter lets through) to stderr, as text or as JSON lines. An embedding program may
/// have set a subscriber already; the first one stays.
pub fn init(level: &str, as_json: bool) -> Result<(), String> {
    let filter = EnvFilter::try_new(level).map_err(|error| error.to_string())?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = if as_json { lines.json().boxed() } else { lines.boxed() };
    if registry().with(filter).with(lines).with(CountMessages).try_init().is_ok() {
        // Only the first subscriber is installed, so nobody was here before.
        let _ = LOGGING.set(Logging { base: level.to_owned(), handle });
    }
    Ok(())
}

/// Logs at another level from now on; an empty one is that of the command line. Without [`init`] nothing happens.
pub fn set_level(level: &str) -> Result<(), String> {
    let Some(logging) = LOGGING.get() else { return Ok(()) };
    let level = if level.is_empty() { &logging.base } else { level };
    let filter = EnvFilter::try_new(level).map_err(|error| error.to_string())?;
    logging.handle.reload(filter).map_err(|error| error.to_string())
}
