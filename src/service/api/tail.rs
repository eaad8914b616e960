//! The latest events of jobs that are followed, ready to be sent: however many follow a job, an event is read and written
//! as text once.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use actix_web::web::Bytes;
use serde::Serialize;

use super::view::{Event, Job};
use crate::service::error::ServiceError;
use crate::service::store::{EventRow, JobId, Seq, Store, StoreHandle};

/// Events that are read and sent together.
const TOGETHER: usize = 200;
/// Events of a job that are kept. Who is further behind reads the database until it has caught up.
const KEPT: usize = 1000;

/// Tails of the jobs that somebody follows.
#[derive(Clone)]
pub(in crate::service) struct Tails {
    store: StoreHandle,
    tails: Arc<Mutex<HashMap<JobId, Weak<Tail>>>>,
}

/// The end of one job's events.
pub(super) struct Tail {
    store: StoreHandle,
    job: JobId,
    latest: tokio::sync::Mutex<Latest>,
}

struct Latest {
    /// The change of the database up to which it was read.
    seen: Option<u64>,
    /// All events after this one are here.
    floor: Seq,
    newest: Seq,
    events: VecDeque<(Seq, Bytes)>,
    /// The last thing to send, once the job has ended and all its events are here.
    end: Option<Bytes>,
}

/// What a follower has to send next.
pub(super) enum News {
    /// Events, the last of which is this one.
    Events(Seq, Bytes),
    /// The job has ended.
    End(Bytes),
    /// It has sent all there is.
    Nothing,
}

impl Tails {
    pub fn new(store: StoreHandle) -> Self {
        Tails { store, tails: Arc::default() }
    }

    /// The tail of a job, which lasts as long as somebody holds it.
    pub(super) fn of(&self, job: &JobId) -> Arc<Tail> {
        let mut tails = self.tails.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tail) = tails.get(job).and_then(Weak::upgrade) {
            return tail;
        }
        tails.retain(|_, tail| tail.strong_count() > 0);
        let latest = Latest { seen: None, floor: Seq(0), newest: Seq(0), events: VecDeque::new(), end: None };
        let tail = Arc::new(Tail { store: self.store.clone(), job: job.clone(), latest: latest.into() });
        tails.insert(job.clone(), Arc::downgrade(&tail));
        tail
    }
}

impl Tail {
    /// What comes after `last`, with everything that was stored up to `change` of the database.
    pub async fn after(&self, last: Seq, change: u64) -> Result<News, ServiceError> {
        {
            let mut latest = self.latest.lock().await;
            if latest.is_older_than(change) {
                self.refresh(&mut latest).await?;
                latest.seen = Some(change);
            }
            if last >= latest.floor {
                return Ok(latest.after(last));
            }
        }
        let job = self.job.clone();
        let events = self.store.read(move |store: &Store| store.events_since(&job, last, TOGETHER)).await?;
        let text: Vec<Bytes> = events.iter().map(line).collect::<Result<_, _>>()?;
        Ok(match events.last() {
            Some(newest) => News::Events(newest.seq, text.concat().into()),
            // They were deleted meanwhile, with the job.
            None => News::Nothing,
        })
    }

    /// Reads what is new; the job itself only if there is nothing else.
    async fn refresh(&self, latest: &mut Latest) -> Result<(), ServiceError> {
        if latest.seen.is_none() {
            let job = self.job.clone();
            latest.floor = self.store.read(move |store: &Store| store.newest_event(&job)).await?;
            latest.newest = latest.floor;
        }
        while latest.end.is_none() {
            let (id, newest) = (self.job.clone(), latest.newest);
            let read = move |store: &Store| {
                let events = store.events_since(&id, newest, TOGETHER)?;
                let job = if events.is_empty() { store.job(&id)? } else { None };
                Ok((job, events))
            };
            let (job, events) = self.store.read(read).await?;
            for event in &events {
                latest.push(event.seq, line(event)?);
            }
            if events.is_empty() {
                let ended = job.filter(|job| job.status.is_final());
                latest.end = ended.map(|job| text("end", None, &Job::from(&job))).transpose()?;
                break;
            }
        }
        Ok(())
    }
}

