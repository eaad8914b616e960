//! Stored things as clients see them. Every key of OpenAI's objects is always there: some clients check.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::completions::STEP_MARK;
use crate::service::hyperparameters::HyperparametersShape;
use crate::service::store::{
    CheckpointId, CheckpointRow, EventId, EventRow, FileId, FileRow, JobId, JobRow, Level, Purpose, Status, UnixTime,
};

/// A part of a list. Clients that page by themselves stop at `has_more` only.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct List<T> {
    #[schema(example = "list")]
    object: &'static str,
    data: Vec<T>,
    /// Id of the first.
    #[schema(required)]
    first_id: Option<String>,
    /// Id of the last: send it as `after` for the next page.
    #[schema(required)]
    last_id: Option<String>,
    has_more: bool,
}

/// What a list can hold.
pub(super) trait Listed {
    /// What clients page by.
    fn id(&self) -> &str;
}

impl<T: Listed> List<T> {
    pub fn new(data: Vec<T>, has_more: bool) -> Self {
        let id = |item: Option<&T>| item.map(|item| item.id().to_owned());
        List { object: "list", first_id: id(data.first()), last_id: id(data.last()), data, has_more }
    }
}

/// A job.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FineTuningJob)]
pub(super) struct Job {
    #[schema(example = "fine_tuning.job")]
    object: &'static str,
    id: JobId,
    created_at: UnixTime,
    #[schema(required)]
    finished_at: Option<UnixTime>,
    status: Status,
    model: String,
    /// Name of the trained model, once there is one.
    #[schema(required)]
    fine_tuned_model: Option<String>,
    organization_id: &'static str,
    training_file: FileId,
    #[schema(required)]
    validation_file: Option<FileId>,
    result_files: Vec<FileId>,
    /// Once the job has succeeded.
    #[schema(required)]
    trained_tokens: Option<u64>,
    #[schema(value_type = HyperparametersShape)]
    hyperparameters: Value,
    method: Method,
    seed: u32,
    #[schema(required)]
    user_provided_suffix: Option<String>,
    #[schema(value_type = std::collections::HashMap<String, String>)]
    metadata: Map<String, Value>,
    integrations: Vec<Value>,
    #[schema(required)]
    estimated_finish: Option<UnixTime>,
    #[schema(required)]
    error: Option<JobError>,
    patrickstar: JobProgress,
}

/// How a job trains.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Method {
    #[serde(rename = "type")]
    #[schema(example = "supervised")]
    kind: &'static str,
    supervised: Supervised,
}

/// The one method that is supported.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Supervised {
    #[schema(value_type = HyperparametersShape)]
    hyperparameters: Value,
}

/// Why a job failed.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobError {
    code: String,
    message: String,
    #[schema(required)]
    param: Option<String>,
}

/// How far a job is.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobProgress {
    step: u64,
    /// Once the file was read.
    #[schema(required)]
    total_steps: Option<u64>,
    trained_tokens: u64,
    /// What it needs for itself.
    device: String,
    priority: i32,
    /// Times that its worker died since the last checkpoint.
    restarts: u32,
}

impl Listed for Job {
    fn id(&self) -> &str {
        self.id.as_str()
    }
}

impl From<&JobRow> for Job {
    fn from(job: &JobRow) -> Self {
        let error = job.failure.as_ref().map(|failure| JobError {
            code: failure.code.clone(),
            message: failure.message.clone(),
            param: None,
        });
        let total_steps = job.validated.then(|| job.config.pointer("/train/steps")?.as_u64()).flatten();
        Job {
            object: "fine_tuning.job",
            id: job.id.clone(),
            created_at: job.created_at,
            finished_at: job.finished_at,
            status: job.status,
            model: job.model.clone(),
            fine_tuned_model: job.fine_tuned_model.clone(),
            organization_id: "patrickstar",
            training_file: job.training_file.clone(),
            validation_file: job.validation_file.clone(),
            result_files: job.result_file.iter().cloned().collect(),
            trained_tokens: (job.status == Status::Succeeded).then_some(job.trained_tokens),
            hyperparameters: job.hyperparameters.clone(),
            method: Method {
                kind: "supervised",
                supervised: Supervised { hyperparameters: job.hyperparameters.clone() },
            },
            seed: job.seed,
            user_provided_suffix: job.suffix.clone(),
            metadata: job.metadata.clone(),
            integrations: Vec::new(),
            // A job that does not run has no pace.
            estimated_finish: job.estimated_finish.filter(|_| job.status == Status::Running),
            error,
            patrickstar: JobProgress {
                step: job.step,
                total_steps,
                trained_tokens: job.trained_tokens,
                device: job.device.clone(),
                priority: job.priority,
                restarts: job.restarts,
            },
        }
    }
}

