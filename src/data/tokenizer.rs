//! Text to tokens: bytes, or a Hugging Face `tokenizer.json`.

use super::DataError;

/// A vocabulary.
pub enum Tokenizer {
    /// One token a byte: nothing to download.
    Bytes,
    /// A `tokenizer.json`.
    HuggingFace(Box<tokenizers::Tokenizer>),
}

impl Tokenizer {
    /// `bytes`, or the path of a `tokenizer.json`.
    pub fn load(name: &str) -> Result<Self, DataError> {
        if name == "bytes" {
            return Ok(Tokenizer::Bytes);
        }
        tokenizers::Tokenizer::from_file(name).map(|tokenizer| Tokenizer::HuggingFace(Box::new(tokenizer))).map_err(
            |error| DataError::Tokenizer {
                path: name.to_owned(),
                reason: format!("{error}: name a tokenizer.json, or `bytes`").replace('\n', " "),
            },
        )
    }

    /// Tokens it knows.
    pub fn vocab_size(&self) -> usize {
        match self {
            Tokenizer::Bytes => 256,
            Tokenizer::HuggingFace(tokenizer) => tokenizer.get_vocab_size(true),
        }
    }

    /// Text to tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        match self {
            Tokenizer::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Tokenizer::HuggingFace(tokenizer) => tokenizer
                .encode(text, false)
                .map(|encoding| encoding.get_ids().to_vec())
                .map_err(|error| DataError::Tokenizer { path: "encode".into(), reason: error.to_string() }),
        }
    }

    /// Tokens to text; incomplete characters become replacement characters.
    pub fn decode(&self, tokens: &[u32]) -> String {
        match self {
            Tokenizer::Bytes => {
                let bytes: Vec<u8> = tokens.iter().map(|&token| token as u8).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            Tokenizer::HuggingFace(tokenizer) => tokenizer.decode(tokens, false).unwrap_or_default(),
        }
    }
}
