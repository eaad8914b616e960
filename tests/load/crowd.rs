//! Clients that cost little themselves: they share the machine with what they watch.

use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What one stream has heard so far.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// Of its last event.
    last: Option<String>,
    /// Whose metrics came, in order.
    pub steps: Vec<u64>,
}

/// What all have seen.
pub struct Seen {
    pub waits: Vec<Duration>,
    pub heard: Vec<Heard>,
}

/// Clients at work, all on one thread.
pub struct Crowd {
    stop: watch::Sender<bool>,
    thread: std::thread::JoinHandle<Seen>,
}

impl Crowd {
    /// Lets clients loose: pollers at different times within a second, streams from where each was.
    pub fn gather(address: &str, job: &str, pollers: usize, heard: Vec<Heard>) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (address, job) = (address.to_owned(), job.to_owned());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(crowd(address, job, pollers, heard, stopped))
        });
        Crowd { stop, thread }
    }

    /// Sends them home.
    pub fn dismiss(self) -> Seen {
        self.stop.send_replace(true);
        self.thread.join().unwrap()
    }
}

async fn crowd(
    address: String,
    job: String,
    pollers: usize,
    heard: Vec<Heard>,
    stopped: watch::Receiver<bool>,
) -> Seen {
    let asking: Vec<JoinHandle<Vec<Duration>>> = (0..pollers)
        .map(|index| {
            let offset = Duration::from_secs_f64(index as f64 / pollers as f64);
            tokio::spawn(poll(address.clone(), job.clone(), offset, stopped.clone()))
        })
        .collect();
    let listening: Vec<JoinHandle<Heard>> = heard
        .into_iter()
        .map(|heard| tokio::spawn(listen(address.clone(), job.clone(), heard, stopped.clone())))
        .collect();
    let mut seen = Seen { waits: Vec::new(), heard: Vec::new() };
    for client in asking {
        seen.waits.extend(client.await.unwrap());
    }
    for client in listening {
        seen.heard.push(client.await.unwrap());
    }
    seen
}

/// Asks for the job once a second over one connection, and says how long each answer took.
async fn poll(address: String, job: String, offset: Duration, stopped: watch::Receiver<bool>) -> Vec<Duration> {
    tokio::time::sleep(offset).await;
    let mut stream = BufReader::new(TcpStream::connect(&address).await.unwrap());
    let request = format!("GET /v1/fine_tuning/jobs/{job} HTTP/1.1\r\nHost: {address}\r\n\r\n");
    let mut waits = Vec::new();
    let mut clock = tokio::time::interval(Duration::from_secs(1));
    while !*stopped.borrow() {
        clock.tick().await;
        let began = Instant::now();
        stream.get_mut().write_all(request.as_bytes()).await.unwrap();
        let length = head(&mut stream).await.expect("answers have a length");
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.unwrap();
        waits.push(began.elapsed());
    }
    waits
}

/// Reads the head of a success; its content's length, if it says one.
async fn head(stream: &mut BufReader<TcpStream>) -> Option<usize> {
    let mut length = None;
    let mut line = String::new();
    stream.read_line(&mut line).await.unwrap();
    assert!(line.starts_with("HTTP/1.1 200 "), "{line}");
    loop {
        line.clear();
        stream.read_line(&mut line).await.unwrap();
        let text = line.trim_end().to_lowercase();
        if text.is_empty() {
            return length;
        }
        length = length.or(text.strip_prefix("content-length: ").map(|digits| digits.parse().unwrap()));
    }
}

/// Follows the job's events from where it was.
async fn listen(address: String, job: String, mut heard: Heard, mut stopped: watch::Receiver<bool>) -> Heard {
    let mut stream = BufReader::new(TcpStream::connect(&address).await.unwrap());
    let last = heard.last.as_ref().map(|last| format!("Last-Event-ID: {last}\r\n")).unwrap_or_default();
    let request = format!("GET /v1/patrickstar/jobs/{job}/stream HTTP/1.1\r\nHost: {address}\r\n{last}\r\n");
    stream.get_mut().write_all(request.as_bytes()).await.unwrap();
    // It comes in pieces, whose lengths stand between them. A piece is made of whole events, so these are lines of their own.
    head(&mut stream).await;
    let mut line = String::new();
    let mut id = None;
    loop {
        line.clear();
        tokio::select! {
            read = stream.read_line(&mut line) => assert!(read.unwrap() > 0, "the stream was cut"),
            _ = stopped.changed() => return heard,
        }
        if let Some(text) = line.trim_end().strip_prefix("id: ") {
            id = Some(text.to_owned());
        } else if let Some(data) = line.strip_prefix("data: ") {
            // Not parsed as a whole: fifty parsers would be what is measured.
            if let Some((_, rest)) = data.split_once("\"step\":") {
                heard.steps.push(rest.split(|letter: char| !letter.is_ascii_digit()).next().unwrap().parse().unwrap());
            }
            heard.last = id.take().or(heard.last);
        }
    }
}
