//! The supervisor: starts every actor on its own thread and restores those that panic.
//!
//! actix's own supervisor does not restart an actor after a panic, so each shell catches the panic, reports it here and
//! stops; the factory kept here makes the successor. An actor that keeps failing without handling anything in between
//! ends the training with its message instead of looping.

use std::collections::BTreeMap;
use std::sync::Arc;

use actix::prelude::*;

use crate::error::RuntimeError;
use crate::health::{ActorName, Life};
use crate::shared::Shared;

/// An actor panicked.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Fault {
    pub actor: ActorName,
    pub message: String,
}

/// Puts an actor under supervision.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Adopt {
    pub actor: ActorName,
    /// Starts a new incarnation.
    pub start: Factory,
}

pub(crate) type Factory = Box<dyn Fn(Addr<Supervisor>) + Send>;

/// Restarts without any message handled in between, after which the training ends.
const MAX_FAILURES_IN_A_ROW: u64 = 5;

pub(crate) struct Supervisor {
    shared: Arc<Shared>,
    factories: BTreeMap<ActorName, Factory>,
}

impl Supervisor {
    pub fn new(shared: Arc<Shared>) -> Self {
        Supervisor { shared, factories: BTreeMap::new() }
    }
}

impl Actor for Supervisor {
    type Context = Context<Self>;
}

impl Handler<Adopt> for Supervisor {
    type Result = ();

    fn handle(&mut self, adopt: Adopt, ctx: &mut Self::Context) {
        (adopt.start)(ctx.address());
        self.factories.insert(adopt.actor, adopt.start);
    }
}

impl Handler<Fault> for Supervisor {
    type Result = ();

    fn handle(&mut self, fault: Fault, ctx: &mut Self::Context) {
        let times = self.shared.health.restarted(fault.actor, &fault.message);
        if times > MAX_FAILURES_IN_A_ROW {
            self.shared.health.set_life(fault.actor, Life::Failed);
            self.shared.fail(RuntimeError::ActorFailed {
                actor: fault.actor.name(),
                times: times as u32,
                message: fault.message,
            });
            return;
        }
        tracing::warn!(actor = fault.actor.name(), fault = %fault.message, "actor panicked, restoring it");
        self.shared.lock().stats.restarts += 1;
        if let Some(start) = self.factories.get(&fault.actor) {
            start(ctx.address());
        }
    }
}
