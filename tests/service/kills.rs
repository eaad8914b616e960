//! Fifty kills at random instants, of workers and of the service, while clients create jobs and follow them.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use patrickstar::client::{Client, News};
use rusqlite::{Connection, OpenFlags};
use serde_json::{Value, json};

use crate::client::{PATIENCE, Service, kill};

const KILLS: usize = 50;
/// Jobs are long enough to be hit several times, and short enough that several are.
const STEPS: u64 = 400;

/// Repeats a run that failed: set it to the seed that was printed.
const SEED_VARIABLE: &str = "KILLS_SEED";

/// SplitMix64: a test needs no better dice.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn pause(&mut self, milliseconds: Range<u64>) {
        let length = milliseconds.start + self.next() % (milliseconds.end - milliseconds.start);
        std::thread::sleep(Duration::from_millis(length));
    }

    fn one_in(&mut self, times: u64) -> bool {
        self.next().is_multiple_of(times)
    }
}

/// What a client heard of a job: the ids of its events in order, and how it ended.
type Heard = (Vec<String>, Value);

struct Clients {
    url: String,
    file: String,
    /// Ids of jobs whose creation was answered.
    accepted: mpsc::Receiver<String>,
    answers: mpsc::Sender<String>,
    followers: Vec<(String, JoinHandle<Heard>)>,
}

impl Clients {
    fn new(service: &Service, file: String) -> Self {
        let (answers, accepted) = mpsc::channel();
        Clients { url: format!("http://{}", service.address), file, accepted, answers, followers: Vec::new() }
    }

    /// Asks for a job from a thread of its own: the service may be killed before it answers.
    fn create(&self) -> JoinHandle<()> {
        let (url, answers) = (self.url.clone(), self.answers.clone());
        let body = json!({ "model": "gpt-tiny", "training_file": self.file, "seed": 5, "patrickstar": settings() });
        std::thread::spawn(move || {
            if let Ok(job) = Client::new(&url, None).unwrap().create(&body) {
                answers.send(job["id"].as_str().unwrap().to_owned()).unwrap();
            }
        })
    }

    /// Follows what was accepted since.
    fn follow_new(&mut self) {
        while let Ok(job) = self.accepted.try_recv() {
            let (url, id) = (self.url.clone(), job.clone());
            let follower = std::thread::spawn(move || {
                let mut ids = Vec::new();
                let mut hear = |news: News<'_>| {
                    if let News::Event(event) = news {
                        ids.push(event["id"].as_str().unwrap().to_owned());
                    }
                };
                let ended = Client::new(&url, None).unwrap().follow(&id, PATIENCE, &mut hear).unwrap();
                (ids, ended)
            });
            self.followers.push((job, follower));
        }
    }

    fn unfinished(&self) -> usize {
        self.followers.iter().filter(|(_, follower)| !follower.is_finished()).count()
    }
}

fn settings() -> Value {
    json!({ "train.steps": STEPS, "checkpoint.every": 7, "model.dropout": 0.1 })
}

fn seed() -> u64 {
    match std::env::var(SEED_VARIABLE) {
        Ok(text) => text.parse().unwrap(),
        Err(_) => std::process::id().into(),
    }
}

/// Kills at random instants; returns how many of the kills hit workers.
fn havoc(service: &mut Service, clients: &mut Clients, dice: &mut Dice) -> usize {
    let mut workers = 0;
    for _ in 0..KILLS {
        clients.follow_new();
        let mut asking = Vec::new();
        if clients.unfinished() < 2 {
            asking.push(clients.create());
        }
        let worker = if dice.one_in(2) { worker(service) } else { None };
        // Long enough, more often than not, for a checkpoint: deaths without one between them make the next worker wait.
        dice.pause(0..if worker.is_some() { 1000 } else { 500 });
        match worker {
            Some(worker) => workers += usize::from(kill(worker)),
            None => {
                if dice.one_in(3) {
                    asking.push(clients.create());
                    dice.pause(0..8);
                }
                service.kill();
                dice.pause(0..100);
                service.restart();
            }
        }
        asking.into_iter().for_each(|thread| thread.join().unwrap());
    }
    workers
}

/// A worker, unless none comes: one that died is started again after a second or two.
fn worker(service: &Service) -> Option<u32> {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(4) {
        if let Some(worker) = service.workers().first() {
            return Some(*worker);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

fn integrity(data: &Path) -> String {
    let path = data.join("store.sqlite");
    let database = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE).unwrap();
    database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap()
}

#[test]
fn fifty_kills_lose_no_job_no_event_and_no_bit() {
    let data = tempfile::tempdir().unwrap();
    // What is tried here is what a death costs, not how many are too many.
    let mut service = Service::start_with(data.path(), &["--max-restarts", "1000"], None);
    let seed = seed();
    println!("seed {seed}: set {SEED_VARIABLE} to it to draw the same instants again");
    let file = service.training_file();
    let undisturbed = service.job(&file, &settings());
    service.until_status(&undisturbed, "succeeded");
    let losses = service.losses(&undisturbed);
    assert_eq!(losses.len() as u64, STEPS);

    let mut clients = Clients::new(&service, file);
    let began = Instant::now();
    let workers = havoc(&mut service, &mut clients, &mut Dice(seed));
    let took = began.elapsed();
    clients.follow_new();

    let accepted: Vec<String> = clients.followers.iter().map(|(job, _)| job.clone()).collect();
    let mut restarts = 0;
    for (job, follower) in clients.followers {
        let (heard, ended) = follower.join().unwrap();
        assert_eq!(ended["status"], "succeeded", "{ended}");
        assert_eq!(service.losses(&job), losses, "{job}");
        let stored: Vec<Value> = service.events(&job);
        restarts += stored.iter().filter(|event| event["level"] == "warn").count();
        let stored: Vec<&str> = stored.iter().map(|event| event["id"].as_str().unwrap()).collect();
        assert_eq!(heard, stored, "{job}: what a client heard is not what is stored");
        assert_eq!(heard.iter().collect::<HashSet<_>>().len(), heard.len(), "{job}: an event came twice");
    }
    // A job whose creation was stored but not answered is as good as any other.
    let all = Client::new(&format!("http://{}", service.address), None).unwrap().jobs(1000).unwrap();
    for job in &all {
        service.until_status(job["id"].as_str().unwrap(), "succeeded");
    }
    let listed: HashSet<&str> = all.iter().map(|job| job["id"].as_str().unwrap()).collect();
    assert!(accepted.iter().all(|job| listed.contains(job.as_str())), "an accepted job is lost");
    service.kill();
    assert_eq!(integrity(data.path()), "ok");
    println!(
        "{KILLS} kills in {:.0} s, {workers} of workers; {} jobs, {restarts} restarts told",
        took.as_secs_f64(),
        all.len()
    );
    assert!((10..=KILLS - 10).contains(&workers) && all.len() >= 3, "{workers} kills hit workers, {} jobs", all.len());
}
