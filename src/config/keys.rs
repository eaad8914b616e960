//! The list of keys, read off the JSON schema so that it cannot drift from the structs.

use schemars::Schema;
use schemars::generate::SchemaSettings;
use serde::Serialize;
use serde_json::Value;

use super::Config;

/// What is known about one key.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KeyInfo {
    /// Dotted key.
    pub key: String,
    /// Its doc comment.
    pub doc: String,
    /// Type in words, such as `integer` or `one of opt, lru, static`.
    pub kind: String,
    /// Default, null where the key is absent by default.
    pub default: Value,
    /// Whether the key holds text only, so that `10` is the text "10".
    #[serde(skip)]
    pub(super) text: bool,
}

impl Config {
    /// JSON schema of the configuration file.
    pub fn schema() -> Schema {
        let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
        settings.into_generator().into_root_schema_for::<Config>()
    }

    /// Every key, in the order of the schema.
    pub fn keys() -> Vec<KeyInfo> {
        let defaults = serde_json::to_value(Config::default()).unwrap_or_default();
        let mut keys = Vec::new();
        walk(Config::schema().as_value(), "", &defaults, &mut keys);
        keys
    }
}

fn walk(schema: &Value, prefix: &str, default: &Value, keys: &mut Vec<KeyInfo>) {
    if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
        for (name, property) in properties {
            let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            walk(property, &key, default.get(name).unwrap_or(&Value::Null), keys);
        }
        return;
    }
    let types = types(schema);
    keys.push(KeyInfo {
        key: prefix.to_owned(),
        doc: schema.get("description").and_then(Value::as_str).unwrap_or_default().to_owned(),
        kind: kind(schema, &types),
        default: default.clone(),
        text: types.iter().all(|word| word == "string"),
    });
}

fn types(schema: &Value) -> Vec<String> {
    let words: Vec<String> = match schema.get("type") {
        Some(Value::String(word)) => vec![word.clone()],
        Some(Value::Array(words)) => words.iter().filter_map(|word| word.as_str().map(str::to_owned)).collect(),
        _ => vec!["string".to_owned()],
    };
    words.into_iter().filter(|word| word != "null").collect()
}

fn kind(schema: &Value, types: &[String]) -> String {
    let listed = schema.get("enum").and_then(Value::as_array).cloned();
    let variants = schema.get("oneOf").and_then(Value::as_array);
    let consts = variants.map(|all| all.iter().filter_map(|one| one.get("const").cloned()).collect::<Vec<_>>());
    if let Some(words) = listed.or(consts) {
        let words: Vec<&str> = words.iter().filter_map(Value::as_str).collect();
        return format!("one of {}", words.join(", "));
    }
    if types.len() > 1 {
        return "a size (bytes, or text such as 24GB)".to_owned();
    }
    let at_least_zero = schema.get("minimum").is_some();
    match types.first().map(String::as_str) {
        Some("integer") if at_least_zero => "an integer, 0 or more".to_owned(),
        Some("integer") => "an integer".to_owned(),
        Some("number") => "a number".to_owned(),
        Some("boolean") => "true or false".to_owned(),
        _ => "text".to_owned(),
    }
}
