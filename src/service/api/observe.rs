//! What goes on inside of running jobs: where their chunks are, and how their actors are.

use actix_web::web;
use serde::Serialize;
use utoipa::ToSchema;

use super::{State, jobs};
use crate::service::error::ServiceError;
use crate::service::store::JobId;
use crate::service::worker::questions::{ActorState, Answer, ChunkMap, Question};

/// Every chunk of a job at one instant.
#[derive(Serialize, ToSchema)]
pub(super) struct ChunkMapAnswer {
    #[schema(example = "chunk_map")]
    object: &'static str,
    #[schema(value_type = String)]
    job: JobId,
    #[serde(flatten)]
    map: ChunkMap,
}

/// An actor, and whose.
#[derive(Serialize, ToSchema)]
pub(super) struct ActorOfJob {
    /// Null for the service's own.
    #[schema(value_type = Option<String>)]
    job: Option<JobId>,
    #[serde(flatten)]
    actor: ActorState,
}

/// All actors.
#[derive(Serialize, ToSchema)]
pub(super) struct ActorList {
    #[schema(example = "list")]
    object: &'static str,
    data: Vec<ActorOfJob>,
}

/// Where every chunk of a running job is.
#[utoipa::path(get, path = "/v1/patrickstar/jobs/{id}/chunks", tag = "patrickstar", params(("id" = String, Path)),
    responses((status = 200, body = ChunkMapAnswer)))]
pub(super) async fn chunks(
    state: web::Data<State>,
    path: web::Path<String>,
) -> Result<web::Json<ChunkMapAnswer>, ServiceError> {
    let job = jobs::find(&state, &path).await?.id;
    let Answer::Chunks(map) = state.supervisor.ask(&job, Question::Chunks).await? else {
        return Err(ServiceError::Internal("a worker answered something else than it was asked".into()));
    };
    Ok(web::Json(ChunkMapAnswer { object: "chunk_map", job, map }))
}

/// Actors of all jobs that run, and the supervisor.
#[utoipa::path(get, path = "/v1/patrickstar/actors", tag = "patrickstar", responses((status = 200, body = ActorList)))]
pub(super) async fn actors(state: web::Data<State>) -> web::Json<ActorList> {
    let mut data = vec![ActorOfJob { job: None, actor: state.supervisor.status() }];
    for (job, answer) in state.supervisor.ask_all(Question::Actors).await {
        if let Answer::Actors(actors) = answer {
            data.extend(actors.into_iter().map(|actor| ActorOfJob { job: Some(job.clone()), actor }));
        }
    }
    web::Json(ActorList { object: "list", data })
}
