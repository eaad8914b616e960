//! What happened to a job, and what it saved.

use actix_web::{HttpRequest, HttpResponse, web};

use super::params::Params;
use super::{State, jobs, view};
use crate::service::error::ServiceError;
use crate::service::store::{CheckpointId, EventId};

pub(super) async fn events(
    state: web::Data<State>,
    path: web::Path<String>,
    request: HttpRequest,
) -> Result<HttpResponse, ServiceError> {
    let params = Params::of(&request)?;
    let (after, limit) = (params.after::<EventId>()?, params.limit(20, 1000)?);
    let job = jobs::find(&state, &path).await?;
    let page = state.store.read(move |store| store.events(&job.id, after.as_ref(), limit)).await?;
    Ok(HttpResponse::Ok().json(view::list(page.rows.iter().map(view::event).collect(), page.has_more)))
}

pub(super) async fn checkpoints(
    state: web::Data<State>,
    path: web::Path<String>,
    request: HttpRequest,
) -> Result<HttpResponse, ServiceError> {
    let params = Params::of(&request)?;
    let (after, limit) = (params.after::<CheckpointId>()?, params.limit(10, 100)?);
    let job = jobs::find(&state, &path).await?;
    let id = job.id.clone();
    let page = state.store.read(move |store| store.checkpoints(&id, after.as_ref(), limit)).await?;
    let data = page.rows.iter().map(|row| view::checkpoint(&job, row)).collect();
    Ok(HttpResponse::Ok().json(view::list(data, page.has_more)))
}
