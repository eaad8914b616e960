//! Takes over new policies between two steps. A memory budget in which the job would not fit is refused, and so is more
//! than the job was given: whoever lowers budgets for all jobs and raises them again is back where each began.

use patrickstar_actors::Retune;
use patrickstar_actors::types::{Bytes, Tier};

use super::protocol::Policies;
use crate::config::{Config, Size};
use crate::error::Error;
use crate::plan::runtime_policy;
use crate::telemetry::logging;
use crate::train::engine::Engine;

/// The job's configuration, as it was given and as it is now.
pub(super) struct Tuning {
    given: Config,
    now: Config,
}

impl Tuning {
    pub fn new(given: &Config) -> Self {
        Tuning { given: given.clone(), now: given.clone() }
    }

    /// Applies what the job has room for; returns what to tell about it.
    pub fn apply(&mut self, engine: &Engine, wanted: &Policies) -> Result<Vec<String>, Error> {
        let mut told = Vec::new();
        if let Some(level) = &wanted.log_level {
            logging::set_level(level).map_err(|error| Error::Failed(format!("the log level: {error}")))?;
        }
        let mut retune = Retune {
            policy: wanted.policy.map(runtime_policy),
            prefetch: wanted.prefetch,
            headroom: wanted.headroom,
            ..Retune::default()
        };
        told.extend(wanted.policy.map(|policy| format!("actors.eviction.policy is {policy}")));
        told.extend(wanted.prefetch.map(|moments| format!("actors.eviction.prefetch is {moments}")));
        told.extend(wanted.headroom.map(|share| format!("actors.monitor.headroom is {share}")));
        if let Some(next) = self.next(wanted) {
            match refusal(engine, &next)? {
                Some(reason) => {
                    told.push(format!("memory and placement stay as they are: with the new ones {reason}"));
                }
                None => self.take(engine, next, &mut retune, &mut told)?,
            }
        }
        engine.runtime().retune(retune)?;
        Ok(told)
    }

    /// The configuration with other budgets or sides, if they change.
    fn next(&self, wanted: &Policies) -> Option<Config> {
        let mut next = self.now.clone();
        if let Some(device) = wanted.device {
            next.memory.device = Bytes(device).min(self.given.memory.device);
        }
        if let Some(host) = wanted.host {
            next.memory.host = host;
        }
        if let Some(placement) = wanted.placement {
            next.actors.optimizer.placement = placement;
        }
        (next != self.now).then_some(next)
    }

    fn take(
        &mut self,
        engine: &Engine,
        next: Config,
        retune: &mut Retune,
        told: &mut Vec<String>,
    ) -> Result<(), Error> {
        if next.memory.device != self.now.memory.device {
            retune.device = Some(next.memory.device);
            told.push(format!("memory.device is {}", next.memory.device));
        }
        if next.memory.host != self.now.memory.host {
            retune.host = Some(host(engine, &next));
            told.push(format!("memory.host is {}", next.memory.host));
        }
        if next.actors.optimizer.placement != self.now.actors.optimizer.placement {
            retune.sides = Some(engine.replan(&trial(engine, &next))?.sides());
            told.push(format!("actors.optimizer.placement is {}", next.actors.optimizer.placement));
        }
        self.now = next;
        Ok(())
    }
}

/// Why the job cannot go on in these budgets.
fn refusal(engine: &Engine, next: &Config) -> Result<Option<String>, Error> {
    let least = engine.plan().least_device();
    if next.memory.device < least {
        return Ok(Some(format!("the job would not fit: it needs memory.device of at least {}", least.as_setting())));
    }
    Ok(engine.replan(&trial(engine, next))?.refusal())
}

/// The configuration as a plan for the slots that exist: chunks keep their size, and host memory is taken already.
fn trial(engine: &Engine, next: &Config) -> Config {
    let mut trial = next.clone();
    trial.memory.chunk = Size::Bytes(engine.plan().chunk);
    trial.memory.host = Size::Bytes(Bytes(host(engine, next).0 + engine.plan().activations_on_host().0));
    // A static share gives up chunks alone.
    trial.memory.chunk_share = engine.plan().chunk_share(next.memory.device);
    trial
}

/// Host memory for chunks, at most what there is.
fn host(engine: &Engine, config: &Config) -> Bytes {
    let capacity = engine.runtime().tier_use(Tier::Host).capacity;
    let beside = engine.plan().activations_on_host();
    config.memory.host.bytes().map_or(capacity, |bytes| Bytes(bytes.0.saturating_sub(beside.0)).min(capacity))
}
