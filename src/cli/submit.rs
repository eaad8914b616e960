//! `patrickstar submit`: the configuration of `train`, given to a service.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Map, Value, json};

use super::args::SubmitArgs;
use super::jobs::{client, show, watch};
use super::{CliError, output};
use crate::client::Client;
use crate::config::{Config, Loaded, Origin, Sources};
use crate::service::{is_reserved, preset_of_shape};

pub fn run(args: SubmitArgs) -> Result<ExitCode, CliError> {
    let loaded = Sources::process(args.source.config.clone(), args.source.set.clone()).load()?;
    let client = client(&args.connection)?;
    let mut body = body(&args, &loaded)?;
    let data = if args.data.is_empty() { vec![loaded.config.data.path.clone()] } else { args.data.clone() };
    body["training_file"] = upload(&client, &data)?;
    let own = loaded.config.data.validation_path.iter().cloned().collect();
    let validation = if args.validation.is_empty() { own } else { args.validation.clone() };
    if !validation.is_empty() {
        body["validation_file"] = upload(&client, &validation)?;
    }
    let job = client.create(&body)?;
    if !args.wait {
        show(&job, args.connection.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let id = job["id"].as_str().unwrap_or_default();
    output::note(&format!("created {id}; if this ends, it goes on: patrickstar jobs watch {id}"));
    watch(&client, id, &args.connection)
}

fn upload(client: &Client, data: &[PathBuf]) -> Result<Value, CliError> {
    let file = client.upload(data)?;
    let bytes = patrickstar_actors::types::Bytes(file["bytes"].as_u64().unwrap_or(0));
    output::note(&format!("uploaded {bytes} as {}", file["id"].as_str().unwrap_or_default()));
    Ok(file["id"].clone())
}

/// What the service is asked for, but for the file: the model that the configuration describes and everything that somebody
/// set. Defaults stay the service's.
fn body(args: &SubmitArgs, loaded: &Loaded) -> Result<Value, CliError> {
    let model = args.model.clone().unwrap_or_else(|| model(&loaded.config));
    let config = serde_json::to_value(&loaded.config).map_err(std::io::Error::from)?;
    let mut settings = Map::new();
    let mut left_out = Vec::new();
    for key in Config::keys().into_iter().map(|info| info.key) {
        if loaded.origins.of(&key) == Origin::Default {
            continue;
        }
        if is_reserved(&key) {
            left_out.push(key);
        } else if let Some(value) = config.pointer(&format!("/{}", key.replace('.', "/"))) {
            settings.insert(key, value.clone());
        }
    }
    // These are sent by other means.
    left_out.retain(|key| !["data.path", "data.validation_path", "model.path"].contains(&key.as_str()));
    if !left_out.is_empty() {
        output::note(&format!("left to the service: {}", left_out.join(", ")));
    }
    settings.insert("priority".to_owned(), json!(args.priority));
    let mut body = json!({ "model": model, "patrickstar": settings });
    if let Some(suffix) = &args.suffix {
        body["suffix"] = json!(suffix);
    }
    if let Some(epochs) = args.epochs {
        body["method"] = json!({ "type": "supervised", "supervised": { "hyperparameters": { "n_epochs": epochs } } });
    }
    Ok(body)
}

/// The directory's name, by which a service may know it too, or the preset of the shape.
fn model(config: &Config) -> String {
    let directory = config.model.path.as_ref().and_then(|path| path.file_name());
    directory.map_or_else(|| preset_of_shape(&config.model.preset), |name| name.to_string_lossy().into_owned())
}
