//! The database as async code uses it: calls run on threads that may block, and watchers learn of changes.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::watch;

use super::{Store, StoreError};
use crate::telemetry::metrics::{Histogram, installed};

/// Shared access to the one database.
#[derive(Clone)]
pub struct StoreHandle {
    store: Arc<Mutex<Store>>,
    changes: Arc<watch::Sender<u64>>,
}

impl StoreHandle {
    /// Opens the database.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let store = Arc::new(Mutex::new(Store::open(path)?));
        Ok(StoreHandle { store, changes: Arc::new(watch::Sender::new(0)) })
    }

    /// Reads.
    pub async fn read<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.run(|store| call(store)).await
    }

    /// Changes; when this returns the change is on disk, and watchers are woken.
    pub async fn write<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let began = Instant::now();
        let result = self.run(call).await;
        if let Some(registry) = installed() {
            registry.histogram(Histogram::StoreWriteDuration, &[]).record(began.elapsed());
        }
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
        result
    }

    async fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = Arc::clone(&self.store);
        // A panic inside a call rolled its transaction back: the store itself is whole.
        let work = move || call(&mut store.lock().unwrap_or_else(PoisonError::into_inner));
        tokio::task::spawn_blocking(work).await.map_err(|error| StoreError::Interrupted(error.to_string()))?
    }

    /// Changes after every write.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}
