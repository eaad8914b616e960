//! Answers the service from a thread of its own, so that no question waits for the step that runs.

use std::sync::{Arc, OnceLock};

use patrickstar_actors::health::ActorStatus;
use patrickstar_actors::types::{Bytes, Tier};
use patrickstar_actors::view::{Residency, RuntimeView};

use super::Lines;
use super::protocol::FromWorker;
use super::questions::{ActorState, Answer, ChunkMap, ChunkPlace, Question, TierState};
use crate::telemetry::metrics::render;

/// Questions that wait. The service asks again what it gets no answer to, so more would be asked twice.
pub(super) const WAITING: usize = 64;

/// What can be looked at, once the model is set up.
pub(super) type Shown = Arc<OnceLock<RuntimeView>>;

/// Answers until the service has gone.
pub(super) fn respond(questions: &flume::Receiver<(u64, Question)>, shown: &Shown, lines: &Lines) {
    for (id, question) in questions.iter() {
        let answer = match question {
            Question::Metrics => Answer::Metrics(render()),
            other => shown.get().and_then(|view| look(view, other)).unwrap_or(Answer::NotReady),
        };
        lines.send(&FromWorker::Answer { id, answer });
    }
}

fn look(view: &RuntimeView, question: Question) -> Option<Answer> {
    match question {
        Question::Chunks => view.residency().map(|seen| Answer::Chunks(map(seen))),
        Question::Actors => view.actors().map(|actors| Answer::Actors(actors.into_iter().map(actor).collect())),
        Question::Metrics => None,
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
