//! Texts as they are written. A client that goes away ends the writing: nobody would read the rest.

use actix_web::HttpResponse;
use actix_web::http::header::{CACHE_CONTROL, HeaderName};
use actix_web::web::Bytes;
use futures_util::stream::unfold;
use serde::Serialize;

use super::answer::{AnswerPiece, Choice, Completion, Continuation, Delta, Head, Kind, Usage};
use crate::service::api::error::refusal;
use crate::service::error::ServiceError;
use crate::service::sampler::protocol::{FromSampler, Reason};
use crate::service::samplers::Writing;

/// Ends a stream, by OpenAI's convention.
const END: &str = "data: [DONE]\n\n";

struct Stream {
    writing: Writing,
    head: Head,
    kind: Kind,
    include_usage: bool,
    /// The text whose beginning was sent.
    begun: Option<u32>,
    ended: bool,
}

pub(super) fn respond(writing: Writing, head: Head, kind: Kind, include_usage: bool) -> HttpResponse {
    let stream = Stream { writing, head, kind, include_usage, begun: None, ended: false };
    let pieces = unfold(stream, |mut stream| async move {
        // An empty piece would look like the end.
        let mut piece = String::new();
        while piece.is_empty() && !stream.ended {
            piece = stream.next().await;
        }
        (!piece.is_empty()).then(|| (Ok::<_, ServiceError>(Bytes::from(piece)), stream))
    });
    HttpResponse::Ok()
        .content_type("text/event-stream")
        .insert_header((CACHE_CONTROL, "no-store"))
        .insert_header((HeaderName::from_static("x-accel-buffering"), "no"))
        .streaming(pieces)
}

impl Stream {
    async fn next(&mut self) -> String {
        match self.writing.next().await {
            Ok(Some(message)) => self.told(message),
            Ok(None) => {
                self.ended = true;
                END.to_owned()
            }
            // The status was sent long ago.
            Err(error) => {
                self.ended = true;
                data(&refusal(&error))
            }
        }
    }

    fn told(&mut self, message: FromSampler) -> String {
        match message {
            FromSampler::Text { index, text } => self.piece(index, text, None),
            FromSampler::Whole { index, reason } => self.piece(index, String::new(), Some(reason)),
            FromSampler::Done { prompt_tokens, completion_tokens } if self.include_usage => {
                let usage = Usage::new(prompt_tokens, completion_tokens);
                data(&Completion::<Choice<Continuation>>::new(self.head.clone(), Vec::new(), Some(usage)))
            }
            FromSampler::Done { .. } | FromSampler::Ready | FromSampler::Failed { .. } => String::new(),
        }
    }

    fn piece(&mut self, index: u32, text: String, reason: Option<Reason>) -> String {
        let head = self.head.clone();
        if self.kind == Kind::Text {
            return data(&Completion::new(head, vec![Choice::new(index, Continuation { text }, reason)], None));
        }
        let role = (self.begun != Some(index)).then_some("assistant");
        self.begun = Some(index);
        let content = (role.is_some() || !text.is_empty()).then_some(text);
        let piece = AnswerPiece { delta: Delta { role, content } };
        data(&Completion::new(head, vec![Choice::new(index, piece, reason)], None))
    }
}

fn data(value: &impl Serialize) -> String {
    match serde_json::to_string(value) {
        Ok(text) => format!("data: {text}\n\n"),
        Err(error) => {
            tracing::error!("a piece of text is not JSON: {error}");
            String::new()
        }
    }
}
