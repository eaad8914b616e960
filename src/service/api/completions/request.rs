//! What a client may ask for, and what is refused by name instead of being ignored.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::data::{END_OF_MESSAGE, chat_prompt};
use crate::service::error::ServiceError;
use crate::service::sampler::protocol::Wish;

/// Texts of one request, over all prompts.
const MOST_TEXTS: usize = 8;
/// Tokens of a text.
const MOST_TOKENS: u32 = 4096;
/// Tokens of a continuation where nobody says how many, as OpenAI has it.
const DEFAULT_TOKENS: u32 = 16;
/// Tokens of an answer in a conversation, which should end by itself.
const DEFAULT_CHAT_TOKENS: u32 = 256;
/// Texts that end a continuation.
const MOST_STOPS: usize = 4;
/// Bytes of one.
const LONGEST_STOP: usize = 256;
/// Settings that are not supported, unless they change nothing.
const REFUSED: [&str; 15] = [
    "audio",
    "best_of",
    "echo",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "prediction",
    "presence_penalty",
    "response_format",
    "suffix",
    "tool_choice",
    "tools",
    "top_logprobs",
];

/// Body of `POST /v1/completions`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CompletionRequest {
    /// A trained model, or a checkpoint by its id.
    #[schema(example = "ftckpt-...")]
    model: String,
    prompt: OneOrMany,
    /// 16 if absent.
    #[schema(minimum = 1, maximum = 4096)]
    max_tokens: Option<u32>,
    #[serde(flatten)]
    settings: Settings,
}

/// Body of `POST /v1/chat/completions`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ChatRequest {
    /// A trained model, or a checkpoint by its id.
    #[schema(example = "ftckpt-...")]
    model: String,
    /// The conversation so far, as in a training file.
    #[schema(value_type = Vec<Object>)]
    messages: Value,
    /// The older name of the next.
    #[schema(minimum = 1, maximum = 4096)]
    max_tokens: Option<u32>,
    /// 256 if absent.
    #[schema(minimum = 1, maximum = 4096)]
    max_completion_tokens: Option<u32>,
    #[serde(flatten)]
    settings: Settings,
}

/// How texts are written.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = TextSettings)]
struct Settings {
    /// 0 always takes the likeliest token; 1 if absent.
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f64>,
    /// Only the likeliest tokens that have this probability together; 1 if absent.
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f64>,
    /// Texts for each prompt; 8 at most over all.
    #[schema(minimum = 1, maximum = 8)]
    n: Option<u32>,
    /// The same seed, model and prompt give the same text.
    seed: Option<i64>,
    /// A text ends before any of these; 4 at most.
    stop: Option<OneOrMany>,
    /// Whether pieces are sent as they are written.
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    /// Everything else.
    #[serde(flatten)]
    #[schema(ignore)]
    rest: Map<String, Value>,
}

/// What a stream says beside the text.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
struct StreamOptions {
    /// Whether a last piece counts the tokens.
    include_usage: Option<bool>,
}

/// A text, or several.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            OneOrMany::One(text) => vec![text],
            OneOrMany::Many(texts) => texts,
        }
    }
}

/// A request that can be granted.
#[derive(Debug)]
pub struct Asked {
    /// As the client named it.
    pub model: String,
    /// What is to be written.
    pub wish: Wish,
    /// Whether pieces are sent as they are written.
    pub stream: bool,
    /// Whether a stream counts the tokens.
    pub include_usage: bool,
}

impl CompletionRequest {
    /// Checks everything but the model.
    pub fn check(self) -> Result<Asked, ServiceError> {
        let prompts = self.prompt.into_vec();
        self.settings.asked(self.model, prompts, ("max_tokens", self.max_tokens, DEFAULT_TOKENS), None)
    }
}

impl ChatRequest {
    /// Checks everything but the model.
    pub fn check(self) -> Result<Asked, ServiceError> {
        let prompt = chat_prompt(&self.messages).map_err(|reason| ServiceError::invalid("messages", reason))?;
        let tokens = match (self.max_completion_tokens, self.max_tokens) {
            (None, Some(tokens)) => ("max_tokens", Some(tokens), DEFAULT_CHAT_TOKENS),
            (tokens, _) => ("max_completion_tokens", tokens, DEFAULT_CHAT_TOKENS),
        };
        self.settings.asked(self.model, vec![prompt], tokens, Some(END_OF_MESSAGE))
    }
}

