//! Whether the service lives, and whether it takes work.

use actix_web::{HttpResponse, web};
use serde_json::json;

use super::State;
use crate::service::error::ServiceError;
use crate::service::store::MetadataFilter;

/// The process answers.
pub(super) async fn live() -> HttpResponse {
    HttpResponse::Ok().json(json!({ "status": "ok" }))
}

/// The database answers and nobody has asked the service to end.
pub(super) async fn ready(state: web::Data<State>) -> Result<HttpResponse, ServiceError> {
    if *state.stopping.borrow() {
        return Err(ServiceError::Stopping);
    }
    state.store.read(|store| store.jobs(None, 1, &MetadataFilter::Any)).await?;
    Ok(HttpResponse::Ok().json(json!({ "status": "ok" })))
}
