//! How the service was started.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::directories::ModelRoots;
use super::error::ServiceError;
use super::store::FileId;
use super::tokens::Tokens;
use crate::config::DeviceKind;

/// What `patrickstar serve` was told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Where everything is kept.
    pub data: PathBuf,
    /// Configuration that all jobs begin with.
    pub config: Option<PathBuf>,
    /// Whether to read it again when it has changed.
    pub watch_config: bool,
    /// Directories of models that jobs may begin with.
    pub model_roots: ModelRoots,
    /// Where texts are computed.
    pub sample_device: DeviceKind,
    /// Names besides IP addresses and localhost by which clients may call.
    pub allowed_hosts: Vec<String>,
    /// Who may do what; nobody has to show a token if there are none.
    pub tokens: Tokens,
    /// What is refused because it is too much.
    pub limits: Limits,
}

/// Bounds on what clients may cause.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a JSON body.
    pub json: usize,
    /// Bytes of an uploaded file.
    pub upload: u64,
    /// Bytes of a line in one.
    pub line: usize,
    /// Jobs that wait or are paused.
    pub waiting_jobs: usize,
    /// Bytes of disk that uploads leave free.
    pub disk_reserve: u64,
    /// Texts that are written at a time, and models that are kept loaded.
    pub samplers: usize,
    /// Time that the continuations of one request may take.
    pub sampling: Duration,
    /// How long a model is kept loaded for the next request.
    pub warm: Duration,
    /// Deaths of a job's worker without a new checkpoint between them.
    pub restarts: u32,
    /// Time without progress after which a worker is given up; `None` is never.
    pub hang: Option<Duration>,
    /// Wait before the first restart; it doubles with each.
    pub restart_delay: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            json: 1 << 20,
            upload: 1 << 30,
            line: 8 << 20,
            waiting_jobs: 1000,
            disk_reserve: 256 << 20,
            samplers: 2,
            sampling: Duration::from_secs(300),
            warm: Duration::from_secs(30),
            restarts: 5,
            hang: Some(Duration::from_secs(1800)),
            restart_delay: Duration::from_secs(1),
        }
    }
}

impl Settings {
    /// Refuses to be reachable by others without knowing who they are.
    pub fn check(&self) -> Result<(), ServiceError> {
        if self.listen.ip().is_loopback() || !self.tokens.is_empty() {
            return Ok(());
        }
        Err(ServiceError::Setup(format!(
            "{} can be reached by others: give --token-file, or set PATRICKSTAR_TOKEN, or listen on 127.0.0.1",
            self.listen
        )))
    }

    pub(super) fn files(&self) -> PathBuf {
        self.data.join("files")
    }

    /// Where the content of a file is.
    pub(super) fn file(&self, id: &FileId) -> PathBuf {
        self.files().join(format!("{id}.jsonl"))
    }
}