impl Settings {
    fn asked(
        self,
        model: String,
        prompts: Vec<String>,
        (name, tokens, default): (&str, Option<u32>, u32),
        own_stop: Option<&str>,
    ) -> Result<Asked, ServiceError> {
        self.refuse_unsupported()?;
        let max_tokens = tokens.unwrap_or(default);
        if !(1..=MOST_TOKENS).contains(&max_tokens) {
            return Err(ServiceError::invalid(name, format!("`{name}` must be from 1 to {MOST_TOKENS}")));
        }
        let n = self.n.unwrap_or(1);
        if n == 0 || prompts.is_empty() || prompts.len().saturating_mul(n as usize) > MOST_TEXTS {
            let message = format!("`n` times the number of prompts must be from 1 to {MOST_TEXTS}");
            return Err(ServiceError::invalid("n", message));
        }
        let mut stop = self.stop.map(OneOrMany::into_vec).unwrap_or_default();
        let fits = |stop: &String| (1..=LONGEST_STOP).contains(&stop.len());
        if stop.len() > MOST_STOPS || !stop.iter().all(fits) {
            let message = format!("`stop` must be at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} bytes");
            return Err(ServiceError::invalid("stop", message));
        }
        stop.extend(own_stop.map(str::to_owned));
        let wish = Wish {
            prompts,
            n,
            max_tokens,
            temperature: within("temperature", self.temperature, 2.0)?,
            top_p: within("top_p", self.top_p, 1.0)?,
            stop,
            seed: self.seed.map_or_else(random_seed, |seed| Ok(seed as u64))?,
        };
        let include_usage = self.stream_options.unwrap_or_default().include_usage.unwrap_or(false);
        Ok(Asked { model, wish, stream: self.stream.unwrap_or(false), include_usage })
    }

    fn refuse_unsupported(&self) -> Result<(), ServiceError> {
        let given = REFUSED.iter().find(|name| self.rest.get(**name).is_some_and(|value| !changes_nothing(value)));
        given
            .map_or(Ok(()), |name| Err(ServiceError::invalid(name, format!("`{name}` is not supported: leave it out"))))
    }
}

fn changes_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        // `best_of` = 1 is what there is anyway.
        Value::Number(number) => [Some(0.0), Some(1.0)].contains(&number.as_f64()),
        Value::String(word) => ["", "none", "auto"].contains(&word.as_str()),
        Value::Array(items) => items.is_empty(),
        Value::Object(pairs) => pairs.is_empty() || *value == json!({ "type": "text" }),
        Value::Bool(true) => false,
    }
}

/// A number from 0 to `most`; 1 if absent.
fn within(name: &str, given: Option<f64>, most: f64) -> Result<f64, ServiceError> {
    let value = given.unwrap_or(1.0);
    if (0.0..=most).contains(&value) {
        return Ok(value);
    }
    Err(ServiceError::invalid(name, format!("`{name}` must be from 0 to {most}")))
}

fn random_seed() -> Result<u64, ServiceError> {
    getrandom::u64().map_err(|error| ServiceError::Internal(format!("no random numbers: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(more: Value) -> String {
        let mut body = json!({ "model": "m", "prompt": "p" });
        for (key, value) in more.as_object().unwrap() {
            body[key] = value.clone();
        }
        let request = serde_json::from_value::<CompletionRequest>(body);
        request.map_or_else(|error| error.to_string(), |request| request.check().unwrap_err().to_string())
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (body, expected) in [
            (json!({ "logprobs": 5 }), "`logprobs` is not supported"),
            (json!({ "echo": true }), "`echo`"),
            (json!({ "frequency_penalty": 0.5 }), "`frequency_penalty`"),
            (json!({ "response_format": { "type": "json_object" } }), "`response_format`"),
            (json!({ "n": 9 }), "`n` times"),
            (json!({ "prompt": ["a", "b", "c"], "n": 3 }), "`n` times"),
            (json!({ "prompt": [] }), "`n` times"),
            (json!({ "prompt": [1, 2] }), "OneOrMany"),
            (json!({ "max_tokens": 0 }), "`max_tokens` must be from 1"),
            (json!({ "max_tokens": 5000 }), "to 4096"),
            (json!({ "temperature": 2.5 }), "`temperature` must be from 0 to 2"),
            (json!({ "top_p": -0.1 }), "`top_p`"),
            (json!({ "stop": ["", "a"] }), "`stop`"),
        ] {
            let error = refusal(body.clone());
            assert!(error.contains(expected), "{body}: {error}");
        }
    }

    #[test]
    fn settings_that_change_nothing_are_accepted() {
        let body = json!({
            "model": "m", "messages": [{ "role": "user", "content": "hi" }], "seed": -3, "stop": "\n", "user": "somebody",
            "logprobs": false, "tools": [], "tool_choice": "none", "presence_penalty": 0, "response_format": { "type": "text" },
        });
        let asked = serde_json::from_value::<ChatRequest>(body).unwrap().check().unwrap();
        assert_eq!(asked.wish.prompts, ["<|user|>\nhi<|end|>\n<|assistant|>\n"]);
        assert_eq!(asked.wish.stop, ["\n", END_OF_MESSAGE]);
        assert_eq!((asked.wish.max_tokens, asked.wish.seed, asked.stream), (256, -3i64 as u64, false));
    }
}
