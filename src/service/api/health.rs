//! Whether the service lives, and whether it takes work.

use actix_web::web;

use super::State;
use super::view::{HEALTHY, Health};
use crate::service::error::ServiceError;
use crate::service::store::MetadataFilter;

/// The process answers.
#[utoipa::path(get, path = "/livez", tag = "health", responses((status = 200, body = Health)))]
pub(super) async fn live() -> web::Json<Health> {
    web::Json(HEALTHY)
}

/// The database answers and nobody has asked the service to end.
#[utoipa::path(get, path = "/readyz", tag = "health", responses((status = 200, body = Health)))]
pub(super) async fn ready(state: web::Data<State>) -> Result<web::Json<Health>, ServiceError> {
    if *state.stopping.borrow() {
        return Err(ServiceError::Stopping);
    }
    state.store.read(|store| store.jobs(None, 1, &MetadataFilter::Any)).await?;
    Ok(web::Json(HEALTHY))
}
