//! Texts in the two shapes that clients know, whole or in pieces.

use serde::Serialize;
use utoipa::ToSchema;

use crate::service::error::ServiceError;
use crate::service::sampler::protocol::Reason;
use crate::service::store::{CheckpointId, UnixTime};

/// What all answers begin with.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = CompletionHead)]
pub(super) struct Head {
    id: String,
    object: &'static str,
    created: UnixTime,
    model: String,
    /// The checkpoint that wrote this.
    system_fingerprint: CheckpointId,
}

impl Head {
    pub fn new(kind: Kind, stream: bool, model: String, checkpoint: CheckpointId) -> Result<Self, ServiceError> {
        let number = getrandom::u64().map_err(|error| ServiceError::Internal(format!("no random numbers: {error}")))?;
        let (prefix, object) = match (kind, stream) {
            (Kind::Text, _) => ("cmpl", "text_completion"),
            (Kind::Chat, false) => ("chatcmpl", "chat.completion"),
            (Kind::Chat, true) => ("chatcmpl", "chat.completion.chunk"),
        };
        let id = format!("{prefix}-{number:016x}");
        Ok(Head { id, object, created: UnixTime::now(), model, system_fingerprint: checkpoint })
    }
}

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The continuation of a text.
    Text,
    /// An answer in a conversation.
    Chat,
}

/// Texts, or a piece of one.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Completion)]
pub(super) struct Completion<C> {
    #[serde(flatten)]
    head: Head,
    choices: Vec<C>,
    /// In streams only at the end, and only if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

impl<C> Completion<C> {
    pub fn new(head: Head, choices: Vec<C>, usage: Option<Usage>) -> Self {
        Completion { head, choices, usage }
    }
}

/// Tokens that were read and written.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(super) struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
}

impl Usage {
    pub fn new(prompt_tokens: u64, completion_tokens: u64) -> Self {
        Usage { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }
}

/// One text.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Choice<T> {
    index: u32,
    #[serde(flatten)]
    text: T,
    #[schema(required)]
    logprobs: Option<u8>,
    /// `stop` or `length`; null while it goes on.
    #[schema(required, value_type = Option<String>)]
    finish_reason: Option<Reason>,
}

impl<T> Choice<T> {
    pub fn new(index: u32, text: T, finish_reason: Option<Reason>) -> Self {
        Choice { index, text, logprobs: None, finish_reason }
    }
}

/// A continuation, or a piece of it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Continuation {
    pub text: String,
}

/// An answer.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Answer {
    pub message: Message,
}

/// A message of the model.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Message {
    #[schema(example = "assistant")]
    pub role: &'static str,
    pub content: String,
    #[schema(required)]
    pub refusal: Option<String>,
}

/// A piece of an answer.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AnswerPiece {
    pub delta: Delta,
}

/// What a piece adds: the role in the first one, then text.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}
