//! What the service and a worker say to each other: one JSON object a line, over a socket that only the two hold.

use serde::{Deserialize, Serialize};

use super::questions::{Answer, Question};
use crate::config::{Config, Placement, Policy, Size};
use crate::service::store::Losses;

/// From the service.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToWorker {
    /// The first line: what to train, from its newest checkpoint on.
    Start {
        /// The job's configuration.
        config: Box<Config>,
    },
    /// Finish the step, save a checkpoint, leave.
    Pause,
    /// Leave at once: what is on disk is whole at every instant.
    Cancel,
    /// What was reported up to this step is stored.
    Stored {
        /// Of the newest report.
        step: u64,
    },
    /// Use other policies from the next step on.
    Retune(Policies),
    /// Say something about yourself.
    Ask {
        /// Comes back with the answer.
        id: u64,
        /// What.
        question: Question,
    },
}

/// Policies that may change while a job runs; what is absent stays. The bits of the training do not depend on them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Policies {
    /// Which chunk leaves a full tier.
    pub policy: Option<Policy>,
    /// Moments that are fetched ahead.
    pub prefetch: Option<u32>,
    /// Fraction of the measured non-model memory kept free on top of it.
    pub headroom: Option<f64>,
    /// Bytes of device memory.
    pub device: Option<u64>,
    /// Host memory.
    pub host: Option<Size>,
    /// Where chunks are stepped.
    pub placement: Option<Placement>,
    /// What is logged.
    pub log_level: Option<String>,
}

impl Policies {
    /// What is different in `new`.
    pub fn between(old: &Config, new: &Config) -> Self {
        fn changed<T: Clone + PartialEq>(old: &T, new: &T) -> Option<T> {
            (old != new).then(|| new.clone())
        }
        let (old_actors, new_actors) = (&old.actors, &new.actors);
        Policies {
            policy: changed(&old_actors.eviction.policy, &new_actors.eviction.policy),
            prefetch: changed(&old_actors.eviction.prefetch, &new_actors.eviction.prefetch)
                .map(|moments| u32::try_from(moments).unwrap_or(u32::MAX)),
            headroom: changed(&old_actors.monitor.headroom, &new_actors.monitor.headroom),
            device: changed(&old.memory.device, &new.memory.device).map(|device| device.0),
            host: changed(&old.memory.host, &new.memory.host),
            placement: changed(&old_actors.optimizer.placement, &new_actors.optimizer.placement),
            log_level: changed(&old.service.log_level, &new.service.log_level),
        }
    }

    /// These, and then the later ones.
    pub fn then(self, later: &Policies) -> Self {
        Policies {
            policy: later.policy.or(self.policy),
            prefetch: later.prefetch.or(self.prefetch),
            headroom: later.headroom.or(self.headroom),
            device: later.device.or(self.device),
            host: later.host.or(self.host),
            placement: later.placement.or(self.placement),
            log_level: later.log_level.clone().or(self.log_level),
        }
    }
}

/// From a worker. The last three end it; answers may come at any time, all else in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromWorker {
    /// The model is set up.
    Started {
        /// Steps that are done already.
        step: u64,
        /// Parameters.
        parameters: u64,
        /// The plan in one line.
        plan: String,
    },
    /// A step is done.
    Step(StepMetrics),
    /// A checkpoint is safe on disk.
    Checkpoint {
        /// Steps done.
        step: u64,
        /// Its directory.
        directory: String,
        /// Losses of the step; `None` where its report has them.
        losses: Option<Losses>,
    },
    /// Chunks were used or moved since the last time.
    Alive,
    /// Something worth a line.
    Log {
        /// The line.
        message: String,
    },
    /// What it was asked.
    Answer {
        /// Of the question.
        id: u64,
        /// What it says.
        answer: Answer,
    },
    /// Left as asked, with a checkpoint.
    Paused {
        /// Steps done.
        step: u64,
    },
    /// All steps are done.
    Finished {
        /// Steps done.
        step: u64,
    },
    /// Could not go on.
    Failed {
        /// For programs.
        code: String,
        /// For people.
        message: String,
        /// Whether it may go better from the last checkpoint.
        retry: bool,
    },
}

impl FromWorker {
    /// Whether nothing follows it.
    pub fn is_last(&self) -> bool {
        matches!(self, FromWorker::Paused { .. } | FromWorker::Finished { .. } | FromWorker::Failed { .. })
    }
}

/// The numbers of a step. JSON has no infinity, so what may overflow may be absent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// From 1.
    pub step: u64,
    /// Steps of the whole job.
    pub total_steps: u64,
    /// Mean loss of the batch.
    pub train_loss: f64,
    /// Mean loss on validation data, where it was due.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_loss: Option<f64>,
    /// Learning rate.
    pub learning_rate: f64,
    /// Before it was clipped.
    pub gradient_norm: Option<f64>,
    /// Tokens a second.
    pub tokens_per_second: Option<f64>,
    /// Tokens up to this step.
    pub trained_tokens: u64,
    /// Share of the step that the compute thread waited.
    pub stall_ratio: f64,
    /// Bytes in use on the device.
    pub device_bytes: u64,
    /// Bytes in use in host memory.
    pub host_bytes: u64,
    /// Chunks that moved between tiers since the start.
    pub chunk_moves: u64,
    /// Seconds until all steps are done.
    pub seconds_left: Option<f64>,
}
