//! Texts by trained models, as clients ask for them.

use std::io::{BufRead, BufReader};
use std::time::Duration;

use serde_json::{Value, json};

use crate::client::{Service, kill, until};

/// What the training file always answers.
const ANSWER: &str = "down to the sea, as all of them do";

/// A service with a model that has learnt its file by heart: the job and the model's name.
fn trained(service: &Service) -> (String, String) {
    let job = service
        .job(&service.training_file(), &json!({ "train.steps": 400, "train.lr": 0.01, "checkpoint.every": 100 }));
    let model = service.until_status(&job, "succeeded")["fine_tuned_model"].clone();
    (job, model.as_str().unwrap().to_owned())
}

fn complete(service: &Service, body: &Value) -> Value {
    service.post("/v1/completions", body).ok()
}

/// The pieces of a stream, without its last line.
fn pieces(service: &Service, path: &str, body: &Value) -> Vec<Value> {
    let answer = service.post(path, body);
    assert!(answer.head.contains("text/event-stream"), "{}", answer.head);
    let text = String::from_utf8(answer.body).unwrap();
    let mut lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(lines.pop(), Some("[DONE]"), "{text}");
    lines.into_iter().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn texts_are_continued_whole_and_in_pieces() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let (job, model) = trained(&service);
    let body = json!({ "model": model, "prompt": "which way", "max_tokens": 30, "seed": 4, "n": 2 });
    let whole = complete(&service, &body);
    assert_eq!(
        (whole["object"].as_str(), whole["choices"].as_array().map(Vec::len)),
        (Some("text_completion"), Some(2))
    );
    assert_eq!(whole["usage"], json!({ "prompt_tokens": 9, "completion_tokens": 60, "total_tokens": 69 }));
    assert_eq!(whole["choices"][1]["finish_reason"], "length");
    // The same seed writes the same, in another process too; another seed does not.
    kill(service.workers()[0]);
    until("the sampler to be gone", || service.workers().is_empty().then_some(()));
    assert_eq!(complete(&service, &body)["choices"], whole["choices"]);
    assert_ne!(whole["choices"][0]["text"], whole["choices"][1]["text"]);
    let mut other = body.clone();
    other["seed"] = json!(5);
    assert_ne!(complete(&service, &other)["choices"], whole["choices"]);

    let mut streamed = body.clone();
    (streamed["stream"], streamed["stream_options"]) = (json!(true), json!({ "include_usage": true }));
    let mut pieces = pieces(&service, "/v1/completions", &streamed);
    assert_eq!(pieces.pop().unwrap()["usage"], whole["usage"]);
    assert!(pieces.len() > 20, "{pieces:?}");
    for choice in 0..2 {
        let of_choice = pieces.iter().map(|piece| &piece["choices"][0]).filter(|piece| piece["index"] == choice);
        let text: String = of_choice.map(|piece| piece["text"].as_str().unwrap()).collect();
        assert_eq!(text, whole["choices"][choice]["text"].as_str().unwrap());
    }

    // Every name of a checkpoint will do, and other checkpoints write other texts.
    let checkpoints = service.get(&format!("/v1/fine_tuning/jobs/{job}/checkpoints")).ok();
    let write = |name: &Value| {
        let body = json!({ "model": name, "prompt": "which way", "max_tokens": 30, "seed": 4 });
        complete(&service, &body)["choices"][0]["text"].clone()
    };
    let [last, middle] = [&checkpoints["data"][0], &checkpoints["data"][1]];
    assert_eq!(middle["step_number"], 300);
    assert_eq!(write(&last["id"]), whole["choices"][0]["text"]);
    assert_eq!(write(&last["fine_tuned_model_checkpoint"]), write(&last["id"]));
    assert_eq!(write(&middle["fine_tuned_model_checkpoint"]), write(&middle["id"]));
    assert_ne!(write(&middle["id"]), write(&last["id"]));
    assert!(service.workers().len() <= 2, "{:?}", service.workers());
}

