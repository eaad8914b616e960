//! What can be wrong with a configuration.

use std::path::PathBuf;

use super::origin::Origin;

/// A configuration that cannot be used; every message is one line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{}:{line}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// A `--set` without `=`.
    #[error("`--set {text}` has no value: write --set table.key=value")]
    Flag {
        /// What was given.
        text: String,
    },
    /// A key that does not exist.
    #[error("unknown key `{key}` ({origin}): did you mean `{nearest}`?")]
    UnknownKey {
        /// The key as given.
        key: String,
        /// Who set it.
        origin: Origin,
        /// The existing key closest to it.
        nearest: String,
    },
    /// A value that its key cannot hold.
    #[error("`{key}` ({origin}): found {found}, expected {expected}")]
    Type {
        /// Dotted key.
        key: String,
        /// Who set it.
        origin: Origin,
        /// The value and its type.
        found: String,
        /// What the key holds.
        expected: String,
    },
    /// Values that contradict each other or are out of range.
    #[error("{}", .0.join("; "))]
    Invalid(Vec<String>),
    /// The program's own tables disagree; cannot be caused by a user.
    #[error("internal error in the configuration: {0}")]
    Internal(String),
}
