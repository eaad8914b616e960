//! What a client asks for, as a job that can be stored: preset, hyperparameters and overrides become one configuration.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::bounds;
use super::directories::ModelRoots;
use super::error::ServiceError;
use super::hyperparameters::{Hyperparameters, HyperparametersShape};
use super::presets::{preset, presets};
use super::store::{FileId, NewJob};
use crate::config::{Config, ConfigError, Loaded, Origin, Sources};
use crate::train::device::is_cuda;

/// Keys that name files of the machine: jobs get theirs from the service.
const RESERVED: [&str; 6] =
    ["data.path", "data.validation_path", "data.tokenizer", "train.output", "model.path", "memory.disk_path"];
/// Whether a job cannot set this key: it is the service's.
pub(crate) fn is_reserved(key: &str) -> bool {
    RESERVED.contains(&key) || key.starts_with("service.")
}

/// Passes over the data where nobody says how many.
const DEFAULT_EPOCHS: u32 = 3;

/// Body of `POST /v1/fine_tuning/jobs`. Fields that are not here belong to other services and are ignored.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct JobRequest {
    /// One of `GET /v1/models`.
    #[schema(example = "gpt-tiny")]
    model: String,
    /// An uploaded file of lines of JSON.
    training_file: String,
    /// An uploaded file on which the loss is looked at every `train.eval_every` steps, without training.
    validation_file: Option<String>,
    /// Becomes part of the trained model's name.
    #[schema(min_length = 1, max_length = 64)]
    suffix: Option<String>,
    #[schema(maximum = 2147483647)]
    seed: Option<u32>,
    /// At most 16 pairs: keys of 64 characters, values of 512.
    #[schema(value_type = Option<std::collections::HashMap<String, String>>)]
    metadata: Option<Map<String, Value>>,
    /// Not supported.
    #[schema(value_type = Option<Vec<Value>>)]
    integrations: Option<Value>,
    /// `{"type": "supervised", "supervised": {"hyperparameters": {...}}}`.
    #[schema(value_type = Option<Object>)]
    method: Option<Value>,
    /// The older place of the same.
    #[schema(value_type = Option<HyperparametersShape>)]
    hyperparameters: Option<Value>,
    /// Any setting of the configuration, nested or dotted, and `priority`.
    #[schema(value_type = Option<Object>)]
    patrickstar: Option<Map<String, Value>>,
}

/// Body of `POST /v1/patrickstar/plan`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct PlanRequest {
    /// One of `GET /v1/models`.
    #[schema(example = "gpt-tiny")]
    model: String,
    /// As for a job.
    #[schema(value_type = Option<Object>)]
    method: Option<Value>,
    /// As for a job.
    #[schema(value_type = Option<HyperparametersShape>)]
    hyperparameters: Option<Value>,
    /// As for a job.
    #[schema(value_type = Option<Object>)]
    patrickstar: Option<Map<String, Value>>,
}

impl PlanRequest {
    /// The configuration that a job of these settings would have.
    pub fn config(self, base: &Loaded, roots: &ModelRoots) -> Result<Config, ServiceError> {
        let wanted = Hyperparameters::read(self.method.as_ref(), self.hyperparameters.as_ref())?;
        let pairs = model_pairs(&self.model, roots)?;
        Ok(resolve(base, pairs, &wanted, self.patrickstar.unwrap_or_default())?.config)
    }
}

impl JobRequest {
    /// The file that the job trains on.
    pub fn training_file(&self) -> Result<FileId, ServiceError> {
        file_id("training_file", &self.training_file)
    }

    /// The file that its loss is looked at on.
    pub fn validation_file(&self) -> Result<Option<FileId>, ServiceError> {
        self.validation_file.as_deref().map(|file| file_id("validation_file", file)).transpose()
    }

