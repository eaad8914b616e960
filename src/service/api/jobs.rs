//! Jobs: created, listed, and told to stop or go on.

use actix_web::{HttpRequest, web};

use super::State;
use super::params::{Page, Params, id};
use super::view::{Job, List};
use crate::service::error::ServiceError;
use crate::service::request::JobRequest;
use crate::service::store::{JobId, JobRow, NewEvent, Purpose, Status};

/// Creates a job; it waits until its device is free.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs", tag = "jobs", request_body = JobRequest,
    responses((status = 200, body = Job)))]
pub(super) async fn create(
    state: web::Data<State>,
    body: web::Json<JobRequest>,
) -> Result<web::Json<Job>, ServiceError> {
    if *state.stopping.borrow() {
        return Err(ServiceError::Stopping);
    }
    let files = [("training_file", Some(body.training_file()?)), ("validation_file", body.validation_file()?)];
    let job = body.into_inner().into_job(&state.live.loaded(), &state.settings.model_roots)?;
    for (param, file) in files {
        let Some(file) = file else { continue };
        let wanted = file.clone();
        let found = state.store.read(move |store| store.file(&wanted)).await?;
        if !found.is_some_and(|file| file.purpose == Purpose::FineTune) {
            return Err(ServiceError::Invalid {
                message: format!("no such file to train on: {file}: upload it to /v1/files with purpose fine-tune"),
                param: Some(param.into()),
                code: "file_not_found",
            });
        }
    }
    let most = state.settings.limits.waiting_jobs;
    let created = state.store.write(move |store| store.create_job(&job, most)).await?;
    let created = created.ok_or(ServiceError::QueueFull(most))?;
    state.supervisor.look();
    Ok(web::Json(Job::from(&created)))
}

/// Jobs, newest first. `metadata[key]=value` shows only those with this pair, `metadata=null` those without any.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs", tag = "jobs", params(Page),
    responses((status = 200, body = List<Job>)))]
pub(super) async fn list(state: web::Data<State>, request: HttpRequest) -> Result<web::Json<List<Job>>, ServiceError> {
    let params = Params::of(&request)?;
    let (after, limit, filter) = (params.after::<JobId>()?, params.limit(20, 100)?, params.metadata());
    let page = state.store.read(move |store| store.jobs(after.as_ref(), limit, &filter)).await?;
    Ok(web::Json(List::new(page.rows.iter().map(Job::from).collect(), page.has_more)))
}

/// One job.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{id}", tag = "jobs", params(("id" = String, Path)),
    responses((status = 200, body = Job)))]
pub(super) async fn retrieve(state: web::Data<State>, path: web::Path<String>) -> Result<web::Json<Job>, ServiceError> {
    Ok(web::Json(Job::from(&find(&state, &path).await?)))
}

/// Ends a job; its worker leaves at once.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs/{id}/cancel", tag = "jobs", params(("id" = String, Path)),
    responses((status = 200, body = Job)))]
pub(super) async fn cancel(state: web::Data<State>, path: web::Path<String>) -> Result<web::Json<Job>, ServiceError> {
    let job = change(&state, &path, Status::Cancelled, "The job was cancelled").await?;
    state.supervisor.cancel(&job.id);
    Ok(web::Json(Job::from(&job)))
}

/// Lets a job finish its step, save a checkpoint and free its device.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs/{id}/pause", tag = "jobs", params(("id" = String, Path)),
    responses((status = 200, body = Job)))]
pub(super) async fn pause(state: web::Data<State>, path: web::Path<String>) -> Result<web::Json<Job>, ServiceError> {
    let job = change(&state, &path, Status::Paused, "The job was paused").await?;
    state.supervisor.pause(&job.id);
    Ok(web::Json(Job::from(&job)))
}

/// Puts a paused job back in the queue, to go on with the same bits.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs/{id}/resume", tag = "jobs", params(("id" = String, Path)),
    responses((status = 200, body = Job)))]
pub(super) async fn resume(state: web::Data<State>, path: web::Path<String>) -> Result<web::Json<Job>, ServiceError> {
    let id: JobId = id("fine-tuning job", &path)?;
    let resumed = state.store.write(move |store| store.resume_job(&id)).await?;
    let Some(job) = resumed else { return Err(refusal(&find(&state, &path).await?, "resumed")) };
    state.supervisor.look();
    Ok(web::Json(Job::from(&job)))
}

/// The job of a path.
pub(super) async fn find(state: &State, text: &str) -> Result<JobRow, ServiceError> {
    let wanted: JobId = id("fine-tuning job", text)?;
    let found = state.store.read(move |store| store.job(&wanted)).await?;
    found.ok_or_else(|| ServiceError::NotFound { what: "fine-tuning job", id: text.to_owned() })
}

async fn change(state: &State, text: &str, next: Status, event: &str) -> Result<JobRow, ServiceError> {
    let wanted: JobId = id("fine-tuning job", text)?;
    let event = NewEvent::info(event.to_owned());
    let changed = state.store.write(move |store| store.change_status(&wanted, next, &event)).await?;
    match changed {
        Some(job) => Ok(job),
        None => Err(refusal(&find(state, text).await?, next.name())),
    }
}

/// Not a conflict (409): clients would send the same again, and again.
fn refusal(job: &JobRow, wanted: &str) -> ServiceError {
    ServiceError::Invalid {
        message: format!("job {} is {}: it cannot be {wanted} any more, or again", job.id, job.status),
        param: None,
        code: "invalid_job_state",
    }
}
