//! Text that grows token by token, in pieces that never have to be taken back.

/// What stands for a character of which not all bytes are there yet.
const INCOMPLETE: char = char::REPLACEMENT_CHARACTER;
/// No character has more bytes; what is still incomplete then stays so.
const MOST_INCOMPLETE: usize = 3;

/// Gives out a growing text, up to the first of the texts that end it.
pub(super) struct Pieces<'a> {
    stops: &'a [String],
    /// Bytes that were given out.
    given: usize,
}

impl<'a> Pieces<'a> {
    pub fn new(stops: &'a [String]) -> Self {
        Pieces { stops, given: 0 }
    }

    /// What may be given out of `text`, which is what there was before and more; and whether it ends here.
    pub fn grow(&mut self, text: &str) -> (String, bool) {
        let found = self.stops.iter().filter_map(|stop| text.find(stop.as_str())).min();
        let until = found.unwrap_or_else(|| self.certain(text));
        (self.give(text, until), found.is_some())
    }

    /// What is left of `text` when nothing follows.
    pub fn finish(&mut self, text: &str) -> String {
        self.give(text, text.len())
    }

    fn give(&mut self, text: &str, until: usize) -> String {
        let piece = text.get(self.given..until).unwrap_or_default().to_owned();
        self.given += piece.len();
        piece
    }

    /// Bytes that no later token changes or ends.
    fn certain(&self, text: &str) -> usize {
        let whole = text.trim_end_matches(INCOMPLETE);
        let broken = text[whole.len()..].chars().count();
        let whole = if broken > MOST_INCOMPLETE { text } else { whole };
        // The longest end that may be the beginning of a text that ends it all.
        let begun = |stop: &String| {
            let lengths = (1..stop.len()).rev().filter(|&length| stop.is_char_boundary(length));
            lengths.into_iter().find(|&length| whole.ends_with(&stop[..length])).unwrap_or(0)
        };
        whole.len() - self.stops.iter().map(begun).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `bytes` one by one, as a tokenizer of bytes would.
    fn pieces(bytes: &[u8], stops: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut pieces = Pieces::new(&stops);
        let mut out = Vec::new();
        for end in 1..=bytes.len() {
            let (piece, ends) = pieces.grow(&String::from_utf8_lossy(&bytes[..end]));
            out.push(piece);
            if ends {
                return (out, true);
            }
        }
        out.push(pieces.finish(&String::from_utf8_lossy(bytes)));
        (out, false)
    }

    #[test]
    fn pieces_make_the_text_and_stop_before_what_ends_it() {
        for (text, stops, expected, ends) in [
            ("plain", vec![], "plain", false),
            ("täglich 🙂!", vec![], "täglich 🙂!", false),
            ("yes<|end|>\nno", vec!["<|end|>"], "yes", true),
            ("a<|b<|end|>", vec!["<|end|>"], "a<|b", true),
            ("a<|en", vec!["<|end|>"], "a<|en", false),
            ("one\ntwo", vec!["x", "\n"], "one", true),
            ("aab", vec!["ab"], "a", true),
            ("für", vec!["ür"], "f", true),
        ] {
            let (pieces, ended) = pieces(text.as_bytes(), &stops);
            assert_eq!((pieces.concat().as_str(), ended), (expected, ends), "{pieces:?}");
        }
    }

    #[test]
    fn nothing_is_given_out_that_may_still_change() {
        let (given, _) = pieces("🙂".as_bytes(), &[]);
        assert_eq!(given, ["", "", "", "🙂", ""]);
        let (given, _) = pieces(b"a<x", &["<|end|>"]);
        assert_eq!(given, ["a", "", "<x", ""]);
        // Bytes that never become a character are given out in the end.
        let (given, _) = pieces(b"\xff\xff\xff\xff\xffa", &[]);
        assert_eq!(given.concat(), "\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}a");
    }
}
