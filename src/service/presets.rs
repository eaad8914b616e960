//! Models that jobs may name, and the settings that each stands for.

use crate::config::SHAPES;

/// A model that a job can train from scratch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preset {
    /// What clients call it.
    pub id: String,
    settings: Vec<(&'static str, String)>,
}

/// Small enough to train on a CPU in seconds.
const TINY: [(&str, &str); 11] = [
    ("model.preset", "gpt2"),
    ("model.hidden", "32"),
    ("model.layers", "2"),
    ("model.heads", "2"),
    ("model.context", "64"),
    ("train.seq_len", "64"),
    ("train.batch", "4"),
    ("train.micro_batches", "1"),
    ("train.lr", "3e-3"),
    ("memory.device", "64MB"),
    ("memory.chunk", "64KiB"),
];

/// Every preset: the tiny one, the first GPT-2, and the shapes of the configuration.
pub fn presets() -> Vec<Preset> {
    let owned = |pairs: &[(&'static str, &str)]| pairs.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
    let mut presets = vec![
        Preset { id: "gpt-tiny".into(), settings: owned(&TINY) },
        Preset { id: "gpt2".into(), settings: owned(&[("model.preset", "gpt2")]) },
    ];
    for shape in SHAPES.into_iter().filter(|shape| *shape != "tiny") {
        presets.push(Preset { id: format!("gpt-{shape}"), settings: vec![("model.preset", shape.to_owned())] });
    }
    presets
}

/// The preset of this name.
pub fn preset(id: &str) -> Option<Preset> {
    presets().into_iter().find(|preset| preset.id == id)
}

/// The preset that stands for a shape of the configuration and nothing else; the first GPT-2 where none does.
pub fn preset_of_shape(shape: &str) -> String {
    let plain = |preset: &Preset| preset.settings == [("model.preset", shape.to_owned())];
    presets().into_iter().find(plain).map_or_else(|| "gpt2".to_owned(), |preset| preset.id)
}

impl Preset {
    /// As `--set` would take them.
    pub fn pairs(&self) -> Vec<String> {
        self.settings.iter().map(|(key, value)| format!("{key}={value}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sources;

    #[test]
    fn every_preset_is_a_valid_configuration() {
        for preset in presets() {
            let sources = Sources { set: preset.pairs(), ..Sources::default() };
            assert!(sources.load().is_ok(), "{}", preset.id);
        }
    }
}
