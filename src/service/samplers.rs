//! The processes that write texts: how many there are, which of them is kept for the next request, and when they end.
//!
//! A request holds its sampler; one that goes away before its texts are whole, because the client did, takes the process
//! with it. One that is done leaves it loaded for a while.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::Child;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::child;
use super::error::ServiceError;
use super::sampler::protocol::{FromSampler, ToSampler, Wish};
use super::settings::Limits;
use crate::config::DeviceKind;

/// How long a process that closed its socket may take to have ended.
const LEAVE: Duration = Duration::from_secs(5);

/// All samplers.
#[derive(Clone)]
pub struct Samplers {
    device: DeviceKind,
    limits: Limits,
    /// One permit for each text that is being written.
    free: Arc<Semaphore>,
    idle: Arc<Mutex<Vec<Sampler>>>,
}

impl Samplers {
    /// None yet.
    pub fn new(device: DeviceKind, limits: Limits) -> Self {
        Samplers { device, limits, free: Arc::new(Semaphore::new(limits.samplers)), idle: Arc::default() }
    }

    /// Begins to continue texts with the model of `checkpoint`; returns when the model is loaded.
    pub async fn begin(&self, checkpoint: &Path, wish: Wish) -> Result<Writing, ServiceError> {
        let permit = Arc::clone(&self.free).try_acquire_owned();
        let permit = permit.map_err(|_| ServiceError::SamplersBusy(self.limits.samplers))?;
        let deadline = Instant::now() + self.limits.sampling;
        let wish = ToSampler::Continue(wish);
        let mut writing =
            Writing { sampler: self.take_idle(checkpoint), pool: self.clone(), deadline, _permit: permit };
        if writing.sampler.is_some() {
            match writing.ask(&wish).await {
                Ok(()) => return Ok(writing),
                Err(error) => tracing::warn!("a sampler that was kept loaded is of no use any more: {error}"),
            }
        }
        writing.sampler = Some(Sampler::start(checkpoint)?);
        writing.ask(&ToSampler::Load { checkpoint: checkpoint.to_owned(), device: self.device }).await?;
        writing.ask(&wish).await?;
        Ok(writing)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Sampler>> {
        // Nothing that holds it can panic halfway.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that has this model loaded; else makes room for one that will.
    fn take_idle(&self, checkpoint: &Path) -> Option<Sampler> {
        let mut idle = self.lock();
        if let Some(place) = idle.iter().position(|sampler| sampler.checkpoint == checkpoint) {
            return Some(idle.remove(place));
        }
        let writing = self.limits.samplers - self.free.available_permits();
        let most = self.limits.samplers.saturating_sub(writing);
        while idle.len() > most {
            // The one that has waited longest.
            drop(idle.remove(0));
        }
        None
    }

    fn keep(&self, sampler: Sampler) {
        let pid = sampler.child.id();
        self.lock().push(sampler);
        let pool = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(pool.limits.warm).await;
            // One that was used meanwhile has come back with a later end.
            let over = |sampler: &Sampler| sampler.child.id() == pid && sampler.since.elapsed() >= pool.limits.warm;
            pool.lock().retain(|sampler| !over(sampler));
        });
    }
}

/// A process with a model.
struct Sampler {
    checkpoint: PathBuf,
    child: Child,
    from: Lines<BufReader<OwnedReadHalf>>,
    to: OwnedWriteHalf,
    /// When it was last used.
    since: Instant,
}

impl Sampler {
    fn start(checkpoint: &Path) -> Result<Self, ServiceError> {
        // What it logs is shown with the service's own log.
        let (child, socket) = child::start("sample", Stdio::inherit())?;
        let (from, to) = socket.into_split();
        Ok(Sampler {
            checkpoint: checkpoint.to_owned(),
            child,
            from: BufReader::new(from).lines(),
            to,
            since: Instant::now(),
        })
    }

    /// Why its socket has ended.
    async fn death(&mut self) -> String {
        match tokio::time::timeout(LEAVE, self.child.wait()).await {
            Ok(Ok(status)) => format!("the sampler ended with {status}"),
            Ok(Err(error)) => format!("the sampler's end is unknown: {error}"),
            Err(_) => "the sampler closed its socket".to_owned(),
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // An error means that it has ended already; its remains are collected by the runtime.
        let _ = self.child.start_kill();
    }
}

/// Texts that are being written.
pub struct Writing {
    /// Until they are whole.
    sampler: Option<Sampler>,
    pool: Samplers,
    deadline: Instant,
    _permit: OwnedSemaphorePermit,
}

impl Writing {
    /// The next piece; `None` after the last.
    pub async fn next(&mut self) -> Result<Option<FromSampler>, ServiceError> {
        if self.sampler.is_none() {
            return Ok(None);
        }
        let message = self.hear().await?;
        if matches!(message, FromSampler::Done { .. })
            && let Some(mut sampler) = self.sampler.take()
        {
            sampler.since = Instant::now();
            self.pool.keep(sampler);
        }
        Ok(Some(message))
    }

    /// Says something and waits until the sampler is ready for it.
    async fn ask(&mut self, message: &ToSampler) -> Result<(), ServiceError> {
        let line = serde_json::to_string(message)
            .map_err(|error| ServiceError::Internal(format!("a wish is not JSON: {error}")))?;
        if let Some(sampler) = &mut self.sampler {
            // A process that is gone is noticed where its lines end.
            drop(sampler.to.write_all(format!("{line}\n").as_bytes()).await);
        }
        match self.hear().await? {
            FromSampler::Ready => Ok(()),
            other => Err(ServiceError::Sampling(format!("the sampler answered {other:?}: please report this"))),
        }
    }

    async fn hear(&mut self) -> Result<FromSampler, ServiceError> {
        let Some(sampler) = &mut self.sampler else {
            return Err(ServiceError::Internal("a sampler that was given back".into()));
        };
        let Ok(line) = tokio::time::timeout_at(self.deadline, sampler.from.next_line()).await else {
            let seconds = self.pool.limits.sampling.as_secs();
            return Err(ServiceError::Sampling(format!("not done in {seconds} s: ask for fewer tokens")));
        };
        let Ok(Some(line)) = line else {
            return Err(ServiceError::Sampling(format!("{}: try a smaller model", sampler.death().await)));
        };
        match serde_json::from_str(&line) {
            Ok(FromSampler::Failed { gone: true, .. }) => {
                Err(ServiceError::NotFound { what: "checkpoint", id: "its files were removed meanwhile".into() })
            }
            // Clients do not know the directories of the service.
            Ok(FromSampler::Failed { message, .. }) => {
                let place = sampler.checkpoint.display().to_string();
                Err(ServiceError::Sampling(message.replace(&place, "the checkpoint")))
            }
            Ok(message) => Ok(message),
            Err(error) => Err(ServiceError::Sampling(format!("the sampler sent what is not known here: {error}"))),
        }
    }
}
