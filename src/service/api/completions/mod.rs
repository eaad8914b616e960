//! Texts by trained models, whole or piece by piece as server-sent events.

mod answer;
mod request;
mod stream;

use actix_web::{HttpRequest, HttpResponse, web};

use self::answer::{Answer, Choice, Completion, Continuation, Head, Kind, Message, Usage};
use self::request::{Asked, ChatRequest, CompletionRequest};
use super::{State, peer};
use crate::service::error::ServiceError;
use crate::service::presets::preset;
use crate::service::sampler::protocol::{FromSampler, Reason};
use crate::service::samplers::Writing;
use crate::service::store::{CheckpointId, CheckpointRow, JobId};

/// What separates a trained model's name from the step of one of its checkpoints.
pub(super) const STEP_MARK: &str = ":ckpt-step-";

/// Continues texts.
#[utoipa::path(post, path = "/v1/completions", tag = "completions", request_body = CompletionRequest,
    responses((status = 200, content((Completion<Choice<Continuation>> = "application/json"),
        (String = "text/event-stream")))))]
pub(super) async fn text(
    state: web::Data<State>,
    request: HttpRequest,
    body: web::Json<CompletionRequest>,
) -> Result<HttpResponse, ServiceError> {
    respond(&state, &request, body.into_inner().check()?, Kind::Text).await
}

/// Answers in a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "completions", request_body = ChatRequest,
    responses((status = 200, content((Completion<Choice<Answer>> = "application/json"),
        (String = "text/event-stream")))))]
pub(super) async fn chat(
    state: web::Data<State>,
    request: HttpRequest,
    body: web::Json<ChatRequest>,
) -> Result<HttpResponse, ServiceError> {
    respond(&state, &request, body.into_inner().check()?, Kind::Chat).await
}

async fn respond(state: &State, request: &HttpRequest, asked: Asked, kind: Kind) -> Result<HttpResponse, ServiceError> {
    if *state.stopping.borrow() {
        return Err(ServiceError::Stopping);
    }
    let checkpoint = checkpoint(state, &asked.model).await?;
    let head = Head::new(kind, asked.stream, asked.model, checkpoint.id)?;
    let texts = asked.wish.prompts.len() * asked.wish.n as usize;
    let writing = state.samplers.begin(checkpoint.directory.as_ref(), asked.wish).await?;
    if asked.stream {
        return Ok(stream::respond(writing, head, kind, asked.include_usage));
    }
    let (texts, usage) = tokio::select! {
        whole = collect(writing, texts) => whole?,
        () = peer::gone(request) => return Err(ServiceError::Sampling("the client has left".into())),
    };
    let texts = (0..).zip(texts);
    Ok(match kind {
        Kind::Text => {
            let choice = |(index, (text, reason))| Choice::new(index, Continuation { text }, reason);
            HttpResponse::Ok().json(Completion::new(head, texts.map(choice).collect(), Some(usage)))
        }
        Kind::Chat => {
            let message = |content| Message { role: "assistant", content, refusal: None };
            let choice = |(index, (text, reason))| Choice::new(index, Answer { message: message(text) }, reason);
            HttpResponse::Ok().json(Completion::new(head, texts.map(choice).collect(), Some(usage)))
        }
    })
}

/// Waits until all texts are whole.
async fn collect(mut writing: Writing, texts: usize) -> Result<(Vec<(String, Option<Reason>)>, Usage), ServiceError> {
    let mut whole = vec![(String::new(), None); texts];
    let mut usage = Usage::new(0, 0);
    while let Some(message) = writing.next().await? {
        match message {
            FromSampler::Text { index, text } => {
                if let Some(choice) = whole.get_mut(index as usize) {
                    choice.0.push_str(&text);
                }
            }
            FromSampler::Whole { index, reason } => {
                if let Some(choice) = whole.get_mut(index as usize) {
                    choice.1 = Some(reason);
                }
            }
            FromSampler::Done { prompt_tokens, completion_tokens } => {
                usage = Usage::new(prompt_tokens, completion_tokens);
            }
            // The first comes before, the second is an error already.
            FromSampler::Ready | FromSampler::Failed { .. } => {}
        }
    }
    Ok((whole, usage))
}

/// The checkpoint that a model's name stands for: its own id, a trained model, or a trained model after some step.
async fn checkpoint(state: &State, model: &str) -> Result<CheckpointRow, ServiceError> {
    if preset(model).is_some() {
        let message = format!("`{model}` is not trained: give a trained model, or the id of a checkpoint");
        return Err(ServiceError::invalid("model", message));
    }
    let absent = || ServiceError::NotFound { what: "trained model", id: model.chars().take(200).collect() };
    if let Ok(id) = model.parse::<CheckpointId>() {
        return state.store.read(move |store| store.checkpoint(&id)).await?.ok_or_else(absent);
    }
    let (name, step) = match model.rsplit_once(STEP_MARK) {
        Some((name, step)) => (name, Some(step.parse::<u32>().map_err(|_| absent())?)),
        None => (model, None),
    };
    let tail = name.rsplit_once(':').map_or(name, |(_, tail)| tail);
    let id: JobId = format!("{}{tail}", JobId::PREFIX).parse().map_err(|_| absent())?;
    let name = name.to_owned();
    let found = state.store.read(move |store| {
        let job = store.job(&id)?.filter(|job| job.trained_name() == name);
        // Without a step the whole training is meant.
        let job = job.filter(|job| step.is_some() || job.fine_tuned_model.is_some());
        job.map_or(Ok(None), |job| store.checkpoint_at(&job.id, step.map(u64::from)))
    });
    found.await?.ok_or_else(absent)
}
