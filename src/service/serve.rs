//! Start and end of the service.

use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::api::{self, State, Tails};
use super::error::ServiceError;
use super::live::Live;
use super::notify;
use super::samplers::Samplers;
use super::settings::Settings;
use super::store::{FileId, Status, StoreHandle};
use super::supervisor::Supervisor;
use crate::telemetry::metrics::{self, Counter, Gauge};

/// How long workers may take to save their checkpoints when the service ends; afterwards they end with it. A model as large
/// as host memory takes minutes. A little less than the system unit's `TimeoutStopSec`, so that this ends in order.
const PATIENCE: Duration = Duration::from_secs(14 * 60);
/// Exit code of a process that SIGTERM ended, by convention.
const TERMINATED: i32 = 143;

/// Runs the service until a signal ends it. `ready` is told the address as soon as requests are answered.
pub fn serve(settings: Settings, ready: impl FnOnce(SocketAddr)) -> Result<(), ServiceError> {
    settings.check()?;
    let files = settings.files();
    std::fs::create_dir_all(&files).map_err(|error| ServiceError::io(&files, error))?;
    let _lock = lock(&settings.data)?;
    raise_open_files();
    actix_web::rt::System::new().block_on(run(settings, ready))
}

/// Connections and workers are many files, and the usual limit is for programs that have few.
fn raise_open_files() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::warn!("the limit of open files stays as it is: {error}");
    }
}

/// Two services on one database would both train every job.
fn lock(data: &Path) -> Result<std::fs::File, ServiceError> {
    let path = data.join("lock");
    let file = std::fs::File::create(&path).map_err(|error| ServiceError::io(&path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::Error(error)) => Err(ServiceError::io(&path, error)),
        Err(std::fs::TryLockError::WouldBlock) => {
            let message = format!("another service uses {}: end it, or give another --data", data.display());
            Err(ServiceError::Setup(message))
        }
    }
}

async fn run(settings: Settings, ready: impl FnOnce(SocketAddr)) -> Result<(), ServiceError> {
    let settings = Arc::new(settings);
    let registry = metrics::install(None).map_err(|error| ServiceError::Setup(error.to_string()))?;
    // A counter begins at 0 and not at its first increment, which `rate` would not see.
    for counter in [Counter::AuthFailures, Counter::RateLimited, Counter::WorkerRestarts] {
        registry.counter(counter, &[]).increment(0);
    }
    for outcome in [Status::Succeeded, Status::Failed, Status::Cancelled] {
        registry.counter(Counter::JobsFinished, &[outcome.name()]).increment(0);
    }
    for gauge in [Gauge::OpenStreams, Gauge::HttpInFlight] {
        registry.gauge(gauge, &[]).set(0.0);
    }
    let (mut signals, hangup) = (Signals::new()?, listen(SignalKind::hangup())?);
    let store = StoreHandle::open(&settings.data.join("store.sqlite"))?;
    remove_strays(&settings.files(), &store).await?;
    let (stop, stopping) = watch::channel(false);
    let (supervisor, handle) = Supervisor::new(Arc::clone(&settings), store.clone());
    let mut supervising = tokio::spawn(supervisor.run());
    let live = Live::open(settings.config.clone(), store.clone(), handle.clone())?;
    let live = Arc::new(live);
    let samplers = Samplers::new(settings.sample_device, settings.limits);
    let watched = settings.watch_config;
    let (server, address) = api::server(State {
        tails: Tails::new(store.clone()),
        settings,
        store,
        supervisor: handle.clone(),
        samplers,
        live: Arc::clone(&live),
        stopping,
    })?;
    let control = server.handle();
    let mut serving = actix_web::rt::spawn(server);
    ready(address);
    notify::ready();
    let reloading =
        async { tokio::join!(reload_on(hangup, &live), watch(&live, watched), notify::keep_alive(handle.clone())) };
    tokio::select! {
        () = signals.next() => {}
        _ = reloading => return Err(ServiceError::Internal("signals are not heard any more".into())),
        // Without a supervisor jobs would wait for ever: better to end, and to be started again.
        ended = &mut supervising => return Err(ServiceError::Internal(format!("the supervisor ended: {ended:?}"))),
        ended = &mut serving => return Err(ServiceError::Internal(format!("the server ended: {ended:?}"))),
    }
    tracing::info!("stopping: no new jobs, workers save their checkpoints");
    stop.send_replace(true);
    notify::stopping();
    let leave = async {
        if tokio::time::timeout(PATIENCE, handle.stop()).await.is_err() {
            tracing::warn!("workers did not leave in time: their jobs go on from older checkpoints");
        }
        control.stop(true).await;
    };
    unless_told_again(leave, &mut signals).await;
    Ok(())
}

async fn unless_told_again(leave: impl Future<Output = ()>, signals: &mut Signals) {
    tokio::select! {
        () = leave => {}
        () = signals.next() => std::process::exit(TERMINATED),
    }
}

/// Reads the configuration again at every SIGHUP.
async fn reload_on(mut hangup: Signal, live: &Live) {
    while hangup.recv().await.is_some() {
        live.reload_and_tell().await;
    }
}

async fn watch(live: &Live, watched: bool) {
    if watched { live.watch().await } else { std::future::pending().await }
}

fn listen(kind: SignalKind) -> Result<Signal, ServiceError> {
    signal(kind).map_err(|error| ServiceError::Setup(format!("signals cannot be handled: {error}")))
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self, ServiceError> {
        Ok(Signals { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Removes what a kill left behind: content whose upload was never answered, or whose file was deleted.
async fn remove_strays(files: &Path, store: &StoreHandle) -> Result<(), ServiceError> {
    let failed = |error| ServiceError::io(files, error);
    for entry in std::fs::read_dir(files).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let id = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<FileId>().ok());
        // Whatever has another form of name was put here by somebody else.
        let Some(id) = id else { continue };
        if store.read(move |store| store.file(&id)).await?.is_none() {
            std::fs::remove_file(&path).map_err(failed)?;
        }
    }
    Ok(())
}
