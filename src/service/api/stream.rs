//! A job's events as they happen, as server-sent events.
//!
//! An event goes out only after it is stored, under its place in the database. A client that comes back with that place in
//! `Last-Event-ID` gets what it missed: no event is lost, none comes twice.

use std::sync::Arc;
use std::time::Duration;

use actix_web::http::header::{CACHE_CONTROL, HeaderName};
use actix_web::web::Bytes;
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::stream::unfold;
use tokio::sync::watch;

use super::measure::Counted;
use super::tail::{News, Tail};
use super::{State, jobs};
use crate::service::error::ServiceError;
use crate::service::store::Seq;
use crate::telemetry::metrics::Gauge;

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
        changes: state.store.watch(),
        stopping: state.stopping.clone(),
        tail: state.tails.of(&job.id),
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
    changes: watch::Receiver<u64>,
    stopping: watch::Receiver<bool>,
    tail: Arc<Tail>,
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
        let change = *follower.changes.borrow_and_update();
        match follower.tail.after(follower.last, change).await {
            Ok(News::Events(newest, text)) => {
                follower.last = newest;
                return Some((Ok(text), follower));
            }
            Ok(News::End(text)) => {
                follower.ended = true;
                return Some((Ok(text), follower));
            }
            Ok(News::Nothing) => {}
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
