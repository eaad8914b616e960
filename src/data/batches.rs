//! Windows of the corpus in an order that a seed decides, with a position to resume from.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Corpus, DataError};
use crate::model::rng::philox;

/// Stands for a target that is context only, such as a user's message.
pub const NOT_LEARNT: u32 = u32::MAX;

/// Tokens of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBatch {
    /// `sequences * seq_len` tokens.
    pub input: Vec<u32>,
    /// The token that follows each, or [`NOT_LEARNT`].
    pub target: Vec<u32>,
    /// Sequences.
    pub sequences: usize,
    /// Tokens in each.
    pub seq_len: usize,
}

impl TokenBatch {
    /// Adds the sequence that begins at `start`; the corpus has a token after it.
    pub(super) fn push(&mut self, corpus: &Corpus, start: u64) {
        let mut window = vec![0; self.seq_len + 1];
        corpus.copy_tokens(start, &mut window);
        self.input.extend_from_slice(&window[..self.seq_len]);
        corpus.mask_context(start + 1, &mut window[1..]);
        self.target.extend_from_slice(&window[1..]);
    }
}

/// Where a run is in its data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataPosition {
    /// Passes over the corpus.
    pub epoch: u64,
    /// Windows taken in this pass.
    pub index: u64,
    /// Which corpus.
    pub fingerprint: u64,
    /// Order of the windows.
    pub seed: u64,
    /// Size of the windows.
    pub seq_len: usize,
}

/// An endless series of batches.
pub struct Batches {
    corpus: Arc<Corpus>,
    seq_len: usize,
    sequences: usize,
    seed: u64,
    shuffle: bool,
    windows: u64,
    epoch: u64,
    index: u64,
}

impl Batches {
    /// Cuts `corpus` into windows of `seq_len` tokens, and one more for the last target.
    pub fn new(
        corpus: Arc<Corpus>,
        seq_len: usize,
        sequences: usize,
        seed: u64,
        shuffle: bool,
    ) -> Result<Self, DataError> {
        let windows = corpus.len().saturating_sub(1) / seq_len.max(1) as u64;
        if windows < sequences as u64 {
            let need = (sequences * seq_len) as u64 + 1;
            return Err(DataError::TooShort { need, have: corpus.len() });
        }
        Ok(Batches { corpus, seq_len, sequences, seed, shuffle, windows, epoch: 0, index: 0 })
    }

    /// The next batch; passes follow each other without a gap.
    pub fn next_batch(&mut self) -> TokenBatch {
        let tokens = self.sequences * self.seq_len;
        let mut batch = TokenBatch {
            input: Vec::with_capacity(tokens),
            target: Vec::with_capacity(tokens),
            sequences: self.sequences,
            seq_len: self.seq_len,
        };
        for _ in 0..self.sequences {
            if self.index == self.windows {
                self.index = 0;
                self.epoch += 1;
            }
            let chosen = if self.shuffle { self.permute(self.index) } else { self.index };
            self.index += 1;
            batch.push(&self.corpus, chosen * self.seq_len as u64);
        }
        batch
    }

    /// A permutation of the windows without a table: a Feistel network over the next even power of two, walked until it
    /// lands inside (Black and Rogaway, 2002).
    fn permute(&self, index: u64) -> u64 {
        let bits = (64 - self.windows.leading_zeros()).div_ceil(2).max(1);
        let mask = (1u64 << bits) - 1;
        let mut value = index;
        loop {
            let (mut left, mut right) = (value >> bits, value & mask);
            for round in 0..4u32 {
                let counter = [right as u32, (right >> 32) as u32, round, self.epoch as u32];
                let mixed = u64::from(philox(counter, [self.seed as u32, (self.seed >> 32) as u32])[0]);
                (left, right) = (right, (left ^ mixed) & mask);
            }
            value = left << bits | right;
            if value < self.windows {
                return value;
            }
        }
    }

    /// Where it is.
    pub fn position(&self) -> DataPosition {
        DataPosition {
            epoch: self.epoch,
            index: self.index,
            fingerprint: self.corpus.fingerprint(),
            seed: self.seed,
            seq_len: self.seq_len,
        }
    }

