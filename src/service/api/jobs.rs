//! Jobs: created, listed, and told to stop or go on.

use actix_web::{HttpRequest, HttpResponse, web};

use super::params::{Params, id};
use super::{State, view};
use crate::service::error::ServiceError;
use crate::service::request::JobRequest;
use crate::service::store::{JobId, JobRow, NewEvent, Purpose, Status};

pub(super) async fn create(state: web::Data<State>, body: web::Json<JobRequest>) -> Result<HttpResponse, ServiceError> {
    if *state.stopping.borrow() {
        return Err(ServiceError::Stopping);
    }
    let file = body.training_file()?;
    let job = body.into_inner().into_job(state.settings.config.as_deref())?;
    let wanted = file.clone();
    let found = state.store.read(move |store| store.file(&wanted)).await?;
    if !found.is_some_and(|file| file.purpose == Purpose::FineTune) {
        return Err(ServiceError::Invalid {
            message: format!("no such file to train on: {file}: upload it to /v1/files with purpose fine-tune"),
            param: Some("training_file".into()),
            code: "file_not_found",
        });
    }
    let most = state.settings.limits.waiting_jobs;
    let created = state.store.write(move |store| store.create_job(&job, most)).await?;
    let created = created.ok_or(ServiceError::QueueFull(most))?;
    state.supervisor.look();
    Ok(HttpResponse::Ok().json(view::job(&created)))
}

pub(super) async fn list(state: web::Data<State>, request: HttpRequest) -> Result<HttpResponse, ServiceError> {
    let params = Params::of(&request)?;
    let (after, limit, filter) = (params.after::<JobId>()?, params.limit(20, 100)?, params.metadata());
    let page = state.store.read(move |store| store.jobs(after.as_ref(), limit, &filter)).await?;
    Ok(HttpResponse::Ok().json(view::list(page.rows.iter().map(view::job).collect(), page.has_more)))
}

pub(super) async fn retrieve(state: web::Data<State>, path: web::Path<String>) -> Result<HttpResponse, ServiceError> {
    Ok(HttpResponse::Ok().json(view::job(&find(&state, &path).await?)))
}

pub(super) async fn cancel(state: web::Data<State>, path: web::Path<String>) -> Result<HttpResponse, ServiceError> {
    let job = change(&state, &path, Status::Cancelled, "The job was cancelled").await?;
    state.supervisor.cancel(&job.id);
    Ok(HttpResponse::Ok().json(view::job(&job)))
}

pub(super) async fn pause(state: web::Data<State>, path: web::Path<String>) -> Result<HttpResponse, ServiceError> {
    let job = change(&state, &path, Status::Paused, "The job was paused").await?;
    state.supervisor.pause(&job.id);
    Ok(HttpResponse::Ok().json(view::job(&job)))
}

pub(super) async fn resume(state: web::Data<State>, path: web::Path<String>) -> Result<HttpResponse, ServiceError> {
    let id: JobId = id("fine-tuning job", &path)?;
    let resumed = state.store.write(move |store| store.resume_job(&id)).await?;
    let Some(job) = resumed else { return Err(refusal(&find(&state, &path).await?, "resumed")) };
    state.supervisor.look();
    Ok(HttpResponse::Ok().json(view::job(&job)))
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
