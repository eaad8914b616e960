//! A job's events to its end, over as many connections as it takes.
//!
//! The service may restart meanwhile, or the line may break: what comes next is asked for by the id of the last event that
//! was heard, so none is missed and none heard twice.

use std::io::BufReader;
use std::time::{Duration, Instant};

use serde_json::Value;
use ureq::http::header::ACCEPT;

use super::sse::Events;
use super::{Client, ClientError};

/// Wait before the first new connection; it doubles up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// What is heard of a job.
#[derive(Debug)]
pub enum News<'a> {
    /// One of its events.
    Event(&'a Value),
    /// The service is away; it is tried again.
    Away(&'a ClientError),
}

/// Where a follower is.
struct Place {
    last: Option<String>,
    heard_at: Instant,
    wait: Duration,
}

impl Client {
    /// Tells `hear` every event of a job from the first on, and returns the job once it has ended. Gives up when the service
    /// has been away for `patience`.
    pub fn follow(&self, id: &str, patience: Duration, hear: &mut dyn FnMut(News<'_>)) -> Result<Value, ClientError> {
        let mut place = Place { last: None, heard_at: Instant::now(), wait: FIRST_WAIT };
        loop {
            let error = match self.listen(id, &mut place, hear) {
                Ok(Some(job)) => return Ok(job),
                // A service that ends closes its streams.
                Ok(None) => ClientError::Unreachable { url: self.url.clone(), reason: "the stream was cut".to_owned() },
                Err(error) if error.is_passing() => error,
                Err(error) => return Err(error),
            };
            let waited = place.heard_at.elapsed();
            if waited > patience {
                return Err(ClientError::Lost { url: self.url.clone(), waited, reason: error.to_string() });
            }
            hear(News::Away(&error));
            std::thread::sleep(place.wait);
            place.wait = (place.wait * 2).min(LONGEST_WAIT);
        }
    }

    /// One connection's worth of events; the job, if they end with it.
    fn listen(
        &self,
        id: &str,
        place: &mut Place,
        hear: &mut dyn FnMut(News<'_>),
    ) -> Result<Option<Value>, ClientError> {
        let request = self.agent.get(format!("{}/v1/patrickstar/jobs/{id}/stream", self.url));
        let mut request = self.with_token(request).header(ACCEPT, "text/event-stream");
        if let Some(last) = &place.last {
            request = request.header("Last-Event-ID", last);
        }
        let response = self.accepted(request.call())?;
        place.heard_at = Instant::now();
        for event in Events(BufReader::new(response.into_body().into_reader())) {
            // A broken line is as good as a closed one.
            let Ok(event) = event else { return Ok(None) };
            (place.heard_at, place.wait) = (Instant::now(), FIRST_WAIT);
            let value: Value = serde_json::from_str(&event.data)
                .map_err(|error| self.foreign(format!("an event is not JSON: {error}")))?;
            if event.kind == "end" {
                return Ok(Some(value));
            }
            hear(News::Event(&value));
            place.last = event.id.or(place.last.take());
        }
        Ok(None)
    }
}
