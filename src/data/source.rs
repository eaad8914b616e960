//! Files of text, memory-mapped.

#![expect(unsafe_code, reason = "maps files")]

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::DataError;
use super::document::Document;

/// Bytes in which a NUL marks a file as binary.
const SNIFF: usize = 8 << 10;
/// A JSONL line longer than this is taken for a mistake.
const MAX_LINE: usize = 64 << 20;
/// Directories that hold nothing a person wrote.
const SKIPPED: [&str; 4] = ["target", "runs", "node_modules", "__pycache__"];

/// A document, or part of one: UTF-8.
pub(super) enum Text {
    Mapped(Mmap),
    Owned(String),
    /// Given to the model to read, but not to learn.
    Context(String),
}

impl Text {
    pub fn as_str(&self) -> &str {
        match self {
            // Checked when it was opened.
            Text::Mapped(map) => std::str::from_utf8(map).unwrap_or(""),
            Text::Owned(text) | Text::Context(text) => text,
        }
    }

    pub fn bytes(&self) -> &[u8] {
        match self {
            Text::Mapped(map) => map,
            Text::Owned(text) | Text::Context(text) => text.as_bytes(),
        }
    }

    /// Whether its tokens are targets.
    pub fn counts(&self) -> bool {
        !matches!(self, Text::Context(_))
    }
}

/// Opens a text file, a directory of text files, or JSONL.
pub(super) fn open(path: &Path) -> Result<Vec<Text>, DataError> {
    let metadata = std::fs::metadata(path).map_err(|source| io(path, source))?;
    let texts = if metadata.is_dir() {
        open_directory(path)?
    } else if path.extension().is_some_and(|extension| extension == "jsonl") {
        open_jsonl(path)?
    } else {
        open_file(path)?.into_iter().collect()
    };
    if texts.iter().all(|text| text.bytes().is_empty()) {
        return Err(DataError::Empty(path.to_owned()));
    }
    Ok(texts)
}

fn io(path: &Path, source: std::io::Error) -> DataError {
    DataError::Io { path: path.to_owned(), source }
}

/// `None` for an empty file, which cannot be mapped.
fn map(path: &Path) -> Result<Option<Mmap>, DataError> {
    let file = File::open(path).map_err(|source| io(path, source))?;
    if file.metadata().map_err(|source| io(path, source))?.len() == 0 {
        return Ok(None);
    }
    // SAFETY: the map is read-only. A file that another process truncates while it is mapped ends the process with SIGBUS,
    // as for every mapped file; training data is expected to stand still.
    unsafe { Mmap::map(&file) }.map(Some).map_err(|source| io(path, source))
}

fn open_file(path: &Path) -> Result<Option<Text>, DataError> {
    let Some(map) = map(path)? else { return Ok(None) };
    match std::str::from_utf8(&map) {
        Ok(_) => Ok(Some(Text::Mapped(map))),
        Err(error) => Err(DataError::NotUtf8 { path: path.to_owned(), offset: error.valid_up_to() }),
    }
}

fn open_directory(path: &Path) -> Result<Vec<Text>, DataError> {
    let mut files = Vec::new();
    collect(path, &mut files)?;
    files.sort();
    let mut skipped = 0;
    let mut texts = Vec::new();
    for file in files {
        let Some(map) = map(&file)? else { continue };
        if map[..map.len().min(SNIFF)].contains(&0) || std::str::from_utf8(&map).is_err() {
            skipped += 1;
        } else {
            texts.push(Text::Mapped(map));
        }
    }
    tracing::info!(files = texts.len(), skipped, directory = %path.display(), "opened text files");
    Ok(texts)
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> Result<(), DataError> {
    for entry in std::fs::read_dir(directory).map_err(|source| io(directory, source))? {
        let entry = entry.map_err(|source| io(directory, source))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let kind = entry.file_type().map_err(|source| io(&entry.path(), source))?;
        if name.starts_with('.') || (kind.is_dir() && SKIPPED.contains(&&*name)) {
            continue;
        }
        if kind.is_dir() {
            collect(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

fn open_jsonl(path: &Path) -> Result<Vec<Text>, DataError> {
    let Some(map) = map(path)? else { return Ok(Vec::new()) };
    let mut texts = Vec::new();
    for (index, line) in map.split(|&byte| byte == b'\n').enumerate() {
        let wrong = |reason: String| DataError::Line { path: path.to_owned(), line: index + 1, reason };
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        if line.len() > MAX_LINE {
            return Err(wrong(format!(
                "{} bytes long, at most {MAX_LINE} are allowed: split the document",
                line.len()
            )));
        }
        let document = Document::parse(line).map_err(wrong)?;
        texts.extend(document.parts().into_iter().map(
            |(text, counts)| {
                if counts { Text::Owned(text) } else { Text::Context(text) }
            },
        ));
    }
    Ok(texts)
}
