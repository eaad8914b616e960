//! The configuration that jobs begin with, seen and changed while the service runs.

use actix_web::web;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::State;
use crate::config::{Changes, Config, LIVE_KEYS};
use crate::service::error::ServiceError;

/// The configuration in force.
#[derive(Serialize, ToSchema)]
pub(super) struct ConfigAnswer {
    #[schema(example = "config")]
    object: &'static str,
    /// Every key, nested.
    #[schema(value_type = Object)]
    config: Config,
    /// Keys that apply at once where they change.
    live: [&'static str; LIVE_KEYS.len()],
    /// The file that it came from.
    source: Option<String>,
}

/// What became of a change.
#[derive(Serialize, ToSchema)]
pub(super) struct ConfigChange {
    #[schema(example = "config_change")]
    object: &'static str,
    /// Keys that apply from now on, to running jobs too.
    applied: Vec<String>,
    /// Keys that hold for jobs to come only.
    needs_restart: Vec<String>,
    /// How many keys are as they were.
    unchanged: usize,
}

/// What jobs begin with, where they do not say otherwise.
#[utoipa::path(get, path = "/v1/patrickstar/config", tag = "patrickstar", responses((status = 200, body = ConfigAnswer)))]
pub(super) async fn show(state: web::Data<State>) -> web::Json<ConfigAnswer> {
    web::Json(ConfigAnswer {
        object: "config",
        config: state.live.loaded().config.clone(),
        live: LIVE_KEYS,
        source: state.live.source().map(|path| path.display().to_string()),
    })
}

/// Takes over a whole configuration, or single keys of it as `{"set": {"actors.eviction.policy": "lru"}}`.
#[utoipa::path(put, path = "/v1/patrickstar/config", tag = "patrickstar", request_body = Object,
    responses((status = 200, body = ConfigChange)))]
pub(super) async fn change(
    state: web::Data<State>,
    body: web::Json<Value>,
) -> Result<web::Json<ConfigChange>, ServiceError> {
    let changes = match body.as_object() {
        Some(object) if object.len() == 1 && object.contains_key("set") => {
            state.live.change(&object["set"], false).await
        }
        _ => state.live.change(&body, true).await,
    };
    let Changes { applied, needs_restart, unchanged } = changes.map_err(|error| match error {
        // It is the client's, not the service's.
        ServiceError::Config(error) => ServiceError::invalid("config", error.to_string()),
        other => other,
    })?;
    Ok(web::Json(ConfigChange { object: "config_change", applied, needs_restart, unchanged }))
}
