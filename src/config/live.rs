//! Changing a configuration that is in use: from JSON, checked as a whole, with what became of every key.

use serde_json::Value;

use super::load::Layers;
use super::{Config, ConfigError, Loaded, Origin, Origins};

/// Keys that running jobs and the service take over while they run; the bits of a training do not depend on them.
pub const LIVE_KEYS: [&str; 8] = [
    "actors.eviction.policy",
    "actors.eviction.prefetch",
    "actors.monitor.headroom",
    "actors.optimizer.placement",
    "memory.device",
    "memory.host",
    "service.log_level",
    "service.requests_per_second",
];

/// What a change came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Keys that changed and apply at once.
    pub applied: Vec<String>,
    /// Keys that changed and hold for jobs to come.
    pub needs_restart: Vec<String>,
    /// How many keys are as they were.
    pub unchanged: usize,
}

impl Loaded {
    /// This one with the values of a nested JSON object, which `null` takes back to their defaults. If it is `whole`, keys
    /// that are not in it have their defaults too. A value that stays keeps its origin.
    pub fn changed(&self, values: &Value, whole: bool) -> Result<Loaded, ConfigError> {
        let base = if whole { Loaded::default() } else { self.clone() };
        let mut layers = Layers::over(&base)?;
        let mut pairs = Vec::new();
        flatten("", values, &layers, &mut pairs)?;
        for (key, value) in pairs {
            match value {
                Value::Null => layers.reset(&key, Origin::Live)?,
                value => {
                    let found =
                        toml::Value::try_from(value).map_err(|error| ConfigError::Internal(error.to_string()))?;
                    layers.put(&key, found, Origin::Live)?;
                }
            }
        }
        let mut new = layers.finish()?;
        new.config.validate()?;
        let (old_values, new_values) = (json(&self.config)?, json(&new.config)?);
        for info in Config::keys() {
            if at(&old_values, &info.key) == at(&new_values, &info.key) {
                new.origins.copy(&info.key, &self.origins);
            }
        }
        Ok(new)
    }

    /// What differs from `old`.
    pub fn changes_since(&self, old: &Loaded) -> Result<Changes, ConfigError> {
        let (old, new) = (json(&old.config)?, json(&self.config)?);
        let mut changes = Changes::default();
        for info in Config::keys() {
            if at(&old, &info.key) == at(&new, &info.key) {
                changes.unchanged += 1;
            } else if LIVE_KEYS.contains(&info.key.as_str()) {
                changes.applied.push(info.key);
            } else {
                changes.needs_restart.push(info.key);
            }
        }
        Ok(changes)
    }
}

impl Origins {
    fn copy(&mut self, key: &str, from: &Origins) {
        match from.0.get(key) {
            Some(origin) => self.0.insert(key.to_owned(), origin.clone()),
            None => self.0.remove(key),
        };
    }
}

fn json(config: &Config) -> Result<Value, ConfigError> {
    serde_json::to_value(config).map_err(|error| ConfigError::Internal(error.to_string()))
}

fn at<'a>(values: &'a Value, key: &str) -> Option<&'a Value> {
    values.pointer(&format!("/{}", key.replace('.', "/"))).filter(|value| !value.is_null())
}

/// Dotted keys and their values; tables may be nested or dotted.
fn flatten(prefix: &str, value: &Value, layers: &Layers, pairs: &mut Vec<(String, Value)>) -> Result<(), ConfigError> {
    match value {
        Value::Object(object) if !layers.is_key(prefix) => object.iter().try_for_each(|(name, value)| {
            let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            flatten(&key, value, layers, pairs)
        }),
        _ if prefix.is_empty() => Err(ConfigError::Invalid(vec!["the configuration must be a JSON object".to_owned()])),
        value => {
            pairs.push((prefix.to_owned(), value.clone()));
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::{Policy, Sources};

    fn base() -> Loaded {
        Sources { set: vec!["train.steps=7".into(), "model.vocab=300".into()], ..Sources::default() }.load().unwrap()
    }

    #[test]
    fn single_keys_change_and_the_others_keep_value_and_origin() {
        let old = base();
        let new = old.changed(&json!({ "actors.eviction.policy": "lru", "train": { "lr": 0.01 } }), false).unwrap();
        assert_eq!(new.config.actors.eviction.policy, Policy::Lru);
        assert_eq!((new.config.train.steps, new.origins.of("train.steps")), (7, Origin::Flag));
        assert_eq!(new.origins.of("train.lr"), Origin::Live);
        let changes = new.changes_since(&old).unwrap();
        assert_eq!(changes.applied, ["actors.eviction.policy"]);
        assert_eq!(changes.needs_restart, ["train.lr"]);
        assert_eq!(changes.unchanged + 2, Config::keys().len());
    }

    #[test]
    fn a_whole_configuration_replaces_the_old_one() {
        let old = base();
        let same = old.changed(&serde_json::to_value(&old.config).unwrap(), true).unwrap();
        assert_eq!(same, old);
        let none = old.changed(&json!({}), true).unwrap();
        assert_eq!(none.config, Config::default());
        assert_eq!(none.origins.of("train.steps"), Origin::Default);
        let without = old.changed(&json!({ "model": { "vocab": null } }), false).unwrap();
        assert_eq!((without.config.model.vocab, without.config.train.steps), (None, 7));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let message = |values: Value| base().changed(&values, false).unwrap_err().to_string();
        assert!(message(json!({ "actors": { "evicton": { "policy": "lru" } } })).contains("actors.eviction.policy"));
        assert!(message(json!({ "train.lr": "fast" })).contains("train.lr"));
        assert!(message(json!({ "train": 3 })).contains("expected a table"));
        assert!(message(json!([1])).contains("JSON object"));
        assert!(message(json!({ "train.batch": 0 })).contains("train.batch"));
        assert!(message(json!({ "service.log_level": "loud=very=much" })).contains("service.log_level"));
    }

    #[test]
    fn every_live_key_exists() {
        let keys = Config::keys();
        assert!(LIVE_KEYS.iter().all(|live| keys.iter().any(|info| info.key == *live)));
    }
}
