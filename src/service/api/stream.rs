//! A job's events as they happen, as server-sent events.
//!
//! An event goes out only after it is stored, under its place in the database. A client that comes back with that place in
//! `Last-Event-ID` gets what it missed: no event is lost, none comes twice.

use std::time::Duration;

use actix_web::http::header::{CACHE_CONTROL, HeaderName};
use actix_web::web::Bytes;
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::stream::unfold;
use serde::Serialize;
use tokio::sync::watch;

use super::measure::Counted;
use super::view::{Event, Job};
use super::{State, jobs};
use crate::service::error::ServiceError;
use crate::service::store::{EventRow, JobId, Seq, Store, StoreHandle};
use crate::telemetry::metrics::Gauge;

/// Events that are sent together.
const TOGETHER: usize = 200;
/// A line now and then tells proxies that the stream lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Many small changes become one read.
const PAUSE: Duration = Duration::from_millis(100);

/// A job's events as server-sent events; after the last one of a job that has ended comes `event: end` with the job.
#[utoipa::path(get, path = "/v1/patrickstar/jobs/{id}/stream", tag = "patrickstar",
    params(("id" = String, Path), ("Last-Event-ID" = Option<i64>, Header, description = "go on after this one")),
    responses((status = 200, body = String, content_type = "text/event-stream")))]
pub(super) async fn stream(
    state: web::Data<State>,
    path: web::Path<String>,
    request: HttpRequest,
) -> Result<HttpResponse, ServiceError> {
    let job = jobs::find(&state, &path).await?;
    let last = match request.headers().get("last-event-id") {
        None => Seq(0),
        Some(value) => {
            let number = value.to_str().ok().and_then(|text| text.parse().ok()).filter(|number| *number >= 0);
            let message = "`Last-Event-ID` must be the id of an event of this stream";
            Seq(number.ok_or_else(|| ServiceError::invalid("Last-Event-ID", message))?)
        }
    };
    let follower = Follower {
        store: state.store.clone(),
        changes: state.store.watch(),
        stopping: state.stopping.clone(),
        job: job.id,
        last,
        ended: false,
        _open: Counted::new(Gauge::OpenStreams),
    };
    Ok(HttpResponse::Ok()
        .content_type("text/event-stream")
        .insert_header((CACHE_CONTROL, "no-store"))
        .insert_header((HeaderName::from_static("x-accel-buffering"), "no"))
        .streaming(unfold(follower, next)))
}

struct Follower {
    store: StoreHandle,
    changes: watch::Receiver<u64>,
    stopping: watch::Receiver<bool>,
    job: JobId,
    last: Seq,
    ended: bool,
    /// Counted as long as it lasts.
    _open: Counted,
}

async fn next(mut follower: Follower) -> Option<(Result<Bytes, ServiceError>, Follower)> {
    loop {
        if follower.ended || *follower.stopping.borrow() {
            return None;
        }
        // Marked before reading, so that what is stored while reading wakes us again.
        follower.changes.borrow_and_update();
        match follower.read().await {
            Ok(Some(text)) => return Some((Ok(text.into()), follower)),
            Ok(None) => {}
            Err(error) => {
                follower.ended = true;
                return Some((Err(error), follower));
            }
        }
        let woken = tokio::select! {
            woken = follower.changes.changed() => woken.is_ok(),
            stopping = follower.stopping.changed() => stopping.is_ok(),
            () = tokio::time::sleep(KEEP_ALIVE) => {
                return Some((Ok(Bytes::from_static(b": waiting\n\n")), follower));
            }
        };
        if !woken {
            return None;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

impl Follower {
    /// What came since the last time; the job's end, once there is nothing else.
    async fn read(&mut self) -> Result<Option<String>, ServiceError> {
        let (id, last) = (self.job.clone(), self.last);
        // The job counts once there is nothing else: many clients read many times.
        let read = move |store: &Store| {
            let events = store.events_since(&id, last, TOGETHER)?;
            let job = if events.is_empty() { store.job(&id)? } else { None };
            Ok((job, events))
        };
        let (job, events) = self.store.read(read).await?;
        let Some(newest) = events.last() else {
            let ended = job.filter(|job| job.status.is_final());
            self.ended = ended.is_some();
            return ended.map(|job| Ok(format!("event: end\ndata: {}\n\n", one_line(&Job::from(&job))?))).transpose();
        };
        self.last = newest.seq;
        let line = |row: &EventRow| {
            let event = Event::from(row);
            Ok(format!("id: {}\nevent: {}\ndata: {}\n\n", row.seq.0, event.kind.name(), one_line(&event)?))
        };
        events.iter().map(line).collect::<Result<String, ServiceError>>().map(Some)
    }
}

/// JSON without a line break, which would end the data of an event.
fn one_line(value: &impl Serialize) -> Result<String, ServiceError> {
    serde_json::to_string(value).map_err(|error| ServiceError::Internal(format!("an event is not JSON: {error}")))
}
