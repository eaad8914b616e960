//! Whether a client is still there: an answer that takes long is worth its work only to somebody who waits for it.
//!
//! A streamed answer finds out when it is written. One that comes in the end would find out when it is too late, so the
//! connection is looked at meanwhile. A client that has closed its side of it counts as gone, as proxies have it.

use std::any::Any;
use std::io::ErrorKind;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::Duration;

use actix_web::HttpRequest;
use actix_web::dev::Extensions;

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(500);

/// Another handle of a connection.
struct Peer(TcpStream);

/// Keeps a handle of a new connection for its requests.
pub(super) fn note(connection: &dyn Any, kept: &mut Extensions) {
    let Some(stream) = connection.downcast_ref::<actix_web::rt::net::TcpStream>() else { return };
    // Without one, a client that leaves is not noticed: no reason to refuse it.
    if let Ok(handle) = stream.as_fd().try_clone_to_owned() {
        kept.insert(Peer(TcpStream::from(handle)));
    }
}

/// Returns when the client of this request is gone.
pub(super) async fn gone(request: &HttpRequest) {
    let Some(peer) = request.conn_data::<Peer>() else { return std::future::pending().await };
    loop {
        match peer.0.peek(&mut [0]) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
        tokio::time::sleep(PAUSE).await;
    }
}
