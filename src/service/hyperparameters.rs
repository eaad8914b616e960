//! OpenAI's three knobs of supervised training: a number each, or "auto".

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::error::ServiceError;

/// The knobs as they are written in JSON.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Hyperparameters)]
pub struct HyperparametersShape {
    /// Sequences a step.
    batch_size: Knob<u32>,
    /// Scales the learning rate that would be used otherwise.
    learning_rate_multiplier: Knob<f64>,
    /// Passes over the file.
    n_epochs: Knob<u32>,
}

/// A number, or "auto".
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Knob<T> {
    /// Exactly this.
    Number(T),
    /// As the service thinks best.
    Word(Auto),
}

/// The only word.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Auto {
    /// As the service thinks best.
    Auto,
}

impl<T> From<Option<T>> for Knob<T> {
    fn from(number: Option<T>) -> Self {
        number.map_or(Knob::Word(Auto::Auto), Knob::Number)
    }
}

/// OpenAI's three knobs; `None` is "auto".
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Hyperparameters {
    pub batch_size: Option<u32>,
    pub learning_rate_multiplier: Option<f64>,
    pub n_epochs: Option<u32>,
}

impl Hyperparameters {
    pub fn read(method: Option<&Value>, old: Option<&Value>) -> Result<Self, ServiceError> {
        let mut given = old.filter(|value| !value.is_null());
        if let Some(method) = method.filter(|value| !value.is_null()) {
            let kind = method.get("type").and_then(Value::as_str).unwrap_or_default();
            if kind != "supervised" {
                let message = format!("`method.type` is `{kind}`: only `supervised` is supported");
                return Err(ServiceError::invalid("method", message));
            }
            given = method.pointer("/supervised/hyperparameters").filter(|value| !value.is_null()).or(given);
        }
        let whole = |name: &str, most: u64| {
            number(given, name, &format!("a whole number from 1 to {most}, or \"auto\""), |value| {
                value.as_u64().filter(|value| (1..=most).contains(value)).map(|value| value as u32)
            })
        };
        let positive = |value: &Value| value.as_f64().filter(|value| *value > 0.0 && value.is_finite());
        Ok(Hyperparameters {
            batch_size: whole("batch_size", 4096)?,
            learning_rate_multiplier: number(given, "learning_rate_multiplier", "above 0, or \"auto\"", positive)?,
            n_epochs: whole("n_epochs", 10_000)?,
        })
    }

    /// As jobs show them.
    pub fn shown(self) -> HyperparametersShape {
        HyperparametersShape {
            batch_size: self.batch_size.into(),
            learning_rate_multiplier: self.learning_rate_multiplier.into(),
            n_epochs: self.n_epochs.into(),
        }
    }
}

fn number<T>(
    given: Option<&Value>,
    name: &str,
    expected: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>, ServiceError> {
    match given.and_then(|given| given.get(name)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text == "auto" => Ok(None),
        Some(value) => match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(ServiceError::invalid(name, format!("`{name}` is {value}: it must be {expected}"))),
        },
    }
}
