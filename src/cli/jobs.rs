//! `patrickstar jobs`: what a service has to do, and a say in it.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::args::{Connection, JobsAction, JobsArgs};
use super::progress::Steps;
use super::{CliError, output};
use crate::client::{Client, News};
use crate::service::tokens::TOKEN_VARIABLE;

/// Shortest time between two lines about steps.
const BETWEEN_LINES: Duration = Duration::from_secs(1);

pub fn run(args: JobsArgs) -> Result<ExitCode, CliError> {
    let client = client(&args.connection)?;
    let json = args.connection.json;
    match &args.action {
        JobsAction::List { limit } => list(&client.jobs(*limit)?, json)?,
        JobsAction::Show { id } => show(&client.job(id)?, json)?,
        JobsAction::Watch { id } => return watch(&client, id, &args.connection),
        JobsAction::Pause { id } => show(&client.order(id, "pause")?, json)?,
        JobsAction::Resume { id } => show(&client.order(id, "resume")?, json)?,
        JobsAction::Cancel { id } => show(&client.order(id, "cancel")?, json)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A client of the service that the command names.
pub fn client(connection: &Connection) -> Result<Client, CliError> {
    let token = match &connection.token_file {
        Some(path) => Some(Client::read_token(path)?),
        None => std::env::var(TOKEN_VARIABLE).ok().filter(|token| !token.is_empty()),
    };
    Ok(Client::new(&connection.url, token)?)
}

fn list(jobs: &[Value], json: bool) -> Result<(), CliError> {
    if json {
        return Ok(output::json(&json!({ "object": "list", "data": jobs }))?);
    }
    for job in jobs {
        output::line(&format!(
            "{}  {:<16}  {:>13}  {}",
            text(job, "id"),
            text(job, "status"),
            steps(job),
            text(job, "model")
        ))?;
    }
    Ok(())
}

/// Prints a job.
pub fn show(job: &Value, json: bool) -> Result<(), CliError> {
    if json {
        return Ok(output::json(job)?);
    }
    output::line(&format!("{} {}", text(job, "id"), text(job, "status")))?;
    let trained = ("trained model", text(job, "fine_tuned_model"));
    let error = ("error", job["error"]["message"].as_str().unwrap_or_default());
    for (name, value) in [("model", text(job, "model")), ("training file", text(job, "training_file")), trained, error]
    {
        if !value.is_empty() {
            output::line(&format!("  {name}: {value}"))?;
        }
    }
    let own = &job["patrickstar"];
    output::line(&format!("  steps: {}, priority {}, on {}", steps(job), own["priority"], text(own, "device")))?;
    Ok(())
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn steps(job: &Value) -> String {
    let own = &job["patrickstar"];
    // How many there will be is known once the file was read.
    let total = own["total_steps"].as_u64().map_or_else(|| "?".to_owned(), |total| total.to_string());
    format!("{}/{total}", own["step"])
}

/// Follows a job to its end and says how it ended.
pub fn watch(client: &Client, id: &str, connection: &Connection) -> Result<ExitCode, CliError> {
    let mut watcher = Watcher { steps: Steps::new(0, connection.json), json: connection.json, away: false, told: None };
    let ended = client.follow(id, Duration::from_secs(connection.patience), &mut |news| watcher.hear(&news));
    watcher.steps.finish();
    let job = ended?;
    show(&job, connection.json)?;
    outcome(&job)
}

fn outcome(job: &Value) -> Result<ExitCode, CliError> {
    let id = text(job, "id").to_owned();
    match text(job, "status") {
        "succeeded" => Ok(ExitCode::SUCCESS),
        "cancelled" => Err(CliError::JobCancelled(id)),
        _ => Err(CliError::JobFailed {
            job: id,
            code: text(&job["error"], "code").to_owned(),
            message: text(&job["error"], "message").to_owned(),
        }),
    }
}

struct Watcher {
    steps: Steps,
    json: bool,
    /// Whether the service was away when we last asked.
    away: bool,
    /// When the last line about a step was written.
    told: Option<Instant>,
}

impl Watcher {
    fn hear(&mut self, news: &News<'_>) {
        match news {
            News::Away(error) if !self.away => {
                self.away = true;
                self.steps.message(&format!("waiting for the service: {error}"));
            }
            News::Away(_) => {}
            News::Event(event) => {
                self.away = false;
                self.event(event);
            }
        }
    }

    fn event(&mut self, event: &Value) {
        if self.json {
            // A reader that left is noticed at the last line, which matters.
            let _ = output::json(event);
            return;
        }
        let data = &event["data"];
        let Some(step) = data["step"].as_u64().filter(|_| event["type"] == "metrics") else {
            self.steps.message(text(event, "message"));
            return;
        };
        let total = data["total_steps"].as_u64().unwrap_or(step);
        if total != self.steps.total() {
            self.steps.set_total(total);
        }
        let worth_a_line = step == total || self.told.is_none_or(|told| told.elapsed() > BETWEEN_LINES);
        if worth_a_line {
            self.told = Some(Instant::now());
        }
        let number = |name: &str| data[name].as_f64().unwrap_or(f64::NAN);
        let validation = data["valid_loss"].as_f64().map(|loss| format!("  validation {loss:.4}")).unwrap_or_default();
        let rate = number("tokens_per_second");
        let text = format!("loss {:.4}{validation}  {rate:.0} tok/s", number("train_loss"));
        self.steps.step(step, &text, worth_a_line);
    }
}