    /// The job, checked in everything but the content of its file.
    pub fn into_job(self, base: &Loaded, roots: &ModelRoots) -> Result<NewJob, ServiceError> {
        self.check()?;
        let wanted = Hyperparameters::read(self.method.as_ref(), self.hyperparameters.as_ref())?;
        let (training_file, validation_file) = (self.training_file()?, self.validation_file()?);
        let mut overrides = self.patrickstar.unwrap_or_default();
        let priority = take_priority(&mut overrides)?;
        let mut loaded = resolve(base, model_pairs(&self.model, roots)?, &wanted, overrides)?;
        let own_steps = loaded.origins.of("train.steps") != Origin::Default;
        if own_steps && wanted.n_epochs.is_some() {
            let message = "`n_epochs` and `train.steps` both say how long to train: give one of them";
            return Err(ServiceError::invalid("n_epochs", message));
        }
        let seed = match self.seed {
            Some(seed) => seed,
            None if loaded.origins.of("train.seed") != Origin::Default => loaded.config.train.seed as u32,
            None => random_seed()?,
        };
        loaded.config.train.seed = u64::from(seed);
        Ok(NewJob {
            model: self.model,
            training_file,
            validation_file,
            suffix: self.suffix,
            seed,
            metadata: self.metadata.unwrap_or_default(),
            hyperparameters: json!(wanted.shown()),
            epochs: (!own_steps).then(|| wanted.n_epochs.unwrap_or(DEFAULT_EPOCHS)),
            device: device(&loaded.config),
            config: serde_json::to_value(&loaded.config)
                .map_err(|error| ServiceError::Internal(format!("the configuration is not JSON: {error}")))?,
            priority,
        })
    }

    fn check(&self) -> Result<(), ServiceError> {
        let absent = |value: &Option<Value>| value.as_ref().is_none_or(Value::is_null);
        if !absent(&self.integrations) && self.integrations != Some(json!([])) {
            let message = "`integrations` are not supported: the job's directory has TensorBoard files";
            return Err(ServiceError::invalid("integrations", message));
        }
        if self.suffix.as_ref().is_some_and(|suffix| !is_suffix(suffix)) {
            let message = "`suffix` must be 1 to 64 letters, digits, `-`, `_` or `.`";
            return Err(ServiceError::invalid("suffix", message));
        }
        if self.seed.is_some_and(|seed| seed > i32::MAX as u32) {
            return Err(ServiceError::invalid("seed", "`seed` must be from 0 to 2147483647"));
        }
        let metadata = self.metadata.iter().flatten();
        let fits = |(key, value): (&String, &Value)| {
            key.chars().count() <= 64 && value.as_str().is_some_and(|text| text.chars().count() <= 512)
        };
        if self.metadata.as_ref().is_some_and(|pairs| pairs.len() > 16) || !metadata.into_iter().all(fits) {
            let message = "`metadata` must be at most 16 pairs of text: keys of 64 characters, values of 512";
            return Err(ServiceError::invalid("metadata", message));
        }
        Ok(())
    }
}

fn file_id(param: &str, text: &str) -> Result<FileId, ServiceError> {
    text.parse().map_err(|_| ServiceError::Invalid {
        message: format!("no such file: {text}: upload it to /v1/files first"),
        param: Some(param.into()),
        code: "file_not_found",
    })
}

