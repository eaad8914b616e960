//! A client of `patrickstar serve`: what the commands `submit` and `jobs` say to it.
//!
//! # Layout
//! - `upload`: training data as a form that is read while it is sent.
//! - `sse`: server-sent events, parsed.
//! - `follow`: a job's events to its end, over as many connections as it takes.

mod error;
mod follow;
mod sse;
mod upload;

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use ureq::http::Response;
use ureq::http::header::{AUTHORIZATION, CONTENT_TYPE};
use ureq::{Agent, Body, RequestBuilder};

pub use error::ClientError;
pub use follow::News;

/// A service that takes no connection for so long is not there.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest silence: an idle stream says something every 15 s, and an upload is answered once it is on disk.
const SILENCE: Duration = Duration::from_secs(60);

/// Talks to one service.
pub struct Client {
    agent: Agent,
    url: String,
    token: Option<String>,
}

impl Client {
    /// A client of the service at `url`, which shows `token` if there is one.
    pub fn new(url: &str, token: Option<String>) -> Result<Self, ClientError> {
        let url = url.trim_end_matches('/');
        let authority = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
        if authority.is_none_or(str::is_empty) {
            return Err(ClientError::Url(url.to_owned()));
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // The service is one machine: nobody else has a say in where its requests go.
            .max_redirects(0)
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE))
            .user_agent(concat!("patrickstar/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Ok(Client { agent, url: url.to_owned(), token })
    }

    /// The token in the first line of a file.
    pub fn read_token(path: &Path) -> Result<String, ClientError> {
        let text = std::fs::read_to_string(path).map_err(|source| ClientError::Io { path: path.to_owned(), source })?;
        let token = text.lines().next().unwrap_or_default().trim();
        // Whatever else it is, a header could not hold it.
        let is_token = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
        if is_token { Ok(token.to_owned()) } else { Err(ClientError::Token(path.to_owned())) }
    }

    /// A job.
    pub fn job(&self, id: &str) -> Result<Value, ClientError> {
        self.get(&format!("/v1/fine_tuning/jobs/{id}"))
    }

    /// The newest `limit` jobs, newest first.
    pub fn jobs(&self, limit: usize) -> Result<Vec<Value>, ClientError> {
        let mut all = Vec::new();
        let mut after = String::new();
        while all.len() < limit {
            let page = (limit - all.len()).min(100);
            let list = self.get(&format!("/v1/fine_tuning/jobs?limit={page}{after}"))?;
            all.extend(list["data"].as_array().into_iter().flatten().cloned());
            match list["last_id"].as_str() {
                Some(last) if list["has_more"] == true => after = format!("&after={last}"),
                _ => break,
            }
        }
        Ok(all)
    }

    /// Creates a job.
    pub fn create(&self, body: &Value) -> Result<Value, ClientError> {
        self.post("/v1/fine_tuning/jobs", body)
    }

    /// Tells a job to `pause`, `resume` or `cancel`; returns it as it is then.
    pub fn order(&self, id: &str, order: &str) -> Result<Value, ClientError> {
        self.post(&format!("/v1/fine_tuning/jobs/{id}/{order}"), &Value::Object(serde_json::Map::new()))
    }

    fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.answer(self.with_token(self.agent.get(format!("{}{path}", self.url))).call())
    }

    fn post(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        let request = self.with_token(self.agent.post(format!("{}{path}", self.url)));
        self.answer(request.header(CONTENT_TYPE, "application/json").send(body.to_string()))
    }

    fn with_token<B>(&self, request: RequestBuilder<B>) -> RequestBuilder<B> {
        match &self.token {
            Some(token) => request.header(AUTHORIZATION, format!("Bearer {token}")),
            None => request,
        }
    }

    /// The JSON of a success.
    fn answer(&self, sent: Result<Response<Body>, ureq::Error>) -> Result<Value, ClientError> {
        let mut response = self.accepted(sent)?;
        let text = response.body_mut().read_to_string().map_err(|error| self.failure(error))?;
        serde_json::from_str(&text).map_err(|error| self.foreign(format!("not JSON: {error}")))
    }

    /// A success whose body is still to be read.
    fn accepted(&self, sent: Result<Response<Body>, ureq::Error>) -> Result<Response<Body>, ClientError> {
        let mut response = sent.map_err(|error| self.failure(error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.body_mut().read_to_string().unwrap_or_default();
        let said: Option<Value> = serde_json::from_str(&text).ok();
        let message = said.as_ref().and_then(|body| body.pointer("/error/message")?.as_str());
        match message {
            Some(message) => Err(ClientError::Refused { status: status.as_u16(), message: message.to_owned() }),
            None => Err(self.foreign(format!("HTTP {status} without an error object"))),
        }
    }

    fn failure(&self, error: ureq::Error) -> ClientError {
        match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => ClientError::Url(self.url.clone()),
            ureq::Error::Protocol(error) => self.foreign(error.to_string()),
            other => ClientError::Unreachable { url: self.url.clone(), reason: other.to_string() },
        }
    }

    fn foreign(&self, reason: String) -> ClientError {
        ClientError::Foreign { url: self.url.clone(), reason }
    }
}
