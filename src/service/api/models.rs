//! Models that a job can train, and those that jobs have trained.

use actix_web::web;

use super::State;
use super::view::{List, Model};
use crate::service::error::ServiceError;
use crate::service::presets::presets;
use crate::service::store::UnixTime;

/// Models that a job can train, and those that jobs have trained.
#[utoipa::path(get, path = "/v1/models", tag = "models", responses((status = 200, body = List<Model>)))]
pub(super) async fn list(state: web::Data<State>) -> Result<web::Json<List<Model>>, ServiceError> {
    Ok(web::Json(List::new(all(&state).await?, false)))
}

/// One of them.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "models", params(("id" = String, Path)),
    responses((status = 200, body = Model)))]
pub(super) async fn retrieve(
    state: web::Data<State>,
    path: web::Path<String>,
) -> Result<web::Json<Model>, ServiceError> {
    let found = all(&state).await?.into_iter().find(|model| model.id == *path);
    let model = found.ok_or_else(|| ServiceError::NotFound { what: "model", id: path.chars().take(200).collect() })?;
    Ok(web::Json(model))
}

async fn all(state: &State) -> Result<Vec<Model>, ServiceError> {
    let trained = state.store.read(|store| store.trained_models()).await?;
    let own = |id: String| Model::new(id, UnixTime(0), "patrickstar");
    let mut models: Vec<Model> = presets().into_iter().map(|preset| own(preset.id)).collect();
    models.extend(state.settings.model_roots.list().into_iter().map(own));
    models.extend(trained.into_iter().map(|(name, job, finished)| Model::new(name, finished, job.as_str())));
    Ok(models)
}