/// Something that happened to a job.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FineTuningJobEvent)]
pub(super) struct Event {
    #[schema(example = "fine_tuning.job.event")]
    object: &'static str,
    id: EventId,
    created_at: UnixTime,
    level: Level,
    message: String,
    #[serde(rename = "type")]
    pub kind: EventKind,
    /// The metrics of a step; empty for messages.
    #[schema(value_type = Object)]
    data: Value,
}

/// What an event holds.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum EventKind {
    Message,
    Metrics,
}

impl EventKind {
    /// As it is written in JSON.
    pub fn name(self) -> &'static str {
        match self {
            EventKind::Message => "message",
            EventKind::Metrics => "metrics",
        }
    }
}

impl Listed for Event {
    fn id(&self) -> &str {
        self.id.as_str()
    }
}

impl From<&EventRow> for Event {
    fn from(event: &EventRow) -> Self {
        Event {
            object: "fine_tuning.job.event",
            id: event.id.clone(),
            created_at: event.created_at,
            level: event.level,
            message: event.message.clone(),
            kind: if event.step.is_some() { EventKind::Metrics } else { EventKind::Message },
            data: event.data.clone(),
        }
    }
}

/// A checkpoint of a job.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FineTuningJobCheckpoint)]
pub(super) struct Checkpoint {
    #[schema(example = "fine_tuning.job.checkpoint")]
    object: &'static str,
    id: CheckpointId,
    created_at: UnixTime,
    fine_tuning_job_id: JobId,
    fine_tuned_model_checkpoint: String,
    step_number: u64,
    metrics: CheckpointMetrics,
}

/// The metrics of a checkpoint's last step.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct CheckpointMetrics {
    step: u64,
    #[schema(required)]
    train_loss: Option<f64>,
    /// On the validation file, where it was due in that step.
    #[schema(required)]
    valid_loss: Option<f64>,
}

impl Listed for Checkpoint {
    fn id(&self) -> &str {
        self.id.as_str()
    }
}

impl Checkpoint {
    pub fn new(job: &JobRow, row: &CheckpointRow) -> Self {
        Checkpoint {
            object: "fine_tuning.job.checkpoint",
            id: row.id.clone(),
            created_at: row.created_at,
            fine_tuning_job_id: job.id.clone(),
            fine_tuned_model_checkpoint: format!("{}{STEP_MARK}{}", job.trained_name(), row.step),
            step_number: row.step,
            metrics: CheckpointMetrics {
                step: row.step,
                train_loss: row.losses.train_loss,
                valid_loss: row.losses.valid_loss,
            },
        }
    }
}

/// A stored file.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = OpenAIFile)]
pub(super) struct File {
    #[schema(example = "file")]
    object: &'static str,
    id: FileId,
    bytes: u64,
    created_at: UnixTime,
    /// The client's name for it.
    filename: String,
    purpose: Purpose,
    #[schema(example = "processed")]
    status: &'static str,
    #[schema(required)]
    status_details: Option<String>,
    #[schema(required)]
    expires_at: Option<UnixTime>,
}

impl Listed for File {
    fn id(&self) -> &str {
        self.id.as_str()
    }
}

impl From<&FileRow> for File {
    fn from(file: &FileRow) -> Self {
        File {
            object: "file",
            id: file.id.clone(),
            bytes: file.bytes,
            created_at: file.created_at,
            filename: file.name.clone(),
            purpose: file.purpose,
            status: "processed",
            status_details: None,
            expires_at: None,
        }
    }
}

/// A file that is gone.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DeletedFile {
    #[schema(example = "file")]
    object: &'static str,
    id: FileId,
    deleted: bool,
}

impl DeletedFile {
    pub fn new(id: FileId) -> Self {
        DeletedFile { object: "file", id, deleted: true }
    }
}

/// A model that can be trained or sampled.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Model {
    #[schema(example = "model")]
    object: &'static str,
    pub id: String,
    created: UnixTime,
    /// `patrickstar`, or the job that trained it.
    owned_by: String,
}

impl Listed for Model {
    fn id(&self) -> &str {
        &self.id
    }
}

impl Model {
    pub fn new(id: String, created: UnixTime, owned_by: &str) -> Self {
        Model { object: "model", id, created, owned_by: owned_by.to_owned() }
    }
}

/// The service works.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Health {
    #[schema(example = "ok")]
    status: &'static str,
}

/// As it should be.
pub(super) const HEALTHY: Health = Health { status: "ok" };
