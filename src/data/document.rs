//! One line of JSONL: plain text, a prompt with its completion, or a conversation.
//!
//! Plain text is learnt whole. Of the others only what the model is meant to write is learnt; the rest is context.

use serde_json::{Map, Value};

/// Ends a message of a conversation: a model that is to answer must also learn when to stop.
pub const END_OF_MESSAGE: &str = "<|end|>";
/// What marks the parts of a conversation in the text that the model sees.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// A line of training data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Document {
    Text(String),
    Completion { prompt: String, completion: String },
    Messages(Vec<Message>),
}

/// A part of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    role: String,
    content: String,
    learnt: bool,
}

impl Document {
    /// Reads a line; the error says what is wrong with it and what would be right.
    pub fn parse(line: &[u8]) -> Result<Self, String> {
        let value: Value =
            serde_json::from_slice(line).map_err(|error| format!("not JSON ({error}): fix or remove the line"))?;
        let Value::Object(object) = value else { return Err("not a JSON object: write one a line".into()) };
        if let Some(messages) = object.get("messages") {
            return parse_messages(messages);
        }
        if object.contains_key("prompt") || object.contains_key("completion") {
            let (prompt, completion) = (string(&object, "prompt")?, string(&object, "completion")?);
            return Ok(Document::Completion { prompt, completion });
        }
        if object.contains_key("text") {
            return string(&object, "text").map(Document::Text);
        }
        Err("none of `messages`, `prompt` with `completion`, and `text`: every line needs one of them".into())
    }

    /// The text that the model sees, and whether each part of it is learnt.
    pub fn parts(self) -> Vec<(String, bool)> {
        match self {
            Document::Text(text) => vec![(text, true)],
            Document::Completion { prompt, completion } => vec![(prompt, false), (completion + "\n", true)],
            Document::Messages(messages) => {
                let mut parts = Vec::new();
                for message in messages {
                    parts.push((opening(&message.role), false));
                    parts.push((message.content + END_OF_MESSAGE, message.learnt));
                    parts.push(("\n".to_owned(), false));
                }
                parts.push(("\n".to_owned(), false));
                parts
            }
        }
    }
}

fn opening(role: &str) -> String {
    format!("<|{role}|>\n")
}

/// The text of a conversation up to where an assistant's answer begins, as in training.
pub fn chat_prompt(messages: &Value) -> Result<String, String> {
    let parts = Document::Messages(read_messages(messages)?).parts();
    // The last part ends the conversation, which goes on here.
    let said = parts.iter().take(parts.len() - 1).map(|(text, _)| text.as_str());
    Ok(said.collect::<String>() + &opening("assistant"))
}

fn string(object: &Map<String, Value>, field: &str) -> Result<String, String> {
    let text = object.get(field).and_then(Value::as_str);
    text.map(str::to_owned).ok_or_else(|| format!("no string field `{field}`: add it"))
}

fn parse_messages(messages: &Value) -> Result<Document, String> {
    let parsed = read_messages(messages)?;
    if !parsed.iter().any(|message| message.learnt) {
        return Err("no assistant message to learn from: add one, or raise its weight".into());
    }
    Ok(Document::Messages(parsed))
}

fn read_messages(messages: &Value) -> Result<Vec<Message>, String> {
    let messages = messages.as_array().ok_or("`messages` is not a list")?;
    let parsed = messages
        .iter()
        .enumerate()
        .map(|(index, message)| parse_message(message).map_err(|reason| format!("message {}: {reason}", index + 1)));
    parsed.collect()
}

fn parse_message(message: &Value) -> Result<Message, String> {
    let object = message.as_object().ok_or("not an object")?;
    let role = string(object, "role")?;
    if !ROLES.contains(&role.as_str()) {
        return Err(format!("unknown role `{role}`: use one of {}", ROLES.join(", ")));
    }
    let content = match object.get("content") {
        Some(Value::Array(parts)) => text_of(parts)?,
        _ => string(object, "content")?,
    };
    let weight = match object.get("weight").map(Value::as_f64) {
        None => 1.0,
        Some(Some(weight)) if weight == 0.0 || weight == 1.0 => weight,
        Some(_) => return Err("`weight` is neither 0 nor 1".into()),
    };
    Ok(Message { learnt: role == "assistant" && weight > 0.0, role, content })
}

fn text_of(parts: &[Value]) -> Result<String, String> {
    let texts = parts.iter().map(|part| part.get("text").and_then(Value::as_str));
    texts.collect::<Option<String>>().ok_or_else(|| "`content` has a part that is not text: remove it".into())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{Batches, Corpus, NOT_LEARNT, Tokenizer};
    use super::*;

    #[test]
    fn only_what_the_model_should_write_is_learnt() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.jsonl");
        let lines = [
            r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
                {"role": "assistant", "content": "no", "weight": 0}]}"#
                .replace('\n', " "),
            r#"{"prompt": "2+2=", "completion": "4"}"#.to_owned(),
            r#"{"text": "plain"}"#.to_owned(),
        ];
        std::fs::write(&path, lines.join("\n")).unwrap();
        let corpus = Arc::new(Corpus::open(&path, &Tokenizer::Bytes).unwrap());
        let whole = corpus.len() as usize;
        let mut tokens = vec![0; whole];
        corpus.copy_tokens(0, &mut tokens);
        let text = Tokenizer::Bytes.decode(&tokens);
        let talk = "<|user|>\nhi<|end|>\n<|assistant|>\nyes<|end|>\n<|assistant|>\nno<|end|>\n\n";
        assert_eq!(text, format!("{talk}2+2=4\nplain"));
        // An answer begins where training had one.
        let asked = chat_prompt(&serde_json::json!([{ "role": "user", "content": "hi" }])).unwrap();
        assert!(talk.starts_with(&asked) && talk[asked.len()..].starts_with("yes"), "{asked}");
        let mut batches = Batches::new(corpus, whole - 1, 1, 0, false).unwrap();
        let batch = batches.next_batch();
        let learnt = batch.target.iter().filter(|&&token| token != NOT_LEARNT);
        let learnt: String = learnt.map(|&token| char::from(token as u8)).collect();
        assert_eq!(learnt, "yes<|end|>4\nplain");
    }

    #[test]
    fn a_bad_line_says_what_would_be_right() {
        for (line, expected) in [
            ("[]", "not a JSON object"),
            (r#"{"prompt": "a"}"#, "`completion`"),
            (r#"{"messages": 1}"#, "not a list"),
            (r#"{"messages": []}"#, "no assistant message"),
            (r#"{"messages": [{"role": "boss", "content": ""}]}"#, "message 1: unknown role `boss`"),
            (r#"{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}"#, "neither 0 nor 1"),
            (r#"{"messages": [{"role": "user", "content": [{"image": 1}]}]}"#, "not text"),
        ] {
            let error = Document::parse(line.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
