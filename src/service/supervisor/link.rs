//! The socket to a worker: what is said goes out at once, answers go to whoever asked, and reports wait their turn to be
//! stored. So nobody's question waits for the disk.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

use crate::service::worker::protocol::{FromWorker, ToWorker};
use crate::service::worker::questions::{Answer, Question};

/// Reports that may wait to be stored; a worker that reports faster waits in turn.
const REPORTS: usize = 1024;

/// Talks to a worker. The socket closes for writing when the last one is dropped, at which the worker ends.
#[derive(Clone)]
pub(super) struct Link {
    out: mpsc::UnboundedSender<ToWorker>,
    asked: Arc<Mutex<Asked>>,
}

#[derive(Default)]
struct Asked {
    next: u64,
    /// Nobody will answer any more.
    gone: bool,
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
}

/// Ends the waiting of a question, however its asker stopped.
struct Ticket<'a> {
    link: &'a Link,
    id: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.link.asked().waiting.remove(&self.id);
    }
}

impl Link {
    /// Over a socket whose other end a worker holds; with its reports, which end when it has gone.
    pub fn new(socket: UnixStream) -> (Link, mpsc::Receiver<FromWorker>) {
        let (from, to) = socket.into_split();
        let (out, lines) = mpsc::unbounded_channel();
        let (report, reports) = mpsc::channel(REPORTS);
        let asked = Arc::new(Mutex::new(Asked::default()));
        tokio::spawn(write(to, lines));
        tokio::spawn(read(from, Arc::clone(&asked), report));
        (Link { out, asked }, reports)
    }

    /// A worker that is gone is noticed where its reports end.
    pub fn tell(&self, message: ToWorker) {
        drop(self.out.send(message));
    }

    /// Asks, and waits for as long as the worker lives; `None` if it has gone.
    pub async fn ask(&self, question: Question) -> Option<Answer> {
        let (answer, answered) = oneshot::channel();
        let id = {
            let mut asked = self.asked();
            if asked.gone {
                return None;
            }
            asked.next += 1;
            let id = asked.next;
            asked.waiting.insert(id, answer);
            id
        };
        let _ticket = Ticket { link: self, id };
        self.tell(ToWorker::Ask { id, question });
        answered.await.ok()
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        lock(&self.asked)
    }
}

/// The table is whole between any two statements, so a panic elsewhere does not matter.
fn lock(asked: &Mutex<Asked>) -> MutexGuard<'_, Asked> {
    asked.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn write(mut to: OwnedWriteHalf, mut lines: mpsc::UnboundedReceiver<ToWorker>) {
    while let Some(message) = lines.recv().await {
        let line = match serde_json::to_string(&message) {
            Ok(line) => line,
            Err(error) => {
                tracing::error!("a message to a worker cannot be written as JSON: {error}");
                continue;
            }
        };
        if to.write_all(format!("{line}\n").as_bytes()).await.is_err() {
            break;
        }
    }
}

/// A line that is not UTF-8, or a socket that fails, is as much the end as the end itself.
async fn read(from: OwnedReadHalf, asked: Arc<Mutex<Asked>>, report: mpsc::Sender<FromWorker>) {
    let mut lines = BufReader::new(from).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match serde_json::from_str(&line) {
            Ok(FromWorker::Answer { id, answer }) => {
                let waiting = lock(&asked).waiting.remove(&id);
                // Whoever asked may have given up.
                waiting.map(|waiting| waiting.send(answer));
            }
            Ok(message) => {
                if report.send(message).await.is_err() {
                    break;
                }
            }
            Err(error) => tracing::warn!("a worker sent a line that this program does not know: {error}"),
        }
    }
    let mut asked = lock(&asked);
    asked.gone = true;
    asked.waiting.clear();
}