fn is_suffix(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

fn take_priority(overrides: &mut Map<String, Value>) -> Result<i32, ServiceError> {
    let Some(value) = overrides.remove("priority") else { return Ok(0) };
    let whole = value.as_i64().and_then(|value| i32::try_from(value).ok());
    whole.ok_or_else(|| ServiceError::invalid("patrickstar.priority", "`priority` must be a whole number"))
}

fn random_seed() -> Result<u32, ServiceError> {
    let number = getrandom::u32().map_err(|error| ServiceError::Internal(format!("no random numbers: {error}")))?;
    Ok(number >> 1)
}

/// The name of what a job needs for itself.
fn device(config: &Config) -> String {
    if is_cuda(&config.compute) { format!("cuda:{}", config.compute.ordinal) } else { "cpu".to_owned() }
}

/// What the name of a model stands for: a preset, or a directory.
fn model_pairs(model: &str, roots: &ModelRoots) -> Result<Vec<String>, ServiceError> {
    if let Some(preset) = preset(model) {
        return Ok(preset.pairs());
    }
    if let Some(directory) = roots.find(model)? {
        return Ok(directory.pairs());
    }
    let known: Vec<String> = presets().into_iter().map(|preset| preset.id).chain(roots.list()).collect();
    let model: String = model.chars().take(128).collect();
    Err(ServiceError::Invalid {
        message: format!("no such model: {model}: use one of {}", known.join(", ")),
        param: Some("model".into()),
        code: "model_not_found",
    })
}

/// The service's configuration, then the model, then hyperparameters, then the client's own settings; the last one wins.
fn resolve(
    base: &Loaded,
    mut set: Vec<String>,
    wanted: &Hyperparameters,
    overrides: Map<String, Value>,
) -> Result<Loaded, ServiceError> {
    set.extend(wanted.batch_size.map(|batch| format!("train.batch={batch}")));
    flatten("", Value::Object(overrides), &mut set)?;
    let mut loaded = Sources { base: Some(base.clone()), set, ..Sources::default() }.load().map_err(refusal)?;
    if let Some(factor) = wanted.learning_rate_multiplier {
        loaded.config.train.lr *= factor;
    }
    // A service is asked for checkpoints and curves; a command that runs once is not.
    let unset = |key: &str| loaded.origins.of(key) == Origin::Default;
    let (every, keep, log) = (unset("checkpoint.every"), unset("checkpoint.keep"), unset("train.log_every"));
    let eval = unset("train.eval_every");
    let config = &mut loaded.config;
    config.checkpoint.every = if every { 50 } else { config.checkpoint.every };
    config.checkpoint.keep = if keep { 5 } else { config.checkpoint.keep };
    config.train.log_every = if log { 1 } else { config.train.log_every };
    // Every checkpoint has its validation loss.
    config.train.eval_every = if eval { config.checkpoint.every } else { config.train.eval_every };
    config.validate().map_err(refusal)?;
    bounds::check(config)?;
    Ok(loaded)
}

/// `{"train": {"steps": 5}}` and `{"train.steps": 5}` to `train.steps=5`.
fn flatten(prefix: &str, value: Value, pairs: &mut Vec<String>) -> Result<(), ServiceError> {
    let param = format!("patrickstar.{prefix}");
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.".contains(&byte)) {
                    let name: String = name.chars().take(64).collect();
                    let message = format!("`{name}` is not the name of a setting: use such as train.steps");
                    return Err(ServiceError::invalid(param.trim_end_matches('.'), message));
                }
                let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
                flatten(&key, value, pairs)?;
            }
            Ok(())
        }
        _ if is_reserved(prefix) => {
            Err(ServiceError::invalid(&param, format!("`{prefix}` cannot be set by a job: it is the service's")))
        }
        Value::Null | Value::Array(_) => {
            Err(ServiceError::invalid(&param, format!("`{prefix}` must be text, a number, or true or false")))
        }
        value => {
            pairs.push(format!("{prefix}={value}"));
            Ok(())
        }
    }
}