#[test]
fn a_conversation_is_answered_as_it_was_learnt() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start(data.path());
    let (_, model) = trained(&service);
    let messages = json!([{ "role": "user", "content": "which way does the river run?" }]);
    let body = json!({ "model": model, "messages": messages, "temperature": 0 });
    let whole = service.post("/v1/chat/completions", &body).ok();
    assert_eq!(whole["object"], "chat.completion");
    let choice = &whole["choices"][0];
    assert_eq!(
        (choice["message"]["role"].as_str(), choice["message"]["content"].as_str()),
        (Some("assistant"), Some(ANSWER))
    );
    assert_eq!(choice["finish_reason"], "stop");
    let mut stopped = body.clone();
    stopped["stop"] = json!([",", "zzz"]);
    let stopped = service.post("/v1/chat/completions", &stopped).ok();
    assert_eq!(stopped["choices"][0]["message"]["content"], "down to the sea");

    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let pieces = pieces(&service, "/v1/chat/completions", &streamed);
    assert!(pieces.iter().all(|piece| piece["object"] == "chat.completion.chunk"), "{pieces:?}");
    assert_eq!(pieces[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = pieces.iter().filter_map(|piece| piece["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, ANSWER);
    assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], "stop");

    let refused = |path: &str, body: Value, status| service.post(path, &body).error(status);
    assert!(refused("/v1/completions", json!({ "model": "gpt-tiny", "prompt": "a" }), 400).contains("not trained"));
    for absent in [
        "ft:gpt-tiny:patrickstar::000000000000000000000000",
        "ftckpt-000000000000000000000000",
        "x",
        &format!("{model}:ckpt-step-7"),
    ] {
        refused("/v1/completions", json!({ "model": absent, "prompt": "a" }), 404);
    }
    refused("/v1/completions", json!({ "model": model, "prompt": "a", "logprobs": 3 }), 400);
    let boss = json!([{ "role": "boss", "content": "" }]);
    assert!(refused("/v1/chat/completions", json!({ "model": model, "messages": boss }), 400).contains("unknown role"));
}

#[test]
fn a_sampler_that_is_lost_or_left_harms_nobody() {
    let data = tempfile::tempdir().unwrap();
    let service = Service::start_with(data.path(), &["--max-samplers", "1"], None);
    let (_, model) = trained(&service);
    let long = json!({ "model": model, "prompt": "a", "max_tokens": 4096, "stream": true });
    let short = json!({ "model": model, "prompt": "a", "max_tokens": 2 });
    let begin = || {
        let headers = [("Content-Type", "application/json")];
        let stream = service.send("POST", "/v1/completions", &headers, long.to_string().as_bytes()).unwrap();
        let mut lines = BufReader::new(stream).lines();
        lines.find(|line| line.as_ref().unwrap().starts_with("data: ")).unwrap().unwrap();
        lines
    };
    let mut lines = begin();
    let busy = service.post("/v1/completions", &short);
    assert!(busy.head.to_lowercase().contains("retry-after: "), "{}", busy.head);
    busy.error(429);
    // Its death ends the stream with an error, and nothing else.
    kill(service.workers()[0]);
    let last = lines.find(|line| line.as_ref().unwrap().contains("\"error\"")).unwrap().unwrap();
    assert!(last.contains("sampling_failed") && last.contains("signal: 9"), "{last}");
    complete(&service, &short);

    // A client that leaves takes the work with it, whether it was sent pieces or not.
    let lines = begin();
    let sampler = service.workers()[0];
    drop(lines);
    until("the abandoned sampler to end", || (!service.workers().contains(&sampler)).then_some(()));
    complete(&service, &short);
    let mut whole = long.clone();
    whole["stream"] = json!(false);
    let sampler = service.workers()[0];
    let headers = [("Content-Type", "application/json")];
    let connection = until("the sampler to be busy", || {
        let connection = service.send("POST", "/v1/completions", &headers, whole.to_string().as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        // If the short one came first, the long one was refused.
        (service.post("/v1/completions", &short).status == 429).then_some(connection)
    });
    drop(connection);
    until("the abandoned sampler to end", || (!service.workers().contains(&sampler)).then_some(()));
    complete(&service, &short);

    // A job may train at the same time, and files that are gone are told apart from failures.
    let job = service.job(&service.training_file(), &json!({ "train.steps": 3 }));
    service.until_status(&job, "succeeded");
    std::fs::remove_dir_all(data.path().join("jobs")).unwrap();
    until("the model to be put away", || service.workers().is_empty().then_some(()));
    assert!(service.post("/v1/completions", &short).error(404).contains("removed"));
}
