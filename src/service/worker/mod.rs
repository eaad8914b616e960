//! The process that trains one job: `patrickstar worker`, started by the service and by nobody else.
//!
//! Its standard input is a socket to the service ([`protocol`]). When the service is gone the socket ends, and so does the
//! worker: a checkpoint holds only steps that the service has stored, and there is nobody left to store more. Until it has
//! ended it holds a lock on the job's directory, so that the worker of a restarted service waits instead of writing beside it.

mod observer;
pub mod protocol;
pub mod questions;
mod responder;
mod retune;

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use self::observer::Reporter;
use self::protocol::{FromWorker, Policies, ToWorker};
use self::questions::Question;
use self::responder::{Responder, Shown};
use super::child::{self, ChildError};
use crate::config::Config;
use crate::data::DataError;
use crate::error::Error;
use crate::telemetry::{logging, metrics};
use crate::train::session::{Session, Start, Summary};

/// A recording that was made while training, in the job's directory.
pub const TRACE_FILE: &str = "live-trace.json";
/// How long a worker waits for the one before it, which may be writing a large checkpoint.
const LOCK_PATIENCE: Duration = Duration::from_secs(120);

/// Trains the job that the service sends; whatever becomes of it is reported there.
pub fn run() -> Result<(), ChildError> {
    let socket = child::service_socket()?;
    let mut lines = BufReader::new(socket.try_clone().map_err(ChildError::NoService)?).lines();
    let first = lines.next().ok_or_else(|| ChildError::NoWork("it has gone".into()))?;
    let first = first.map_err(ChildError::NoService)?;
    let config = match serde_json::from_str(&first) {
        Ok(ToWorker::Start { config }) => *config,
        Ok(other) => return Err(ChildError::NoWork(format!("but {other:?}"))),
        Err(error) => return Err(ChildError::NoWork(error.to_string())),
    };
    if let Err(error) = logging::set_level(&config.service.log_level) {
        tracing::warn!("the job's log level is not used: {error}");
    }
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(ChildError::Signals)?;
    }
    let (retune, retunes) = flume::unbounded();
    let (store, stored) = flume::unbounded();
    let (ask, asked) = flume::bounded(responder::WAITING);
    let orders = Orders { stop: Arc::clone(&stop), retune, store, ask };
    std::thread::spawn(move || listen(lines, &orders));
    let (lines, shown) = (Lines::new(socket), Shown::default());
    let responder = Responder::new(Arc::clone(&shown), lines.clone(), config.train.output.join(TRACE_FILE));
    std::thread::spawn(move || responder.respond(&asked));
    let mut reporter = Reporter::new(lines, &config, retunes, stored, shown);
    let last = match train(config, &stop, &mut reporter) {
        Ok(summary) if summary.interrupted => FromWorker::Paused { step: summary.steps },
        Ok(summary) => FromWorker::Finished { step: summary.steps },
        Err(error) => failure(&error),
    };
    reporter.send(&last);
    Ok(())
}

fn train(config: Config, stop: &AtomicBool, reporter: &mut Reporter) -> Result<Summary, Error> {
    let output = config.train.output.clone();
    std::fs::create_dir_all(&output).map_err(|error| Error::io(&output, error))?;
    // Held until the process ends.
    let _lock = lock(&output.join("lock"))?;
    // The directory is named after the job.
    metrics::install(Some(&output.file_name().unwrap_or(output.as_os_str()).to_string_lossy()))?;
    let session = Session::open(config, &Start::Latest, reporter)?;
    reporter.started(&session);
    session.run(stop, reporter)
}

fn lock(path: &Path) -> Result<File, Error> {
    let file = File::create(path).map_err(|error| Error::io(path, error))?;
    let began = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(std::fs::TryLockError::Error(error)) => return Err(Error::io(path, error)),
            Err(std::fs::TryLockError::WouldBlock) if began.elapsed() > LOCK_PATIENCE => {
                let held = std::io::Error::new(ErrorKind::TimedOut, "another worker of this job still runs: end it");
                return Err(Error::io(path, held));
            }
            Err(std::fs::TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Where what the service says goes.
struct Orders {
    stop: Arc<AtomicBool>,
    retune: flume::Sender<Policies>,
    store: flume::Sender<u64>,
    ask: flume::Sender<(u64, Question)>,
}

/// Follows the service, and ends the process when it is gone or says so.
fn listen(lines: impl Iterator<Item = std::io::Result<String>>, orders: &Orders) {
    for line in lines.map_while(Result::ok) {
        match serde_json::from_str(&line) {
            Ok(ToWorker::Pause) => orders.stop.store(true, Ordering::Relaxed),
            Ok(ToWorker::Cancel) => break,
            // The training may have ended meanwhile.
            Ok(ToWorker::Retune(policies)) => drop(orders.retune.send(policies)),
            Ok(ToWorker::Stored { step }) => drop(orders.store.send(step)),
            // Never waits: whoever has too many questions gets no answer to some.
            Ok(ToWorker::Ask { id, question }) => drop(orders.ask.try_send((id, question))),
            Ok(ToWorker::Start { .. }) => tracing::warn!("a worker trains one job: another one is ignored"),
            Err(error) => tracing::warn!("the service sent a line that this program does not know: {error}"),
        }
    }
    // Checkpoints are whole at every instant, so this may be any.
    std::process::exit(0)
}

/// The way back to the service, for reports and answers.
#[derive(Clone)]
struct Lines(Arc<Mutex<UnixStream>>);

impl Lines {
    fn new(socket: UnixStream) -> Self {
        Lines(Arc::new(Mutex::new(socket)))
    }

    /// A service that is gone is noticed by [`listen`]; what it missed is told by checkpoints.
    fn send(&self, message: &FromWorker) {
        match serde_json::to_string(message) {
            Ok(line) => {
                let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                drop(socket.write_all(format!("{line}\n").as_bytes()));
            }
            Err(error) => tracing::error!("a report cannot be written as JSON: {error}"),
        }
    }
}

/// What a caller caused fails the same way again; what the machine caused may not.
fn failure(error: &Error) -> FromWorker {
    let (code, retry) = code_of(error);
    let message = match error {
        // How to go on is the service's business.
        Error::Stopped { step, source, .. } => format!("step {step}: {source}"),
        other => other.to_string(),
    };
    FromWorker::Failed { code: code.to_owned(), message, retry }
}

fn code_of(error: &Error) -> (&'static str, bool) {
    match error {
        Error::Config(_) | Error::Layout(_) | Error::Model(_) => ("invalid_configuration", false),
        Error::Data(DataError::Validation(_)) => ("invalid_validation_file", false),
        Error::Data(_) => ("invalid_training_file", false),
        Error::DoesNotFit(_) => ("insufficient_memory", false),
        Error::Failed(_) => ("training_failed", false),
        Error::Checkpoint(_) => ("checkpoint_failed", true),
        Error::Runtime(_) | Error::Compute(_) => ("runtime_failed", true),
        Error::Io { .. } => ("io_failed", true),
        Error::Stopped { source, .. } => code_of(source),
    }
}
