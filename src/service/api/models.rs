//! Models that a job can train, and those that jobs have trained.

use actix_web::{HttpResponse, web};
use serde_json::Value;

use super::{State, view};
use crate::service::error::ServiceError;
use crate::service::presets::presets;

pub(super) async fn list(state: web::Data<State>) -> Result<HttpResponse, ServiceError> {
    Ok(HttpResponse::Ok().json(view::list(all(&state).await?, false)))
}

pub(super) async fn retrieve(state: web::Data<State>, path: web::Path<String>) -> Result<HttpResponse, ServiceError> {
    let found = all(&state).await?.into_iter().find(|model| model["id"] == path.as_str());
    let model = found.ok_or_else(|| ServiceError::NotFound { what: "model", id: path.chars().take(200).collect() })?;
    Ok(HttpResponse::Ok().json(model))
}

async fn all(state: &State) -> Result<Vec<Value>, ServiceError> {
    let trained = state.store.read(|store| store.trained_models()).await?;
    let mut models: Vec<Value> = presets().iter().map(|preset| view::model(&preset.id, 0, "patrickstar")).collect();
    models.extend(trained.iter().map(|(name, job, finished)| view::model(name, finished.0, job.as_str())));
    Ok(models)
}
