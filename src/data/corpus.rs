//! All documents as one stream of tokens.

use std::ops::Range;
use std::path::Path;

use super::batches::NOT_LEARNT;
use super::source::{self, Text};
use super::{DataError, Tokenizer};

enum Tokens {
    /// The files themselves are the tokens: nothing is copied. Each with its first position.
    Mapped(Vec<(u64, Text)>),
    Encoded(Vec<u32>),
}

/// A stream of tokens.
pub struct Corpus {
    tokens: Tokens,
    len: u64,
    fingerprint: u64,
    /// Tokens that are read but not learnt, ascending and apart.
    context: Vec<Range<u64>>,
}

impl Corpus {
    /// Opens `path` and, unless tokens are bytes, encodes it.
    pub fn open(path: &Path, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let texts = source::open(path)?;
        // What is learnt tells corpora apart too, but plain text keeps the fingerprint it always had.
        let fingerprint = texts.iter().fold(0xCBF2_9CE4_8422_2325, |hash, text| {
            let hash = digest(hash, text.bytes());
            if text.counts() { hash } else { digest(hash, b"context") }
        });
        let mut context = Vec::new();
        let (tokens, len) = match tokenizer {
            Tokenizer::Bytes => {
                let mut start = 0;
                let mut mapped = Vec::with_capacity(texts.len());
                for text in texts {
                    let length = text.bytes().len() as u64;
                    note_context(&mut context, &text, start..start + length);
                    mapped.push((start, text));
                    start += length;
                }
                (Tokens::Mapped(mapped), start)
            }
            Tokenizer::HuggingFace(_) => {
                let mut all = Vec::new();
                for text in &texts {
                    let start = all.len() as u64;
                    all.extend(tokenizer.encode(text.as_str())?);
                    note_context(&mut context, text, start..all.len() as u64);
                }
                let len = all.len() as u64;
                (Tokens::Encoded(all), len)
            }
        };
        if len == 0 {
            return Err(DataError::Empty(path.to_owned()));
        }
        Ok(Corpus { tokens, len, fingerprint, context })
    }

    /// Tokens in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: an empty corpus is not opened.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tells corpora apart, whatever their paths.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Marks what is not learnt in `targets`, the tokens from `start` on.
    pub(super) fn mask_context(&self, start: u64, targets: &mut [u32]) {
        let end = start + targets.len() as u64;
        let first = self.context.partition_point(|range| range.end <= start);
        for range in self.context[first..].iter().take_while(|range| range.start < end) {
            let (from, to) = (range.start.max(start) - start, range.end.min(end) - start);
            targets[from as usize..to as usize].fill(NOT_LEARNT);
        }
    }

    /// Copies the tokens from `start` on, which must exist.
    pub fn copy_tokens(&self, start: u64, out: &mut [u32]) {
        match &self.tokens {
            Tokens::Encoded(all) => out.copy_from_slice(&all[start as usize..start as usize + out.len()]),
            Tokens::Mapped(texts) => {
                let mut index = texts.partition_point(|(first, _)| *first <= start).saturating_sub(1);
                let mut filled = 0;
                while filled < out.len() && index < texts.len() {
                    let (first, text) = &texts[index];
                    let from = (start + filled as u64 - first) as usize;
                    let part = &text.bytes()[from..];
                    let count = part.len().min(out.len() - filled);
                    out[filled..filled + count].iter_mut().zip(part).for_each(|(out, &byte)| *out = u32::from(byte));
                    filled += count;
                    index += 1;
                }
            }
        }
    }
}

fn note_context(context: &mut Vec<Range<u64>>, text: &Text, range: Range<u64>) {
    if !text.counts() && !range.is_empty() {
        context.push(range);
    }
}

/// FNV-1a over words of eight bytes: fast enough for gigabytes, and not a defence against anybody.
fn digest(hash: u64, bytes: &[u8]) -> u64 {
    let mix = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x0100_0000_01B3).rotate_left(23);
    let mut words = bytes.chunks_exact(8);
    let body = words.by_ref().fold(mix(hash, bytes.len() as u64), |hash, word| {
        mix(hash, word.iter().fold(0, |word, &byte| word << 8 | u64::from(byte)))
    });
    words.remainder().iter().fold(body, |hash, &byte| mix(hash, u64::from(byte)))
}
