//! The timeline of a running job: begun, ended and fetched.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::params::{Params, id};
use super::{State, files, jobs};
use crate::service::error::ServiceError;
use crate::service::store::{JobId, job_directory};
use crate::service::worker::TRACE_FILE;
use crate::service::worker::questions::{Answer, Question};

/// Which job; may be left out while one job runs.
#[derive(Default, Deserialize, ToSchema)]
pub(super) struct TraceRequest {
    job: Option<String>,
}

/// What became of a recording.
#[derive(Serialize, ToSchema)]
pub(super) struct TraceAnswer {
    #[schema(example = "trace")]
    object: &'static str,
    #[schema(value_type = String)]
    job: JobId,
    /// `recording`, or `ready` to be fetched.
    status: &'static str,
    /// Pieces of work that were recorded.
    spans: u64,
}

/// Records what the compute thread, the copy streams and the optimizer do, until it is stopped.
#[utoipa::path(post, path = "/v1/patrickstar/trace/start", tag = "patrickstar", request_body = TraceRequest,
    responses((status = 200, body = TraceAnswer)))]
pub(super) async fn start(
    state: web::Data<State>,
    body: web::Json<TraceRequest>,
) -> Result<web::Json<TraceAnswer>, ServiceError> {
    answer(&state, body.job.as_deref(), Question::StartTrace, "recording").await
}

/// Ends the recording and keeps it in the job's directory, in the place of the one before.
#[utoipa::path(post, path = "/v1/patrickstar/trace/stop", tag = "patrickstar", request_body = TraceRequest,
    responses((status = 200, body = TraceAnswer)))]
pub(super) async fn stop(
    state: web::Data<State>,
    body: web::Json<TraceRequest>,
) -> Result<web::Json<TraceAnswer>, ServiceError> {
    answer(&state, body.job.as_deref(), Question::StopTrace, "ready").await
}

/// The last recording of a job, as Chrome's trace viewer and Perfetto open it.
#[utoipa::path(get, path = "/v1/patrickstar/trace", tag = "patrickstar",
    params(("job" = Option<String>, Query, description = "May be left out while one job runs")),
    responses((status = 200, body = Object, content_type = "application/json")))]
pub(super) async fn download(state: web::Data<State>, request: HttpRequest) -> Result<HttpResponse, ServiceError> {
    let job = chosen(&state, Params::of(&request)?.get("job")).await?;
    let path = job_directory(&state.settings.data, &job).join(TRACE_FILE);
    let file = match tokio::fs::File::open(&path).await {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(ServiceError::NotFound { what: "trace of job", id: job.to_string() });
        }
        Err(error) => return Err(ServiceError::io(&path, error)),
    };
    let bytes = file.metadata().await.map_err(|error| ServiceError::io(&path, error))?.len();
    Ok(files::sent(file, bytes, "application/json"))
}

async fn answer(
    state: &State,
    job: Option<&str>,
    question: Question,
    status: &'static str,
) -> Result<web::Json<TraceAnswer>, ServiceError> {
    let job = chosen(state, job).await?;
    let Answer::Traced { spans } = state.supervisor.ask(&job, question).await? else {
        return Err(ServiceError::Internal("a worker answered something else than it was asked".into()));
    };
    Ok(web::Json(TraceAnswer { object: "trace", job, status, spans }))
}

/// The job that is named, or the only one that runs.
async fn chosen(state: &State, job: Option<&str>) -> Result<JobId, ServiceError> {
    if let Some(text) = job {
        // Of an id in a query or a body, not in a path.
        let wanted: JobId = id("fine-tuning job", text)?;
        return Ok(jobs::find(state, wanted.as_str()).await?.id);
    }
    let [job] = <[JobId; 1]>::try_from(state.supervisor.running_jobs())
        .map_err(|jobs| ServiceError::invalid("job", format!("{} jobs run now: say which with `job`", jobs.len())))?;
    Ok(job)
}
