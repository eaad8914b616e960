//! Will it fit: the prediction of `patrickstar plan`, without the speeds that only measuring this machine would tell.

use actix_web::web;
use serde::Serialize;
use utoipa::ToSchema;

use super::State;
use crate::config::Config;
use crate::data::Tokenizer;
use crate::error::Error;
use crate::plan::Plan;
use crate::service::error::ServiceError;
use crate::service::request::PlanRequest;
use crate::train::model::build;
use crate::train::program::Program;

/// The prediction for a job.
#[derive(Serialize, ToSchema)]
pub(super) struct PlanAnswer {
    #[schema(example = "patrickstar.plan")]
    object: &'static str,
    fits: bool,
    /// The numbers of `patrickstar plan --json`.
    #[serde(flatten)]
    #[schema(value_type = std::collections::HashMap<String, serde_json::Value>)]
    plan: Plan,
}

/// Says whether a job would fit, before there is one.
#[utoipa::path(post, path = "/v1/patrickstar/plan", tag = "patrickstar", request_body = PlanRequest,
    responses((status = 200, body = PlanAnswer)))]
pub(super) async fn plan(
    state: web::Data<State>,
    body: web::Json<PlanRequest>,
) -> Result<web::Json<PlanAnswer>, ServiceError> {
    let config = body.into_inner().config(&state.live.loaded(), &state.settings.model_roots)?;
    let planned = web::block(move || predict(config)).await;
    let planned = planned.map_err(|error| ServiceError::Internal(format!("planning ended badly: {error}")))?;
    let answer = planned.map_err(|error| ServiceError::invalid("patrickstar", error.to_string()))?;
    Ok(web::Json(answer))
}

fn predict(mut config: Config) -> Result<PlanAnswer, Error> {
    let tokenizer = Tokenizer::load(&config.data.tokenizer)?;
    let (_, blocks) = build(&mut config, &tokenizer)?;
    let plan = Plan::new(&config, &Program::new(&blocks, config.model.embedding)?)?;
    Ok(PlanAnswer { object: "patrickstar.plan", fits: plan.fits(), plan })
}