    /// Goes on from a position of the same corpus, seed and window size.
    pub fn seek(&mut self, position: &DataPosition) -> Result<(), DataError> {
        let ours = self.position();
        let differs = |what, theirs: u64, ours: u64| {
            Err(DataError::Position { what, theirs: theirs.to_string(), ours: ours.to_string() })
        };
        if position.fingerprint != ours.fingerprint {
            return differs("corpus", position.fingerprint, ours.fingerprint);
        }
        if position.seed != ours.seed {
            return differs("train.seed", position.seed, ours.seed);
        }
        if position.seq_len != ours.seq_len {
            return differs("train.seq_len", position.seq_len as u64, ours.seq_len as u64);
        }
        (self.epoch, self.index) = (position.epoch, position.index);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::super::Tokenizer;
    use super::*;

    fn corpus(directory: &Path, bytes: usize) -> Arc<Corpus> {
        let path = directory.join("text.txt");
        let text: String = (0..bytes).map(|i| char::from(b'a' + (i * 7 % 26) as u8)).collect();
        std::fs::write(&path, text).unwrap();
        Arc::new(Corpus::open(&path, &Tokenizer::Bytes).unwrap())
    }

    proptest! {
        #[test]
        fn an_epoch_takes_every_window_once(windows in 1u64..300, seed: u64, epoch in 0u64..5) {
            let directory = tempfile::tempdir().unwrap();
            let mut batches = Batches::new(corpus(directory.path(), windows as usize * 4 + 1), 4, 1, seed, true).unwrap();
            batches.epoch = epoch;
            let mut seen: Vec<u64> = (0..windows).map(|index| batches.permute(index)).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..windows).collect::<Vec<_>>());
        }
    }

    #[test]
    fn batches_after_a_seek_are_those_of_an_uninterrupted_run() {
        let directory = tempfile::tempdir().unwrap();
        let corpus = corpus(directory.path(), 333);
        let mut whole = Batches::new(Arc::clone(&corpus), 8, 3, 5, true).unwrap();
        for _ in 0..40 {
            let position = whole.position();
            let mut resumed = Batches::new(Arc::clone(&corpus), 8, 3, 5, true).unwrap();
            resumed.seek(&position).unwrap();
            let expected = whole.next_batch();
            assert_eq!(resumed.next_batch(), expected);
            assert_eq!(expected.input[1..8], expected.target[..7]);
        }
        let mut other = Batches::new(corpus, 8, 3, 6, true).unwrap();
        assert!(other.seek(&whole.position()).unwrap_err().to_string().contains("train.seed"));
    }

    #[test]
    fn bad_data_is_one_line_that_says_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let cases: [(&str, &[u8], &str); 6] = [
            ("a.txt", b"", "holds no text"),
            ("b.txt", b"abc\xff", "not UTF-8 at byte 3"),
            ("c.jsonl", b"{\"text\": \"a\"}\n{]", "line 2: not JSON"),
            ("d.jsonl", b"{\"txt\": 1}", "line 1: none of `messages`"),
            ("e.jsonl", b"\n\n", "holds no text"),
            ("missing/x", b"", "check data.path"),
        ];
        for (name, content, expected) in cases {
            let path = directory.path().join(name);
            if path.parent().is_some_and(Path::is_dir) {
                std::fs::write(&path, content).unwrap();
            }
            let error = Corpus::open(&path, &Tokenizer::Bytes).err().unwrap().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{name}: {error}");
        }
        let short = Batches::new(corpus(directory.path(), 20), 8, 3, 0, true).err().unwrap();
        assert!(short.to_string().contains("one batch needs 25"));
    }

    #[test]
    fn a_directory_is_its_text_files_in_order_and_jsonl_its_texts() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("sub")).unwrap();
        std::fs::write(directory.path().join("sub/b.txt"), "second").unwrap();
        std::fs::write(directory.path().join("a.txt"), "first").unwrap();
        std::fs::write(directory.path().join("c.bin"), b"\0\0").unwrap();
        let corpus = Corpus::open(directory.path(), &Tokenizer::Bytes).unwrap();
        let mut tokens = vec![0; corpus.len() as usize];
        corpus.copy_tokens(0, &mut tokens);
        assert_eq!(Tokenizer::Bytes.decode(&tokens), "firstsecond");
        let lines = directory.path().join("x.jsonl");
        std::fs::write(&lines, "{\"text\": \"one\"}\n{\"text\": \"two\", \"id\": 2}\n").unwrap();
        assert_eq!(Corpus::open(&lines, &Tokenizer::Bytes).unwrap().len(), 6);
    }

    #[test]
    fn a_tokenizer_json_is_used() {
        let directory = tempfile::tempdir().unwrap();
        let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{"type":"Whitespace"},"post_processor":null,"decoder":null,
            "model":{"type":"WordLevel","vocab":{"hello":0,"world":1,"[UNK]":2},"unk_token":"[UNK]"}}"#;
        let path = directory.path().join("tokenizer.json");
        std::fs::write(&path, json).unwrap();
        let tokenizer = Tokenizer::load(path.to_str().unwrap()).unwrap();
        assert_eq!(tokenizer.vocab_size(), 3);
        assert_eq!(tokenizer.encode("world hello there").unwrap(), [1, 0, 2]);
        assert!(Tokenizer::load("/nowhere.json").err().unwrap().to_string().contains("name a tokenizer.json"));
    }
}
