//! Any training data as lines of JSON, which is how a service takes it.

use std::fs::File;
use std::io::{self, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::DataError;
use super::source::{self, Text};

/// Bytes of text in a line. A service refuses lines that are too long, and JSON may write a byte in six.
const LINE: usize = 1 << 20;

/// Reads text files, directories of them and files of JSON lines as one file of JSON lines.
pub struct JsonLines {
    /// Still to be read, the next one last.
    sources: Vec<Source>,
    current: Box<dyn Read>,
    /// Whether what was read last ends a line.
    at_line_start: bool,
}

enum Source {
    /// A file that has lines of JSON already.
    Lines(PathBuf),
    Text(Text),
}

impl JsonLines {
    /// Opens what is to be read. Lines that are JSON already are not looked at.
    pub fn open(paths: &[PathBuf]) -> Result<Self, DataError> {
        let mut sources = Vec::new();
        for path in paths {
            if path.extension().is_some_and(|extension| extension == "jsonl") && path.is_file() {
                sources.push(Source::Lines(path.clone()));
            } else {
                sources.extend(source::open(path)?.into_iter().map(Source::Text));
            }
        }
        sources.reverse();
        Ok(JsonLines { sources, current: Box::new(io::empty()), at_line_start: true })
    }
}

impl Source {
    fn reader(self) -> io::Result<Box<dyn Read>> {
        match self {
            Source::Lines(path) => Ok(Box::new(BufReader::new(open(&path)?))),
            Source::Text(text) => Ok(Box::new(Pieces { text, at: 0, line: Cursor::default() })),
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::open(path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

impl Read for JsonLines {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            let count = self.current.read(buffer)?;
            if count > 0 {
                self.at_line_start = buffer[count - 1] == b'\n';
                return Ok(count);
            }
            let Some(next) = self.sources.pop() else { return Ok(0) };
            self.current = next.reader()?;
            if !self.at_line_start {
                self.at_line_start = true;
                buffer[0] = b'\n';
                return Ok(1);
            }
        }
    }
}

/// A text as lines of JSON. Documents follow each other without anything between them, so cutting one changes no byte of it.
struct Pieces {
    text: Text,
    at: usize,
    line: Cursor<Vec<u8>>,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.line.read(buffer)?;
        let rest = &self.text.as_str()[self.at..];
        if count > 0 || rest.is_empty() {
            return Ok(count);
        }
        let piece = &rest[..cut(rest)];
        self.at += piece.len();
        self.line = Cursor::new(format!("{}\n", json!({ "text": piece })).into_bytes());
        self.line.read(buffer)
    }
}

/// Where to end a piece: after a line if there is one, so that no word is torn, and never inside a character.
fn cut(text: &str) -> usize {
    if text.len() <= LINE {
        return text.len();
    }
    let most = text.floor_char_boundary(LINE);
    text[..most].rfind('\n').map_or(most, |end| end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Corpus, Tokenizer};

    #[test]
    fn lines_train_on_the_same_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let text = directory.path().join("long.txt");
        let long = "ein Wort, \"noch\" eines\n".repeat(LINE / 20) + &"ü".repeat(LINE);
        std::fs::write(&text, &long).unwrap();
        let lines = directory.path().join("more.jsonl");
        std::fs::write(&lines, "{\"text\":\"a\"}\n{\"prompt\":\"b\",\"completion\":\"c\"}").unwrap();
        let mut whole = String::new();
        let paths = [lines.clone(), text, lines];
        JsonLines::open(&paths).unwrap().read_to_string(&mut whole).unwrap();
        assert!(whole.lines().count() > 6 && whole.lines().all(|line| line.len() <= 6 * LINE), "{}", whole.len());

        let joined = directory.path().join("joined.jsonl");
        std::fs::write(&joined, whole).unwrap();
        let corpus = Corpus::open(&joined, &Tokenizer::Bytes).unwrap();
        let expected = format!("abc\n{long}abc\n");
        let mut tokens = vec![0; corpus.len() as usize];
        corpus.copy_tokens(0, &mut tokens);
        assert!(tokens.iter().map(|&token| token as u8).eq(expected.bytes()));
    }
}
