//! Layers of values to one configuration: defaults, then a file, then the environment, then flags.

use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::keys::KeyInfo;
use super::{Config, ConfigError, Origin, Origins};

const PREFIX: &str = "PATRICKSTAR_";

/// What a configuration is made from.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// What lies below all others instead of the defaults.
    pub base: Option<Loaded>,
    /// TOML file.
    pub file: Option<PathBuf>,
    /// Environment variables; only `PATRICKSTAR_TABLE__KEY` ones count.
    pub env: Vec<(String, String)>,
    /// `key=value` pairs of `--set`, the last of a key wins.
    pub set: Vec<String>,
}

/// A configuration that was read and validated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    /// Where they came from.
    pub origins: Origins,
}

impl Sources {
    /// A file (if any), this process's environment and flags.
    pub fn process(file: Option<PathBuf>, set: Vec<String>) -> Self {
        // Variables that are not UTF-8 cannot be ours.
        let env =
            std::env::vars_os().filter_map(|(var, value)| Some((var.into_string().ok()?, value.into_string().ok()?)));
        Sources { base: None, file, env: env.collect(), set }
    }

    /// Reads every layer and validates the result.
    pub fn load(&self) -> Result<Loaded, ConfigError> {
        let loaded = self.merge()?;
        loaded.config.validate()?;
        Ok(loaded)
    }

    /// Reads every layer without checks across keys.
    pub fn merge(&self) -> Result<Loaded, ConfigError> {
        let mut layers = Layers::over(self.base.as_ref().unwrap_or(&Loaded::default()))?;
        if let Some(path) = &self.file {
            layers.file(path)?;
        }
        let mut env: Vec<_> = self.env.iter().collect();
        env.sort();
        for (var, text) in env {
            // Without a double underscore it names no key of a table: PATRICKSTAR_LOG and the like belong to others.
            let Some(name) = var.strip_prefix(PREFIX).filter(|name| name.contains("__")) else { continue };
            let key = name.to_lowercase().replace("__", ".");
            layers.text(&key, text, Origin::Env { var: var.clone() })?;
        }
        for pair in &self.set {
            let (key, text) = pair.split_once('=').ok_or_else(|| ConfigError::Flag { text: pair.clone() })?;
            layers.text(key.trim(), text.trim(), Origin::Flag)?;
        }
        layers.finish()
    }
}

impl Config {
    fn deserialize_table(table: Table) -> Result<Config, String> {
        table.try_into().map_err(|error: toml::de::Error| error.message().to_owned())
    }
}

pub(super) struct Layers {
    keys: Vec<KeyInfo>,
    table: Table,
    origins: Origins,
}

impl Layers {
    pub fn over(base: &Loaded) -> Result<Self, ConfigError> {
        let table =
            Table::try_from(&base.config).map_err(|error| ConfigError::Internal(format!("the base: {error}")))?;
        Ok(Layers { keys: Config::keys(), table, origins: base.origins.clone() })
    }

    pub fn finish(self) -> Result<Loaded, ConfigError> {
        let config = Config::deserialize_table(self.table).map_err(ConfigError::Internal)?;
        Ok(Loaded { config, origins: self.origins })
    }

    pub fn is_key(&self, key: &str) -> bool {
        self.keys.iter().any(|info| info.key == key)
    }

    /// Takes a key back to its default.
    pub fn reset(&mut self, key: &str, origin: Origin) -> Result<(), ConfigError> {
        if !self.is_key(key) {
            return Err(self.unknown(key, Value::String("null".to_owned()), origin));
        }
        let mut table = Some(&mut self.table);
        let (path, leaf) = key.rsplit_once('.').unwrap_or(("", key));
        for part in path.split('.').filter(|part| !part.is_empty()) {
            table = table.and_then(|table| table.get_mut(part)?.as_table_mut());
        }
        table.and_then(|table| table.remove(leaf));
        self.origins.0.remove(key);
        Ok(())
    }

