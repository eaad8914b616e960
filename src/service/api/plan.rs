//! Will it fit: the prediction of `patrickstar plan`, without the speeds that only measuring this machine would tell.

use actix_web::{HttpResponse, web};
use serde_json::{Value, json};

use super::State;
use crate::config::Config;
use crate::data::Tokenizer;
use crate::error::Error;
use crate::plan::Plan;
use crate::service::error::ServiceError;
use crate::service::request::PlanRequest;
use crate::train::model::build;
use crate::train::program::Program;

pub(super) async fn plan(state: web::Data<State>, body: web::Json<PlanRequest>) -> Result<HttpResponse, ServiceError> {
    let config = body.into_inner().config(state.settings.config.as_deref())?;
    let planned = web::block(move || predict(config)).await;
    let planned = planned.map_err(|error| ServiceError::Internal(format!("planning ended badly: {error}")))?;
    let value = planned.map_err(|error| ServiceError::invalid("patrickstar", error.to_string()))?;
    Ok(HttpResponse::Ok().json(value))
}

fn predict(mut config: Config) -> Result<Value, Error> {
    let tokenizer = Tokenizer::load(&config.data.tokenizer)?;
    let (_, blocks) = build(&mut config, &tokenizer)?;
    let plan = Plan::new(&config, &Program::new(&blocks)?)?;
    let mut value = json!(plan);
    value["object"] = json!("patrickstar.plan");
    value["fits"] = json!(plan.fits());
    Ok(value)
}
