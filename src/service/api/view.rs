//! Stored things as clients see them. Every key of OpenAI's objects is always there: some clients check.

use serde_json::{Value, json};

use crate::service::store::{CheckpointRow, EventRow, FileRow, JobId, JobRow, Status};

pub(super) fn job(job: &JobRow) -> Value {
    let error =
        job.failure.as_ref().map(|failure| json!({ "code": failure.code, "message": failure.message, "param": null }));
    let result_files: Vec<&str> = job.result_file.iter().map(|file| file.as_str()).collect();
    let total_steps = job.validated.then(|| job.config.pointer("/train/steps")).flatten();
    json!({
        "object": "fine_tuning.job",
        "id": job.id,
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "status": job.status.name(),
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": "patrickstar",
        "training_file": job.training_file,
        "validation_file": null,
        "result_files": result_files,
        "trained_tokens": (job.status == Status::Succeeded).then_some(job.trained_tokens),
        "hyperparameters": job.hyperparameters,
        "method": { "type": "supervised", "supervised": { "hyperparameters": job.hyperparameters } },
        "seed": job.seed,
        "user_provided_suffix": job.suffix,
        "metadata": job.metadata,
        "integrations": [],
        "estimated_finish": null,
        "error": error,
        "patrickstar": {
            "step": job.step,
            "total_steps": total_steps,
            "trained_tokens": job.trained_tokens,
            "device": job.device,
            "priority": job.priority,
            "restarts": job.restarts,
        },
    })
}

pub(super) fn event(event: &EventRow) -> Value {
    json!({
        "object": "fine_tuning.job.event",
        "id": event.id,
        "created_at": event.created_at,
        "level": event.level.name(),
        "message": event.message,
        "type": if event.step.is_some() { "metrics" } else { "message" },
        "data": event.data,
    })
}

pub(super) fn checkpoint(job: &JobRow, row: &CheckpointRow) -> Value {
    let tail = job.id.as_str().trim_start_matches(JobId::PREFIX);
    let suffix = job.suffix.as_deref().unwrap_or_default();
    json!({
        "object": "fine_tuning.job.checkpoint",
        "id": row.id,
        "created_at": row.created_at,
        "fine_tuning_job_id": job.id,
        "fine_tuned_model_checkpoint": format!("ft:{}:patrickstar:{suffix}:{tail}:ckpt-step-{}", job.model, row.step),
        "step_number": row.step,
        "metrics": { "step": row.step, "train_loss": row.train_loss },
    })
}

pub(super) fn file(file: &FileRow) -> Value {
    json!({
        "object": "file",
        "id": file.id,
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.name,
        "purpose": file.purpose.name(),
        "status": "processed",
        "status_details": null,
        "expires_at": null,
    })
}

pub(super) fn model(id: &str, created: i64, owner: &str) -> Value {
    json!({ "object": "model", "id": id, "created": created, "owned_by": owner })
}

/// A page of a list. Clients that page by themselves stop at `has_more` only.
pub(super) fn list(data: Vec<Value>, has_more: bool) -> Value {
    let id = |item: Option<&Value>| item.and_then(|item| item.get("id")).cloned().unwrap_or_default();
    let (first, last) = (id(data.first()), id(data.last()));
    json!({ "object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more })
}
