//! Answers the service from a thread of its own, so that no question waits for the step that runs.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use patrickstar_actors::health::ActorStatus;
use patrickstar_actors::timeline::Timeline;
use patrickstar_actors::types::{Bytes, Tier};
use patrickstar_actors::view::{Residency, RuntimeView};

use super::Lines;
use super::protocol::FromWorker;
use super::questions::{ActorState, Answer, ChunkMap, ChunkPlace, Question, TierState};
use crate::telemetry::metrics::render;
use crate::telemetry::trace::write_chrome_trace;

/// Questions that wait. The service asks again what it gets no answer to, so more would be asked twice.
pub(super) const WAITING: usize = 64;

/// What can be looked at, once the model is set up.
pub(super) type Shown = Arc<OnceLock<RuntimeView>>;

/// Time between two signs of life.
const BEAT: Duration = Duration::from_secs(1);

/// Answers, and says that the training gets on.
pub(super) struct Responder {
    shown: Shown,
    lines: Lines,
    /// Where recordings go.
    trace: PathBuf,
}

impl Responder {
    pub fn new(shown: Shown, lines: Lines, trace: PathBuf) -> Self {
        Responder { shown, lines, trace }
    }

    /// Answers until the service has gone. Between questions it tells the service of progress within a step, which may take
    /// minutes: a training that hangs is told from one that is slow by that.
    pub fn respond(&self, questions: &flume::Receiver<(u64, Question)>) {
        let (mut progress, mut beat) = (None, Instant::now());
        loop {
            match questions.recv_timeout(BEAT.saturating_sub(beat.elapsed())) {
                Ok((id, question)) => self.answer(id, question),
                Err(flume::RecvTimeoutError::Timeout) => {}
                Err(flume::RecvTimeoutError::Disconnected) => return,
            }
            if beat.elapsed() >= BEAT {
                beat = Instant::now();
                let now = self.shown.get().and_then(RuntimeView::progress);
                if std::mem::replace(&mut progress, now) != now {
                    self.lines.send(&FromWorker::Alive);
                }
            }
        }
    }

    fn answer(&self, id: u64, question: Question) {
        let view = self.shown.get();
        let answer = match question {
            Question::Metrics => Some(Answer::Metrics(render())),
            Question::Chunks => view.and_then(RuntimeView::residency).map(|seen| Answer::Chunks(map(seen))),
            Question::Actors => {
                view.and_then(RuntimeView::actors).map(|actors| Answer::Actors(actors.into_iter().map(actor).collect()))
            }
            Question::StartTrace => view.and_then(RuntimeView::timeline).map(|timeline| {
                timeline.set_enabled(true);
                Answer::Traced { spans: 0 }
            }),
            Question::StopTrace => match view.and_then(RuntimeView::timeline) {
                Some(timeline) => return self.stop_trace(id, timeline),
                None => None,
            },
        };
        self.lines.send(&FromWorker::Answer { id, answer: answer.unwrap_or(Answer::NotReady) });
    }

    /// Other questions are answered while the recording is written.
    fn stop_trace(&self, id: u64, timeline: Arc<Timeline>) {
        timeline.set_enabled(false);
        let (lines, path) = (self.lines.clone(), self.trace.clone());
        std::thread::spawn(move || lines.send(&FromWorker::Answer { id, answer: written(&timeline, &path) }));
    }
}

fn written(timeline: &Timeline, path: &Path) -> Answer {
    let (spans, snapshots) = match timeline.take() {
        Ok(taken) => taken,
        Err(error) => return Answer::Failed(error.to_string()),
    };
    match write_chrome_trace(path, &spans, &snapshots) {
        Ok(()) => Answer::Traced { spans: spans.len() as u64 },
        Err(error) => Answer::Failed(format!("{}: {error}: free space, and record again", path.display())),
    }
}

fn map(seen: Residency) -> ChunkMap {
    let tiers = Tier::ALL.into_iter().zip(seen.tiers).map(|(tier, used)| TierState {
        tier,
        capacity_bytes: used.capacity.0,
        budget_bytes: used.budget.0,
        used_bytes: used.used.0,
        non_model_bytes: if tier == Tier::Device { seen.non_model.0 } else { 0 },
    });
    let Bytes(bytes) = seen.chunk_bytes;
    let chunks = seen.chunks.into_iter().map(|chunk| ChunkPlace {
        id: chunk.id.0,
        kind: chunk.kind,
        group: chunk.group.0,
        tier: chunk.tier,
        bytes,
        state: chunk.state.to_owned(),
    });
    ChunkMap { step: seen.step.0, moment: seen.moment.0, tiers: tiers.collect(), chunks: chunks.collect() }
}

fn actor(status: ActorStatus) -> ActorState {
    ActorState {
        name: status.actor.to_owned(),
        state: status.life.name().to_owned(),
        mailbox: status.waiting,
        restarts: status.restarts,
        processed: status.handled,
        last_fault: status.last_fault,
    }
}
