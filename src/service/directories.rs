//! Models that lie in directories of this machine, under the roots that the service was given.
//!
//! A client names one by the name of its directory, never by a path. Whatever links there are, directory and files must
//! still lie under the root once all are followed, and only safetensors are read: other formats may hold code.

use std::path::{Path, PathBuf};

use super::error::ServiceError;
use crate::model::hf;

/// What a directory must hold.
const FILES: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];
/// Longest sequence that a job trains on where nobody says.
const DEFAULT_SEQ_LEN: usize = 1024;

/// Directories whose subdirectories are models.
#[derive(Clone, Debug, Default)]
pub struct ModelRoots(Vec<PathBuf>);

/// A model in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelDirectory {
    /// What clients call it.
    pub id: String,
    path: PathBuf,
    tokenizer: PathBuf,
    context: usize,
}

impl ModelRoots {
    /// Roots that exist.
    pub fn open(roots: &[PathBuf]) -> Result<Self, ServiceError> {
        let whole = |root: &PathBuf| root.canonicalize().map_err(|error| ServiceError::io(root, error));
        Ok(ModelRoots(roots.iter().map(whole).collect::<Result<_, _>>()?))
    }

    /// Names of the models that can be loaded, in order; the others are logged with the reason.
    pub fn list(&self) -> Vec<String> {
        let entries = self.0.iter().filter_map(|root| std::fs::read_dir(root).ok()).flatten().flatten();
        let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names.dedup();
        names.retain(|name| match self.find(name) {
            Ok(found) => found.is_some(),
            Err(error) => {
                tracing::debug!("{name} is not listed: {error}");
                false
            }
        });
        names
    }

    /// The model of this name; the error says why it cannot be loaded.
    pub fn find(&self, name: &str) -> Result<Option<ModelDirectory>, ServiceError> {
        if !is_name(name) {
            return Ok(None);
        }
        for root in &self.0 {
            let place = root.join(name);
            if place.is_dir() {
                return open(root, &place, name).map(Some);
            }
        }
        Ok(None)
    }
}

/// One directory: no separators, and not itself or the one above.
fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=128).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(plain)
}

fn open(root: &Path, place: &Path, name: &str) -> Result<ModelDirectory, ServiceError> {
    let invalid = |reason: String| ServiceError::Invalid {
        message: format!("model `{name}` cannot be loaded: {reason}"),
        param: Some("model".into()),
        code: "invalid_model",
    };
    let inside = |path: &Path| path.canonicalize().ok().filter(|whole| whole.starts_with(root));
    let path = inside(place).ok_or_else(|| invalid("it leads out of its root".into()))?;
    for file in FILES {
        let place = path.join(file);
        if !place.exists() {
            return Err(invalid(missing(&path, file)));
        }
        if !inside(&place).is_some_and(|file| file.is_file()) {
            return Err(invalid(format!("its {file} leads out of the root")));
        }
    }
    // Clients do not know the directories of the service.
    let config = hf::read_config(&path)
        .map_err(|error| invalid(error.to_string().replace(&path.display().to_string(), name)))?;
    let tokenizer = path.join("tokenizer.json");
    Ok(ModelDirectory { id: name.to_owned(), path, tokenizer, context: config.context })
}

fn missing(directory: &Path, file: &str) -> String {
    let pickled = |name: &str| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|end| name.ends_with(end));
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let has_pickles = entries.filter_map(|entry| entry.file_name().into_string().ok()).any(|name| pickled(&name));
    if file.ends_with(".safetensors") && has_pickles {
        return "its weights are pickled, which may run code: save them as one model.safetensors".into();
    }
    format!("it has no {file}: save the model and its fast tokenizer there, with the weights in one file")
}

impl ModelDirectory {
    /// As `--set` would take them.
    pub fn pairs(&self) -> Vec<String> {
        vec![
            format!("model.path={}", self.path.display()),
            format!("data.tokenizer={}", self.tokenizer.display()),
            format!("train.seq_len={}", self.context.min(DEFAULT_SEQ_LEN)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Writes a directory that looks like a model.
    fn model(directory: &Path) {
        std::fs::create_dir_all(directory).unwrap();
        let config =
            r#"{"model_type": "gpt2", "vocab_size": 8, "n_positions": 16, "n_embd": 4, "n_layer": 1, "n_head": 1}"#;
        std::fs::write(directory.join("config.json"), config).unwrap();
        for file in ["model.safetensors", "tokenizer.json"] {
            std::fs::write(directory.join(file), "").unwrap();
        }
    }

    fn refusal(roots: &ModelRoots, name: &str) -> String {
        roots.find(name).unwrap_err().to_string()
    }

    #[test]
    fn only_what_lies_under_a_root_is_found() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("models");
        let elsewhere = place.path().join("elsewhere");
        model(&root.join("good"));
        model(&elsewhere);
        symlink(&elsewhere, root.join("out")).unwrap();
        symlink(root.join("good"), root.join("in")).unwrap();
        for file in FILES {
            let linked = root.join(format!("link-{file}"));
            model(&linked);
            std::fs::remove_file(linked.join(file)).unwrap();
            symlink(elsewhere.join(file), linked.join(file)).unwrap();
        }
        let roots = ModelRoots::open(std::slice::from_ref(&root)).unwrap();
        assert_eq!(roots.list(), ["good", "in"]);
        assert_eq!(roots.find("good").unwrap().unwrap().path, root.canonicalize().unwrap().join("good"));
        for name in
            ["../elsewhere", "..", ".", "", "good/../good", "/etc", "good\0", "a/b", "nothing", &"x".repeat(300)]
        {
            assert_eq!(roots.find(name).unwrap(), None, "{name}");
        }
        assert!(refusal(&roots, "out").contains("leads out of its root"));
        for file in FILES {
            assert!(refusal(&roots, &format!("link-{file}")).contains(&format!("its {file} leads out")));
        }
        assert!(ModelRoots::open(&[place.path().join("absent")]).is_err());
    }

    #[test]
    fn what_cannot_be_loaded_says_why_without_telling_where_it_is() {
        let root = tempfile::tempdir().unwrap();
        for name in ["pickled", "untokenized", "other"] {
            model(&root.path().join(name));
        }
        std::fs::rename(root.path().join("pickled/model.safetensors"), root.path().join("pickled/model.bin")).unwrap();
        std::fs::remove_file(root.path().join("untokenized/tokenizer.json")).unwrap();
        std::fs::write(root.path().join("other/config.json"), r#"{"model_type": "bert"}"#).unwrap();
        let roots = ModelRoots::open(&[root.path().to_owned()]).unwrap();
        assert!(roots.list().is_empty());
        for (name, expected) in [("pickled", "may run code"), ("untokenized", "no tokenizer.json"), ("other", "gpt2")] {
            let error = refusal(&roots, name);
            assert!(error.contains(expected) && !error.contains(root.path().to_str().unwrap()), "{error}");
        }
    }
}
