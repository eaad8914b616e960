//! The configuration that jobs begin with, and how it changes while the service runs: by a request, by SIGHUP, or because
//! its file has changed. There is one way for all three: the whole new configuration is checked, and then taken over; if
//! anything is wrong with it the old one stays.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use serde_json::Value;

use super::error::ServiceError;
use super::rate::RateLimit;
use super::store::{MetadataFilter, Seq, StoreHandle, UnixTime};
use super::supervisor::SupervisorHandle;
use super::worker::protocol::Policies;
use crate::config::{Changes, Loaded, Sources};
use crate::telemetry::logging;
use crate::telemetry::metrics::{Gauge, installed};

/// Looks at a watched file this often. Reading a few lines costs less than missing how some file systems report changes.
const LOOK: Duration = Duration::from_secs(1);

/// The configuration in force.
pub(super) struct Live {
    source: Option<PathBuf>,
    current: RwLock<Arc<Loaded>>,
    /// Changes come one after the other.
    turn: tokio::sync::Mutex<()>,
    store: StoreHandle,
    supervisor: SupervisorHandle,
    /// Of all clients.
    pub rate: RateLimit,
}

impl Live {
    /// Reads the configuration, which must be right to begin with.
    pub fn open(
        source: Option<PathBuf>,
        store: StoreHandle,
        supervisor: SupervisorHandle,
    ) -> Result<Self, ServiceError> {
        let loaded = read(source.clone())?;
        let rate = RateLimit::default();
        rate.set(loaded.config.service.requests_per_second);
        set_level(&loaded)?;
        let current = RwLock::new(Arc::new(loaded));
        shown(Ok(Changes::default()))?;
        Ok(Live { source, current, turn: tokio::sync::Mutex::default(), store, supervisor, rate })
    }

    /// What jobs begin with.
    pub fn loaded(&self) -> Arc<Loaded> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The file that it was read from.
    pub fn source(&self) -> Option<&Path> {
        self.source.as_deref()
    }

    /// Takes over `values`: a whole configuration, or some of its keys.
    pub async fn change(&self, values: &Value, whole: bool) -> Result<Changes, ServiceError> {
        let _turn = self.turn.lock().await;
        let changed = async { self.adopt(self.loaded().changed(values, whole)?).await };
        shown(changed.await)
    }

    /// Reads the file again. What requests have changed since is forgotten.
    pub async fn reload(&self) -> Result<Changes, ServiceError> {
        let _turn = self.turn.lock().await;
        let source = self.source.clone();
        let reloaded = async {
            let read = tokio::task::spawn_blocking(move || read(source)).await;
            let new = read.map_err(|error| ServiceError::Internal(format!("reading ended badly: {error}")))??;
            self.adopt(new).await
        };
        shown(reloaded.await)
    }

    async fn adopt(&self, new: Loaded) -> Result<Changes, ServiceError> {
        let old = self.loaded();
        let changes = new.changes_since(&old)?;
        set_level(&new)?;
        let policies = Policies::between(&old.config, &new.config);
        if new.config.service != old.config.service {
            self.rate.set(new.config.service.requests_per_second);
        }
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        if policies != Policies::default() {
            // Jobs up to this one began with the old configuration.
            let newest = self.store.read(|store| store.jobs(None, 1, &MetadataFilter::Any)).await?;
            let up_to = newest.rows.first().map_or(Seq(0), |job| job.seq);
            self.supervisor.retune(policies, up_to);
        }
        let Changes { applied, needs_restart, .. } = &changes;
        tracing::info!(?applied, ?needs_restart, "the configuration has changed");
        Ok(changes)
    }

    /// Reads the file again, and says how it went to whoever reads the log.
    pub async fn reload_and_tell(&self) {
        if let Err(error) = self.reload().await {
            tracing::error!("the configuration is not taken over, the old one stays: {error}");
        }
    }

    /// Reads the file again whenever it has another content; never returns.
    pub async fn watch(&self) {
        let Some(path) = self.source.as_deref() else { return std::future::pending().await };
        let mut seen = tokio::fs::read(path).await.ok();
        loop {
            tokio::time::sleep(LOOK).await;
            // A file that is being replaced may not be there for a moment.
            let Ok(content) = tokio::fs::read(path).await else { continue };
            if seen.as_ref() != Some(&content) {
                seen = Some(content);
                self.reload_and_tell().await;
            }
        }
    }
}

/// Says in metrics how a change went.
fn shown(outcome: Result<Changes, ServiceError>) -> Result<Changes, ServiceError> {
    if let Some(registry) = installed() {
        registry.gauge(Gauge::ConfigReloaded, &[]).set(f64::from(u8::from(outcome.is_ok())));
        if outcome.is_ok() {
            registry.gauge(Gauge::ConfigReloadTime, &[]).set(UnixTime::now().0 as f64);
        }
    }
    outcome
}

fn read(source: Option<PathBuf>) -> Result<Loaded, ServiceError> {
    Ok(Sources::process(source, Vec::new()).load()?)
}

fn set_level(loaded: &Loaded) -> Result<(), ServiceError> {
    logging::set_level(&loaded.config.service.log_level)
        .map_err(|error| ServiceError::Internal(format!("the log level cannot be changed: {error}")))
}