/// Where the fault is the client's, in the client's words: its settings were never flags.
fn refusal(error: ConfigError) -> ServiceError {
    match error {
        ConfigError::UnknownKey { key, origin: Origin::Flag, nearest } => ServiceError::Invalid {
            message: format!("unknown key `{key}`: did you mean `{nearest}`?"),
            param: Some(format!("patrickstar.{key}")),
            code: "unknown_key",
        },
        ConfigError::Type { key, origin: Origin::Flag, found, expected } => {
            ServiceError::invalid(&format!("patrickstar.{key}"), format!("`{key}`: found {found}, expected {expected}"))
        }
        ConfigError::Invalid(problems) => ServiceError::invalid("patrickstar", problems.join("; ")),
        other => ServiceError::Config(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(body: Value) -> Result<NewJob, ServiceError> {
        let mut whole = json!({ "model": "gpt-tiny", "training_file": "file-0123456789abcdef01234567" });
        for (key, value) in body.as_object().unwrap() {
            whole[key] = value.clone();
        }
        serde_json::from_value::<JobRequest>(whole).unwrap().into_job(&Loaded::default(), &ModelRoots::default())
    }

    #[test]
    fn settings_become_one_configuration_that_survives_storing() {
        let body = json!({
            "seed": 9, "method": { "type": "supervised", "supervised": { "hyperparameters": {
                "batch_size": 2, "learning_rate_multiplier": 0.1, "n_epochs": "auto" } } },
            "patrickstar": { "priority": 3, "train": { "steps": 12, "lr": 0.007 }, "memory.device": "32MB",
                "actors": { "eviction": { "policy": "lru" } } },
            "someone_elses": true,
        });
        let job = job(body).unwrap();
        assert_eq!((job.priority, job.seed, job.epochs, job.device.as_str()), (3, 9, None, "cpu"));
        let config: Config = serde_json::from_str(&job.config.to_string()).unwrap();
        assert_eq!((config.train.steps, config.train.batch, config.train.seed), (12, 2, 9));
        assert_eq!(config.train.lr.to_bits(), (0.007f64 * 0.1).to_bits());
        assert_eq!(config.memory.device.0, 32_000_000);
        assert_eq!(config.actors.eviction.policy, crate::config::Policy::Lru);
        assert_eq!((config.checkpoint.every, config.train.log_every), (50, 1));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, expected) in [
            (json!({ "model": "gpt-9" }), "no such model: gpt-9: use one of gpt-tiny"),
            (
                json!({ "patrickstar": { "train": { "step": 1 } } }),
                "unknown key `train.step`: did you mean `train.steps`",
            ),
            (json!({ "patrickstar": { "evictoin": "opt" } }), "did you mean"),
            (json!({ "patrickstar": { "train": { "steps": "many" } } }), "expected an integer"),
            (json!({ "patrickstar": { "train": { "output": "/etc" } } }), "cannot be set by a job"),
            (json!({ "patrickstar": { "data.path": "/etc/passwd" } }), "cannot be set by a job"),
            (json!({ "patrickstar": { "a=b": 1 } }), "not the name of a setting"),
            (json!({ "patrickstar": { "train.steps": null } }), "must be text"),
            (json!({ "patrickstar": { "train.batch": 0 } }), "`train.batch` is 0"),
            (json!({ "patrickstar": { "model.layers": 1u64 << 40 } }), "`model.layers` is 1099511627776: at most"),
            (
                json!({ "patrickstar": { "model": { "hidden": 65536, "layers": 4096 }, "memory.chunk": "auto" } }),
                "parameters: at most",
            ),
            (json!({ "model": "gpt-20b", "patrickstar": { "memory.chunk": "4KiB" } }), "chunks: at most"),
            (json!({ "patrickstar": { "train.steps": 5 }, "hyperparameters": { "n_epochs": 2 } }), "give one of them"),
            (json!({ "hyperparameters": { "n_epochs": 0 } }), "`n_epochs` is 0"),
            (json!({ "method": { "type": "dpo" } }), "only `supervised`"),
            (json!({ "suffix": "a/b" }), "`suffix`"),
            (json!({ "validation_file": "../../etc/passwd" }), "no such file"),
            (json!({ "patrickstar": { "data.validation_path": "/etc/passwd" } }), "cannot be set by a job"),
            (json!({ "metadata": { "a": 1 } }), "pairs of text"),
            (json!({ "training_file": "../../etc/passwd" }), "no such file"),
        ] {
            let error = job(body.clone()).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{body}: {error}");
        }
    }
}
