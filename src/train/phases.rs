//! What a step consists of: its passes, timed where they are computed.

use std::time::{Duration, Instant};

use patrickstar_actors::error::RuntimeError;
use patrickstar_actors::memory::Event;
use patrickstar_actors::runtime::Runtime;
use serde::Serialize;

use crate::error::Error;

/// Parts of a step, one after the other.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Phases {
    /// The forward pass, what it waited for included: weights that were still updated, copies.
    pub forward: Duration,
    /// The backward pass, the forward pass again for activations that were not kept included.
    pub backward: Duration,
    /// What is left of the step: norms, and updates that no pass hides.
    pub optimizer: Duration,
}

/// An instant of a step: on a GPU the end of what is queued, not the time of queuing it.
pub(super) struct Mark {
    time: Instant,
    event: Option<Event>,
}

impl Mark {
    pub fn now(runtime: &Runtime) -> Result<Self, Error> {
        let event = runtime.mark().map_err(RuntimeError::from)?;
        Ok(Mark { time: Instant::now(), event })
    }

    /// The time between two instants that have passed.
    pub fn since(&self, earlier: &Mark) -> Result<Duration, Error> {
        let on_device = match (&self.event, &earlier.event) {
            (Some(event), Some(earlier)) => event.elapsed_since(earlier).map_err(RuntimeError::from)?,
            _ => None,
        };
        Ok(on_device.unwrap_or(self.time - earlier.time))
    }
}
