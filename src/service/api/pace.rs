//! Bodies that come too slowly: whoever opens many of them would hold the service's connections for ever.

use std::time::Duration;

use actix_web::dev::Payload;
use actix_web::error::PayloadError;
use futures_util::StreamExt;
use futures_util::stream::unfold;
use tokio::time::{Instant, timeout};

/// A client may be this late.
const GRACE: Duration = Duration::from_secs(5);
/// Bytes a second after that: the slowest lines of today are faster.
const SLOWEST: f64 = 1024.0;

struct Paced {
    payload: Payload,
    /// Time that was spent waiting for the client, and for nothing else.
    waited: Duration,
    received: u64,
    over: bool,
}

/// The same body, which fails once its client is too slow.
pub(super) fn paced(payload: Payload) -> Payload {
    let body = Paced { payload, waited: Duration::ZERO, received: 0, over: false };
    Payload::Stream { payload: Box::pin(unfold(body, next).fuse()) }
}

/// Whether a body failed for that.
pub(super) fn was_too_slow(error: &PayloadError) -> bool {
    matches!(error, PayloadError::Io(error) if error.kind() == std::io::ErrorKind::TimedOut)
}

async fn next(mut body: Paced) -> Option<(Result<actix_web::web::Bytes, PayloadError>, Paced)> {
    if body.over {
        return None;
    }
    let allowed = GRACE + Duration::from_secs_f64(body.received as f64 / SLOWEST);
    let began = Instant::now();
    let piece = timeout(allowed.saturating_sub(body.waited), body.payload.next()).await;
    body.waited += began.elapsed();
    let piece = match piece {
        Ok(piece) => piece?,
        Err(_) => {
            body.over = true;
            Err(PayloadError::Io(std::io::Error::from(std::io::ErrorKind::TimedOut)))
        }
    };
    body.received += piece.as_ref().map_or(0, |piece| piece.len() as u64);
    Some((piece, body))
}
