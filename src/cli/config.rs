//! `patrickstar config`: what a run would use, and from where.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::args::{ConfigAction, ConfigArgs, ConfigSource};
use super::{CliError, output};
use crate::config::{Config, Loaded, Sources};

pub(super) fn run(args: ConfigArgs) -> Result<ExitCode, CliError> {
    match args.action {
        ConfigAction::Show { source, origin, json } => show(&sources(source).merge()?, origin, json)?,
        ConfigAction::Schema => output::line(&format!("{:#}", Config::schema().as_value()))?,
        ConfigAction::Validate { source } => {
            sources(source).load()?;
            output::line("the configuration is valid")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn sources(source: ConfigSource) -> Sources {
    Sources::process(source.config, source.set)
}

fn show(loaded: &Loaded, origin: bool, as_json: bool) -> std::io::Result<()> {
    let values = serde_json::to_value(&loaded.config).map_err(std::io::Error::from)?;
    if as_json {
        return if origin {
            output::json(&json!({ "config": values, "origins": loaded.origins }))
        } else {
            output::json(&values)
        };
    }
    for info in Config::keys() {
        let value = values.pointer(&format!("/{}", info.key.replace('.', "/"))).unwrap_or(&Value::Null);
        // An absent key has no TOML form.
        let text =
            if value.is_null() { format!("# {} is not set", info.key) } else { format!("{} = {value}", info.key) };
        let origin = if origin { format!("  # {}", loaded.origins.of(&info.key)) } else { String::new() };
        output::line(&format!("{text}{origin}"))?;
    }
    Ok(())
}
