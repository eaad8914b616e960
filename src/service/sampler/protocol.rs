//! What the service and a sampler say to each other: one JSON object a line, over a socket that only the two hold.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::DeviceKind;

/// From the service.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToSampler {
    /// The first line: which model.
    Load {
        /// Directory of a checkpoint.
        checkpoint: PathBuf,
        /// Where it is computed.
        device: DeviceKind,
    },
    /// Continue texts, one after another.
    Continue(Wish),
}

/// Texts that a client wants continued.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Wish {
    /// What to continue.
    pub prompts: Vec<String>,
    /// Continuations of each.
    pub n: u32,
    /// Tokens of each continuation.
    pub max_tokens: u32,
    /// Randomness.
    pub temperature: f64,
    /// Share of the likeliest tokens that are considered.
    pub top_p: f64,
    /// Texts before which a continuation ends.
    pub stop: Vec<String>,
    /// Seed of the choices.
    pub seed: u64,
}

/// From a sampler. The last two end a wish.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromSampler {
    /// The model is loaded, or a wish is begun.
    Ready,
    /// A piece of a continuation.
    Text {
        /// Which.
        index: u32,
        /// The piece.
        text: String,
    },
    /// A continuation is whole.
    Whole {
        /// Which.
        index: u32,
        /// Why it ends here.
        reason: Reason,
    },
    /// All are.
    Done {
        /// Tokens of the prompts.
        prompt_tokens: u64,
        /// Tokens that were added.
        completion_tokens: u64,
    },
    /// It does not go on.
    Failed {
        /// For people.
        message: String,
        /// Whether the checkpoint is not there any more.
        gone: bool,
    },
}

/// Why a continuation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reason {
    /// One of the texts that end it would have come next.
    Stop,
    /// It has as many tokens as it may.
    Length,
}
