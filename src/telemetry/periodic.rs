//! A thread that does the same thing again and again, as long as somebody holds it.

use std::io;
use std::ops::ControlFlow;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

/// Ends its thread when it is dropped.
pub(crate) struct Periodic {
    alive: Option<flume::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Periodic {
    /// Does `work` at once and then with `interval` between, until it breaks.
    pub fn start(
        name: &str,
        interval: Duration,
        mut work: impl FnMut() -> ControlFlow<()> + Send + 'static,
    ) -> io::Result<Self> {
        let (alive, ended) = flume::bounded(0);
        let thread = Builder::new().name(name.to_owned()).spawn(move || {
            while work().is_continue() {
                if ended.recv_timeout(interval) == Err(flume::RecvTimeoutError::Disconnected) {
                    return;
                }
            }
        })?;
        Ok(Periodic { alive: Some(alive), thread: Some(thread) })
    }
}

impl Drop for Periodic {
    fn drop(&mut self) {
        self.alive = None;
        if let Some(thread) = self.thread.take() {
            // It ends at once; what it would say if it panicked, the panic has said.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn the_thread_works_at_once_and_ends_with_its_holder() {
        let (done, seen) = flume::unbounded();
        let work = move || done.send(()).map_or(ControlFlow::Break(()), ControlFlow::Continue);
        let periodic = Periodic::start("ps-test", Duration::from_secs(600), work).unwrap();
        seen.recv_timeout(Duration::from_secs(60)).unwrap();
        let start = Instant::now();
        // Waits for the thread.
        drop(periodic);
        assert!(start.elapsed() < Duration::from_secs(300) && seen.is_disconnected());
    }
}