impl Latest {
    /// Whether changes up to this one may be missing; their count wraps around.
    fn is_older_than(&self, change: u64) -> bool {
        self.seen.is_none_or(|seen| change.wrapping_sub(seen).cast_signed() > 0)
    }

    fn push(&mut self, seq: Seq, text: Bytes) {
        self.events.push_back((seq, text));
        self.newest = seq;
        while self.events.len() > KEPT {
            if let Some((seq, _)) = self.events.pop_front() {
                self.floor = seq;
            }
        }
    }

    fn after(&self, last: Seq) -> News {
        let begin = self.events.partition_point(|(seq, _)| *seq <= last);
        let mut newest = None;
        let mut text = Vec::new();
        for (seq, event) in self.events.range(begin..).take(TOGETHER) {
            text.extend_from_slice(event);
            newest = Some(*seq);
        }
        match (newest, &self.end) {
            (Some(newest), _) => News::Events(newest, text.into()),
            (None, Some(end)) => News::End(end.clone()),
            (None, None) => News::Nothing,
        }
    }
}

fn line(row: &EventRow) -> Result<Bytes, ServiceError> {
    let event = Event::from(row);
    text(event.kind.name(), Some(row.seq), &event)
}

/// A server-sent event. JSON has no line break here, which would end its data.
fn text(kind: &str, id: Option<Seq>, data: &impl Serialize) -> Result<Bytes, ServiceError> {
    let json = serde_json::to_string(data)
        .map_err(|error| ServiceError::Internal(format!("an event is not JSON: {error}")))?;
    let id = id.map(|seq| format!("id: {}\n", seq.0)).unwrap_or_default();
    Ok(format!("{id}event: {kind}\ndata: {json}\n\n").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn latest() -> Latest {
        Latest { seen: None, floor: Seq(0), newest: Seq(0), events: VecDeque::new(), end: None }
    }

    fn sent(news: News) -> (i64, String) {
        match news {
            News::Events(seq, text) => (seq.0, String::from_utf8(text.to_vec()).unwrap()),
            News::End(text) => (-1, String::from_utf8(text.to_vec()).unwrap()),
            News::Nothing => (-2, String::new()),
        }
    }

    #[test]
    fn each_follower_gets_what_it_has_not_and_the_end_after_everything() {
        let mut latest = latest();
        for seq in [3, 5, 9] {
            latest.push(Seq(seq), format!("{seq} ").into());
        }
        latest.end = Some("end".into());
        assert_eq!(sent(latest.after(Seq(0))), (9, "3 5 9 ".into()));
        assert_eq!(sent(latest.after(Seq(4))), (9, "5 9 ".into()));
        assert_eq!(sent(latest.after(Seq(9))), (-1, "end".into()));
        latest.end = None;
        assert_eq!(sent(latest.after(Seq(9))), (-2, String::new()));
    }

    #[test]
    fn only_changes_after_the_last_look_are_looked_for() {
        let mut latest = latest();
        assert!(latest.is_older_than(0));
        latest.seen = Some(u64::MAX);
        assert!(latest.is_older_than(0) && !latest.is_older_than(u64::MAX) && !latest.is_older_than(u64::MAX - 1));
    }

    #[test]
    fn what_is_dropped_raises_the_floor_and_answers_stay_bounded() {
        let mut latest = latest();
        for seq in 1..=KEPT as i64 + 7 {
            latest.push(Seq(seq), "x".into());
        }
        assert_eq!((latest.floor, latest.newest, latest.events.len()), (Seq(7), Seq(KEPT as i64 + 7), KEPT));
        assert_eq!(sent(latest.after(Seq(7))), (7 + TOGETHER as i64, "x".repeat(TOGETHER)));
    }
}
