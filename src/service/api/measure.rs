//! What the service says about itself and its jobs to Prometheus.

use std::time::Instant;

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::middleware::Next;
use actix_web::{Error, HttpResponse, web};

use super::{ROUTES, State};
use crate::service::error::ServiceError;
use crate::service::store::Status;
use crate::service::worker::questions::{Answer, Question};
use crate::telemetry::metrics::{Gauge, Histogram, installed, merge, render};

/// Counts the time of every answer, by route; that of a stream ends where it begins.
pub(super) async fn measure<B: MessageBody>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<B>, Error> {
    let began = Instant::now();
    // What is not in the table is not told apart: a client could make up any number of paths.
    let pattern = request.match_pattern();
    let route = ROUTES.iter().find(|route| Some(route.path) == pattern.as_deref() && route.method == request.method());
    let (path, method) = route.map_or(("other", "other"), |route| (route.path, route.method.as_str()));
    let answer = {
        let _in_flight = Counted::new(Gauge::HttpInFlight);
        next.call(request).await
    };
    let status = match &answer {
        Ok(response) => response.status(),
        Err(error) => error.as_response_error().status_code(),
    };
    if let Some(registry) = installed() {
        registry.histogram(Histogram::HttpDuration, &[path, method, status.as_str()]).record(began.elapsed());
    }
    answer
}

/// Metrics of the service and of all running jobs.
#[utoipa::path(get, path = "/metrics", tag = "health", responses((status = 200, body = String, content_type = "text/plain")))]
pub(super) async fn metrics(state: web::Data<State>) -> Result<HttpResponse, ServiceError> {
    let counts = state.store.read(|store| store.count_jobs());
    let (counts, answers) = tokio::join!(counts, state.supervisor.ask_all(Question::Metrics));
    if let Some(registry) = installed() {
        let counts = counts?;
        for status in Status::ALL {
            let count = counts.iter().find(|(counted, _)| *counted == status).map_or(0, |(_, count)| *count);
            registry.gauge(Gauge::Jobs, &[status.name()]).set(count as f64);
        }
    }
    let mut texts = vec![render()];
    texts.extend(answers.into_iter().filter_map(|(_, answer)| match answer {
        Answer::Metrics(text) => Some(text),
        _ => None,
    }));
    Ok(HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(merge(&texts)))
}

/// Something that is counted as long as it lives, however it ends.
pub(super) struct Counted(Gauge);

impl Counted {
    pub fn new(gauge: Gauge) -> Self {
        if let Some(registry) = installed() {
            registry.gauge(gauge, &[]).increment(1.0);
        }
        Counted(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(registry) = installed() {
            registry.gauge(self.0, &[]).decrement(1.0);
        }
    }
}
