//! Text to batches of tokens: memory-mapped files, a tokenizer, shuffled windows with a resumable position.

mod batches;
mod corpus;
mod document;
mod lines;
mod pass;
mod source;
mod tokenizer;

use std::path::PathBuf;

use thiserror::Error;

pub use batches::{Batches, DataPosition, NOT_LEARNT, TokenBatch};
pub use corpus::Corpus;
pub use document::{END_OF_MESSAGE, chat_prompt};
pub use lines::JsonLines;
pub use pass::Pass;
pub use tokenizer::Tokenizer;

/// Why text cannot be trained on; every message says what to do.
#[derive(Debug, Error)]
pub enum DataError {
    /// The path cannot be read.
    #[error("{path}: {source}: check data.path and its permissions")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A single file is not text.
    #[error("{path} is not UTF-8 at byte {offset}: convert it, or name a directory to skip such files")]
    NotUtf8 {
        /// Which.
        path: PathBuf,
        /// First offending byte.
        offset: usize,
    },
    /// There is no text.
    #[error("{0} holds no text: name a text file, a directory of them, or JSONL with a `text` field")]
    Empty(PathBuf),
    /// A line of JSONL is wrong.
    #[error("{path} line {line}: {reason}")]
    Line {
        /// Which file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Less text than one batch needs.
    #[error("the data has {have} tokens, one batch needs {need}: add text, or lower train.batch or train.seq_len")]
    TooShort {
        /// Tokens needed.
        need: u64,
        /// Tokens there.
        have: u64,
    },
    /// What is wrong is wrong with the text that is not trained on.
    #[error("validation data: {0}")]
    Validation(Box<DataError>),
    /// The tokenizer is unusable.
    #[error("tokenizer `{path}`: {reason}")]
    Tokenizer {
        /// Which.
        path: String,
        /// Why.
        reason: String,
    },
    /// A position belongs to other data.
    #[error("the checkpoint was made with another {what} ({theirs}, now {ours}): resume with the same data settings")]
    Position {
        /// What differs.
        what: &'static str,
        /// In the checkpoint.
        theirs: String,
        /// Now.
        ours: String,
    },
}
