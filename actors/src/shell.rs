//! The thin actix shell around each worker: inbox, panic guard, restoration.
//!
//! Data arrives by a bounded flume channel, which gives back-pressure to any sender and outlives the actor: messages that
//! wait while an actor is being restored are not lost. The message in hand is kept beside the actor until it is done, so a
//! successor starts with it. Workers are written so that repeating a message is harmless.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use actix::prelude::*;

use crate::error::RuntimeError;
use crate::health::{ActorName, Life};
use crate::shared::Shared;
use crate::supervisor::{Fault, Supervisor};

/// The plain struct inside an actor.
pub(crate) trait Worker: Send + Unpin + 'static {
    /// What it is sent.
    type Message: Clone + Send + Unpin + 'static;
    /// Does one piece of work. An error ends the training; a panic is survived.
    fn handle(&mut self, message: Self::Message) -> Result<(), RuntimeError>;
}

/// What survives an actor.
pub(crate) struct Post<M> {
    pub name: ActorName,
    pub inbox: flume::Receiver<M>,
    /// The message being handled, and those pulled from the inbox by a dying actor.
    pub in_hand: Arc<Mutex<VecDeque<M>>>,
    pub shared: Arc<Shared>,
}

impl<M> Clone for Post<M> {
    fn clone(&self) -> Self {
        Post {
            name: self.name,
            inbox: self.inbox.clone(),
            in_hand: Arc::clone(&self.in_hand),
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<M> Post<M> {
    fn in_hand(&self) -> MutexGuard<'_, VecDeque<M>> {
        self.in_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The actor.
pub(crate) struct Shell<W: Worker> {
    worker: W,
    post: Post<W::Message>,
    supervisor: Addr<Supervisor>,
    /// Set after a panic: what is still queued belongs to the successor.
    dead: bool,
}

impl<W: Worker> Shell<W> {
    pub fn new(worker: W, post: Post<W::Message>, supervisor: Addr<Supervisor>) -> Self {
        Shell { worker, post, supervisor, dead: false }
    }

    fn work(&mut self, message: W::Message, ctx: &mut Context<Self>) {
        self.post.in_hand().push_front(message.clone());
        let began = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| self.worker.handle(message)));
        match outcome {
            Ok(result) => {
                self.post.in_hand().pop_front();
                self.post.shared.health.handled(self.post.name, began.elapsed());
                if let Err(error) = result {
                    self.post.shared.fail(error);
                }
            }
            Err(panic) => {
                self.dead = true;
                self.post.shared.health.set_life(self.post.name, Life::Restoring);
                let fault = Fault { actor: self.post.name, message: panic_message(&*panic) };
                // A control message, one per death: it cannot flood anybody.
                if self.supervisor.try_send(fault).is_err() {
                    self.post.shared.fail(RuntimeError::Stopped("the supervisor does not answer".into()));
                }
                ctx.stop();
            }
        }
    }
}

impl<W: Worker> Actor for Shell<W> {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.post.shared.health.set_life(self.post.name, Life::Running);
        let inherited: Vec<W::Message> = self.post.in_hand().drain(..).collect();
        for message in inherited {
            if self.dead {
                self.post.in_hand().push_back(message);
            } else {
                self.work(message, ctx);
            }
        }
        if !self.dead {
            ctx.add_stream(self.post.inbox.clone().into_stream());
        }
    }
}

impl<W: Worker> StreamHandler<W::Message> for Shell<W> {
    fn handle(&mut self, message: W::Message, ctx: &mut Self::Context) {
        if self.dead {
            // Polled once more while stopping: keep the message for the successor, which looks in hand first.
            self.post.in_hand().push_back(message);
            return;
        }
        self.work(message, ctx);
    }
}

/// What a panic said.
fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "a panic without a message".to_owned())
}