    fn file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let spanned = DeTable::parse(&text).map_err(|error| {
            let line = error.span().map_or(1, |span| line_of(&text, span.start));
            let message = error.message().replace('\n', ", ");
            ConfigError::Syntax { path: path.to_owned(), line, message }
        })?;
        let plain: Table = toml::from_str(&text).map_err(|error| ConfigError::Internal(error.message().to_owned()))?;
        self.tables(spanned.get_ref(), &plain, "", path, &text)
    }

    fn tables(
        &mut self,
        spans: &DeTable<'_>,
        plain: &Table,
        prefix: &str,
        path: &Path,
        text: &str,
    ) -> Result<(), ConfigError> {
        for (name, spanned) in spans {
            let key =
                if prefix.is_empty() { name.get_ref().to_string() } else { format!("{prefix}.{}", name.get_ref()) };
            let Some(value) = plain.get(name.get_ref().as_ref()) else { continue };
            let is_leaf = self.is_key(&key);
            match (spanned.get_ref(), value) {
                (DeValue::Table(spans), Value::Table(plain)) if !is_leaf && !plain.is_empty() => {
                    self.tables(spans, plain, &key, path, text)?;
                }
                (_, Value::Table(empty)) if empty.is_empty() && self.is_section(&key) => {}
                _ => {
                    let origin = Origin::File { path: path.to_owned(), line: line_of(text, name.span().start) };
                    self.put(&key, value.clone(), origin)?;
                }
            }
        }
        Ok(())
    }

    fn text(&mut self, key: &str, text: &str, origin: Origin) -> Result<(), ConfigError> {
        let only_text = self.keys.iter().any(|info| info.key == key && info.text);
        let value = match parse_value(text) {
            Some(Value::String(inner)) => Value::String(inner),
            Some(value) if !only_text => value,
            _ => Value::String(text.to_owned()),
        };
        self.put(key, value, origin)
    }

    pub fn put(&mut self, key: &str, value: Value, origin: Origin) -> Result<(), ConfigError> {
        let Some(info) = self.keys.iter().find(|info| info.key == key) else {
            return Err(self.unknown(key, value, origin));
        };
        // A configuration of this value alone: whatever fails is the fault of this key and of nothing else.
        let alone = nest(key, value.clone());
        if let Err(reason) = Config::deserialize_table(alone.clone()) {
            let found = format!("{} {value}", value.type_str());
            // A bad size explains itself better than its type does.
            let expected =
                if reason.contains("is not a size") { format!("{}: {reason}", info.kind) } else { info.kind.clone() };
            return Err(ConfigError::Type {
                key: key.to_owned(),
                origin,
                found: one_line(&found),
                expected: one_line(&expected),
            });
        }
        merge(&mut self.table, alone);
        self.origins.0.insert(key.to_owned(), origin);
        Ok(())
    }

    fn is_section(&self, key: &str) -> bool {
        self.keys.iter().any(|info| info.key.strip_prefix(key).is_some_and(|rest| rest.starts_with('.')))
    }

    fn unknown(&self, key: &str, value: Value, origin: Origin) -> ConfigError {
        if self.is_section(key) {
            let found = one_line(&format!("{} {value}", value.type_str()));
            return ConfigError::Type { key: key.to_owned(), origin, found, expected: "a table".to_owned() };
        }
        let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
        // The name of a leaf under a wrong table counts as near: `batch` for `train.batch`.
        let score = |known: &str| {
            let whole = strsim::normalized_damerau_levenshtein(key, known);
            let leaf = strsim::normalized_damerau_levenshtein(&last(key), &last(known));
            whole + leaf
        };
        let nearest = self.keys.iter().max_by(|a, b| score(&a.key).total_cmp(&score(&b.key)));
        let nearest = nearest.map(|info| info.key.clone()).unwrap_or_default();
        ConfigError::UnknownKey { key: one_line(key), origin, nearest }
    }
}

fn parse_value(text: &str) -> Option<Value> {
    let mut table: Table = toml::from_str(&format!("value = {text}")).ok()?;
    let value = table.remove("value")?;
    table.is_empty().then_some(value)
}

fn nest(key: &str, value: Value) -> Table {
    let mut parts = key.rsplit('.');
    let mut table = Table::new();
    if let Some(leaf) = parts.next() {
        table.insert(leaf.to_owned(), value);
    }
    for part in parts {
        table = Table::from_iter([(part.to_owned(), Value::Table(table))]);
    }
    table
}

fn merge(into: &mut Table, from: Table) {
    for (name, value) in from {
        match (into.get_mut(&name), value) {
            (Some(Value::Table(into)), Value::Table(from)) => merge(into, from),
            (_, value) => {
                into.insert(name, value);
            }
        }
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
