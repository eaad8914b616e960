//! Errors as HTTP: the one place that knows which status each has, in the shape that OpenAI clients read.

use actix_web::error::JsonPayloadError;
use actix_web::http::StatusCode;
use actix_web::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use actix_web::{HttpRequest, HttpResponse, ResponseError};
use serde::Serialize;
use utoipa::ToSchema;

use super::pace::was_too_slow;
use crate::service::error::ServiceError;
use crate::service::store::StoreError;

/// What every refusal says.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Error)]
pub(super) struct ErrorAnswer {
    error: ErrorDetails,
}

/// All four keys are always there: clients read them without asking.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ErrorDetails {
    /// For people.
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    /// The field at fault.
    #[schema(required)]
    param: Option<String>,
    /// For programs.
    #[schema(required)]
    code: Option<String>,
}

/// Seconds after which a refused client may try again.
const RETRY: u32 = 10;

impl ResponseError for ServiceError {
    fn status_code(&self) -> StatusCode {
        match self {
            ServiceError::Store(StoreError::NoCursor { .. } | StoreError::BadId { .. })
            | ServiceError::Invalid { .. }
            | ServiceError::NotRunning(_) => StatusCode::BAD_REQUEST,
            ServiceError::Unauthorized => StatusCode::UNAUTHORIZED,
            ServiceError::Forbidden(_) | ServiceError::Origin(_) => StatusCode::FORBIDDEN,
            ServiceError::NotFound { .. } | ServiceError::NoRoute(_) => StatusCode::NOT_FOUND,
            ServiceError::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
            ServiceError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            ServiceError::Slow => StatusCode::REQUEST_TIMEOUT,
            ServiceError::QueueFull(_) | ServiceError::SamplersBusy(_) | ServiceError::TooMany { .. } => {
                StatusCode::TOO_MANY_REQUESTS
            }
            ServiceError::Stopping | ServiceError::NoAnswer(_) | ServiceError::Sampling(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            ServiceError::DiskFull { .. } => StatusCode::INSUFFICIENT_STORAGE,
            ServiceError::Store(_)
            | ServiceError::Io { .. }
            | ServiceError::Setup(_)
            | ServiceError::Config(_)
            | ServiceError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn error_response(&self) -> HttpResponse {
        let status = self.status_code();
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!("a request failed: {self}");
        }
        let mut response = HttpResponse::build(status);
        match self {
            ServiceError::QueueFull(_) | ServiceError::SamplersBusy(_) | ServiceError::Stopping => {
                response.insert_header((RETRY_AFTER, RETRY.to_string()));
            }
            ServiceError::TooMany { wait } => {
                response.insert_header((RETRY_AFTER, (wait.as_secs_f64().ceil() as u64).to_string()));
            }
            ServiceError::NoAnswer(_) => {
                response.insert_header((RETRY_AFTER, "1"));
            }
            ServiceError::Unauthorized => {
                response.insert_header((WWW_AUTHENTICATE, "Bearer"));
            }
            // What went wrong once costs as much the next time; clients of OpenAI's ask this.
            ServiceError::Sampling(_) => {
                response.insert_header(("x-should-retry", "false"));
            }
            _ => {}
        }
        response.json(refusal(self))
    }
}

/// An error as clients read it.
pub(super) fn refusal(error: &ServiceError) -> ErrorAnswer {
    envelope(error.status_code(), &error.to_string(), param(error), Some(code(error)))
}

fn param(error: &ServiceError) -> Option<&str> {
    match error {
        ServiceError::Invalid { param, .. } => param.as_deref(),
        ServiceError::Store(StoreError::NoCursor { .. }) => Some("after"),
        _ => None,
    }
}

fn code(error: &ServiceError) -> &str {
    match error {
        ServiceError::Invalid { code, .. } => code,
        ServiceError::Store(StoreError::NoCursor { .. } | StoreError::BadId { .. }) => "invalid_value",
        ServiceError::Unauthorized => "invalid_api_key",
        ServiceError::Forbidden(_) => "insufficient_scope",
        ServiceError::Origin(_) => "origin_not_allowed",
        ServiceError::NotFound { .. } => "not_found",
        ServiceError::NoRoute(_) => "unknown_url",
        ServiceError::Method(_) => "method_not_allowed",
        ServiceError::TooLarge { .. } => "too_large",
        ServiceError::Slow => "request_timeout",
        ServiceError::QueueFull(_) => "queue_full",
        ServiceError::TooMany { .. } => "rate_limit_exceeded",
        ServiceError::SamplersBusy(_) => "samplers_busy",
        ServiceError::Sampling(_) => "sampling_failed",
        ServiceError::Stopping => "shutting_down",
        ServiceError::NotRunning(_) => "job_not_running",
        ServiceError::NoAnswer(_) => "worker_not_ready",
        ServiceError::DiskFull { .. } => "disk_full",
        _ => "internal_error",
    }
}

/// A refusal in the shape that clients read.
pub(super) fn envelope(status: StatusCode, message: &str, param: Option<&str>, code: Option<&str>) -> ErrorAnswer {
    let kind = match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        status if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    };
    let (param, code) = (param.map(str::to_owned), code.map(str::to_owned));
    ErrorAnswer { error: ErrorDetails { message: message.to_owned(), kind, param, code } }
}

/// A body that is not the JSON it should be.
pub(super) fn json(error: JsonPayloadError, request: &HttpRequest) -> actix_web::Error {
    let message = match error {
        JsonPayloadError::OverflowKnownLength { limit, .. } | JsonPayloadError::Overflow { limit } => {
            return ServiceError::TooLarge { what: "body", limit: limit as u64 }.into();
        }
        JsonPayloadError::Payload(error) if was_too_slow(&error) => return ServiceError::Slow.into(),
        JsonPayloadError::ContentType => "send a JSON body with Content-Type: application/json".to_owned(),
        JsonPayloadError::Deserialize(error) => {
            format!("the body of {} is not as it should be: {error}", request.path())
        }
        other => format!("the body cannot be read: {other}"),
    };
    ServiceError::Invalid { message, param: None, code: "invalid_body" }.into()
}
