//! What happened to a job, and what it saved.

use actix_web::{HttpRequest, web};

use super::params::{Page, Params};
use super::view::{Checkpoint, Event, List};
use super::{State, jobs};
use crate::service::error::ServiceError;
use crate::service::store::{CheckpointId, EventId};

/// What happened to a job, newest first.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{id}/events", tag = "jobs", params(("id" = String, Path), Page),
    responses((status = 200, body = List<Event>)))]
pub(super) async fn events(
    state: web::Data<State>,
    path: web::Path<String>,
    request: HttpRequest,
) -> Result<web::Json<List<Event>>, ServiceError> {
    let params = Params::of(&request)?;
    let (after, limit) = (params.after::<EventId>()?, params.limit(20, 1000)?);
    let job = jobs::find(&state, &path).await?;
    let page = state.store.read(move |store| store.events(&job.id, after.as_ref(), limit)).await?;
    Ok(web::Json(List::new(page.rows.iter().map(Event::from).collect(), page.has_more)))
}

/// Checkpoints that still exist, newest first.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{id}/checkpoints", tag = "jobs", params(("id" = String, Path), Page),
    responses((status = 200, body = List<Checkpoint>)))]
pub(super) async fn checkpoints(
    state: web::Data<State>,
    path: web::Path<String>,
    request: HttpRequest,
) -> Result<web::Json<List<Checkpoint>>, ServiceError> {
    let params = Params::of(&request)?;
    let (after, limit) = (params.after::<CheckpointId>()?, params.limit(10, 100)?);
    let job = jobs::find(&state, &path).await?;
    let id = job.id.clone();
    let page = state.store.read(move |store| store.checkpoints(&id, after.as_ref(), limit)).await?;
    let data = page.rows.iter().map(|row| Checkpoint::new(&job, row)).collect();
    Ok(web::Json(List::new(data, page.has_more)))
}
