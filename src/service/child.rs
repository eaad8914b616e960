//! Processes of this program that work for the service: started with a socket as their standard input.

use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;

use thiserror::Error;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::error::ServiceError;
use super::tokens::TOKEN_VARIABLE;

/// Why such a process cannot even begin.
#[derive(Debug, Error)]
pub enum ChildError {
    /// There is no socket.
    #[error("standard input is not a socket of the service ({0}): this is started by `patrickstar serve`")]
    NoService(std::io::Error),
    /// The first line is not what it should be.
    #[error("the service sent no work: {0}")]
    NoWork(String),
    /// Signals cannot be caught.
    #[error("signals cannot be handled: {0}")]
    Signals(std::io::Error),
}

/// Starts the hidden command `command` of this program, with a socket to it.
pub(super) fn start(command: &str, log: Stdio) -> Result<(Child, UnixStream), ServiceError> {
    let program = std::env::current_exe().map_err(|error| ServiceError::io("the program itself", error))?;
    let socket_failed = |error| ServiceError::io("a socket for a process", error);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()
        .and_then(|(ours, theirs)| ours.set_nonblocking(true).map(|()| (ours, theirs)))
        .map_err(socket_failed)?;
    let child = Command::new(&program)
        .arg(command)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(log)
        // Ctrl-C in a terminal is for the service, which then tells its workers.
        .process_group(0)
        .env_remove(TOKEN_VARIABLE)
        // It is not them that systemd watches.
        .env_remove("NOTIFY_SOCKET")
        .spawn()
        .map_err(|error| ServiceError::io(&program, error))?;
    Ok((child, UnixStream::from_std(ours).map_err(socket_failed)?))
}

/// In such a process: the socket to the service.
pub(super) fn service_socket() -> Result<std::os::unix::net::UnixStream, ChildError> {
    let input = std::io::stdin().as_fd().try_clone_to_owned().map_err(ChildError::NoService)?;
    Ok(std::os::unix::net::UnixStream::from(input))
}
