//! Writes a checkpoint group by group; see the module's page for the order that makes it safe.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use patrickstar_actors::types::{Kind, Step};
use safetensors::Dtype;

use super::fs::{FileSystem, WriteFile};
use super::{CheckpointError, CheckpointMeta, FORMAT, FileRecord, LATEST, MANIFEST, Manifest, directory_name};

/// Rows of one kind of one parameter.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The parameter.
    pub tensor: &'a str,
    /// Which state.
    pub kind: Kind,
    /// First row.
    pub row_start: usize,
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub columns: usize,
    /// Type of an element.
    pub dtype: Dtype,
    /// The elements.
    pub data: &'a [u8],
}

/// A checkpoint under way. Dropping it removes what was written.
pub struct CheckpointWriter {
    fs: Arc<dyn FileSystem>,
    root: PathBuf,
    scratch: PathBuf,
    step: Step,
    files: Vec<FileRecord>,
    finished: bool,
}

impl CheckpointWriter {
    /// Opens a scratch directory in `root`; one that a crash left behind is removed.
    pub fn begin(fs: Arc<dyn FileSystem>, root: &Path, step: Step) -> Result<Self, CheckpointError> {
        let scratch = root.join(format!("{}.tmp", directory_name(step)));
        if scratch.is_dir() {
            fs.remove_dir(&scratch).map_err(|error| CheckpointError::io(&scratch, error))?;
        }
        fs.create_dir(&scratch).map_err(|error| CheckpointError::io(&scratch, error))?;
        Ok(CheckpointWriter { fs, root: root.to_owned(), scratch, step, files: Vec::new(), finished: false })
    }

    /// Writes one group as `group-00000.safetensors`, without a second copy of its data.
    pub fn write_group(&mut self, group: u32, entries: &[Entry<'_>]) -> Result<(), CheckpointError> {
        let name = format!("group-{group:05}.safetensors");
        let header = header(entries).map_err(|error| CheckpointError::io(self.scratch.join(&name), error))?;
        let parts = std::iter::once(header.as_slice()).chain(entries.iter().map(|entry| entry.data));
        self.write_file(&name, parts)
    }

    fn write_file<'a>(&mut self, name: &str, parts: impl Iterator<Item = &'a [u8]>) -> Result<(), CheckpointError> {
        let path = self.scratch.join(name);
        let mut crc = crc32fast::Hasher::new();
        let mut bytes = 0;
        let mut file = self.fs.create(&path).map_err(|error| failure(&path, 0, error))?;
        for part in parts {
            file.write_all(part).map_err(|error| failure(&path, part.len() as u64, error))?;
            crc.update(part);
            bytes += part.len() as u64;
        }
        file.sync().map_err(|error| failure(&path, bytes, error))?;
        self.files.push(FileRecord { name: name.to_owned(), bytes, crc32: crc.finalize() });
        Ok(())
    }

    /// Completes the checkpoint and lets `LATEST` name it.
    pub fn finish(mut self, meta: CheckpointMeta) -> Result<PathBuf, CheckpointError> {
        let manifest = Manifest { format: FORMAT, files: std::mem::take(&mut self.files), meta };
        let json = serde_json::to_vec_pretty(&manifest).map_err(|error| failure(&self.scratch, 0, error.into()))?;
        self.write_file(MANIFEST, std::iter::once(json.as_slice()))?;
        self.sync_dir(&self.scratch)?;
        let target = self.root.join(directory_name(self.step));
        let replaced = self.root.join(format!("{}.old", directory_name(self.step)));
        if target.is_dir() {
            // A resumed run saves a step that exists: a directory cannot be renamed over, so the old one steps aside. Between
            // the two renames older checkpoints still stand, and the reader also looks at what stepped aside. One that a crash
            // left aside is older than `target`, which is whole: directories only get their name when they are.
            if replaced.is_dir() {
                self.fs.remove_dir(&replaced).map_err(|error| CheckpointError::io(&replaced, error))?;
            }
            self.rename(&target, &replaced)?;
        }
        self.rename(&self.scratch, &target)?;
        self.sync_dir(&self.root)?;
        self.finished = true;
        self.point_latest()?;
        if replaced.is_dir() {
            self.fs.remove_dir(&replaced).map_err(|error| CheckpointError::io(&replaced, error))?;
        }
        Ok(target)
    }

    fn point_latest(&self) -> Result<(), CheckpointError> {
        let (scratch, target) = (self.root.join("LATEST.tmp"), self.root.join(LATEST));
        let mut file: Box<dyn WriteFile> = self.fs.create(&scratch).map_err(|error| failure(&scratch, 0, error))?;
        let name = directory_name(self.step);
        file.write_all(name.as_bytes()).map_err(|error| failure(&scratch, name.len() as u64, error))?;
        file.sync().map_err(|error| failure(&scratch, name.len() as u64, error))?;
        self.rename(&scratch, &target)?;
        self.sync_dir(&self.root)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), CheckpointError> {
        self.fs.rename(from, to).map_err(|error| CheckpointError::io(from, error))
    }

    fn sync_dir(&self, path: &Path) -> Result<(), CheckpointError> {
        self.fs.sync_dir(path).map_err(|error| CheckpointError::io(path, error))
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing depends on it: the next save of this step removes what cannot be removed now.
            let _ = self.fs.remove_dir(&self.scratch);
        }
    }
}

fn failure(path: &Path, need: u64, source: io::Error) -> CheckpointError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            CheckpointError::Full { path: path.to_owned(), need }
        }
        _ => CheckpointError::io(path, source),
    }
}

/// Length and JSON header of a safetensors file, padded to eight bytes.
fn header(entries: &[Entry<'_>]) -> io::Result<Vec<u8>> {
    let mut offset = 0;
    let mut tensors = BTreeMap::new();
    for entry in entries {
        let end = offset + entry.data.len();
        let name = entry_name(entry.tensor, entry.kind, entry.row_start);
        let value = serde_json::json!({
            "dtype": entry.dtype,
            "shape": [entry.rows, entry.columns],
            "data_offsets": [offset, end],
        });
        tensors.insert(name, value);
        offset = end;
    }
    let mut json = serde_json::to_vec(&tensors)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    Ok(header)
}

pub(super) fn entry_name(tensor: &str, kind: Kind, row_start: usize) -> String {
    format!("{tensor}@{}#{row_start}", kind.name())
}
