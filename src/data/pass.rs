//! One pass over a corpus in its own order, every target once: what a validation loss is a mean over.

use super::{Corpus, DataError, TokenBatch};

/// Batches of a corpus, from its beginning to its end.
pub struct Pass<'a> {
    corpus: &'a Corpus,
    seq_len: usize,
    sequences: usize,
    micro_batches: usize,
    /// Input tokens taken.
    taken: u64,
}

impl<'a> Pass<'a> {
    /// Begins one of `sequences` of `seq_len` tokens in `micro_batches` at a time. What is left at the end comes in the
    /// sizes that it has: fewer sequences, then a shorter one.
    pub fn new(corpus: &'a Corpus, seq_len: usize, sequences: usize, micro_batches: usize) -> Result<Self, DataError> {
        if corpus.len() < 2 {
            return Err(DataError::TooShort { need: 2, have: corpus.len() });
        }
        Ok(Pass { corpus, seq_len, sequences, micro_batches, taken: 0 })
    }
}

impl Iterator for Pass<'_> {
    /// A batch, and how many equal micro-batches it is to be computed in.
    type Item = (TokenBatch, usize);

    fn next(&mut self) -> Option<Self::Item> {
        // The last token is a target only.
        let left = usize::try_from(self.corpus.len() - 1 - self.taken).unwrap_or(usize::MAX);
        if left == 0 {
            return None;
        }
        let (windows, micro_batch) = (left / self.seq_len, self.sequences / self.micro_batches);
        let (sequences, seq_len, micro_batches) = if windows >= self.sequences {
            (self.sequences, self.seq_len, self.micro_batches)
        } else if windows >= micro_batch {
            (windows / micro_batch * micro_batch, self.seq_len, windows / micro_batch)
        } else if windows > 0 {
            (windows, self.seq_len, 1)
        } else {
            (1, left, 1)
        };
        let mut batch = TokenBatch { input: Vec::new(), target: Vec::new(), sequences, seq_len };
        for _ in 0..sequences {
            batch.push(self.corpus, self.taken);
            self.taken += seq_len as u64;
        }
        Some((batch, micro_batches))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Tokenizer;
    use super::*;

    proptest! {
        #[test]
        fn every_target_comes_once_in_batches_that_divide(
            tokens in 2usize..200, seq_len in 1usize..9, micro_batch in 1usize..4, micro_batches in 1usize..4,
        ) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("text.txt");
            let text: String = (0..tokens).map(|i| char::from(b'a' + (i * 7 % 26) as u8)).collect();
            std::fs::write(&path, &text).unwrap();
            let corpus = Corpus::open(&path, &Tokenizer::Bytes).unwrap();
            let (mut inputs, mut targets) = (Vec::new(), Vec::new());
            for (batch, parts) in Pass::new(&corpus, seq_len, micro_batch * micro_batches, micro_batches).unwrap() {
                prop_assert_eq!(batch.sequences % parts, 0);
                prop_assert!(batch.sequences / parts <= micro_batch && parts <= micro_batches);
                prop_assert!(batch.input.len() == batch.sequences * batch.seq_len && batch.seq_len <= seq_len);
                inputs.extend(batch.input);
                targets.extend(batch.target);
            }
            let all: Vec<u32> = text.bytes().map(u32::from).collect();
            prop_assert_eq!(&inputs, &all[..tokens - 1]);
            prop_assert_eq!(&targets, &all[1..]);
        }
    }
}
