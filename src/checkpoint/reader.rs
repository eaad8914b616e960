//! Opens checkpoints, verifying every byte before anything is used.

#![expect(unsafe_code, reason = "maps files")]

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use patrickstar_actors::types::Kind;
use rayon::prelude::*;
use safetensors::SafeTensors;

use super::{CheckpointError, CheckpointMeta, FORMAT, FileRecord, LATEST, MANIFEST, Manifest, step_of};

/// Rows of one state: file, position in it, and shape.
#[derive(Clone, Debug)]
struct Piece {
    file: usize,
    offset: usize,
    row_start: usize,
    rows: usize,
    row_bytes: usize,
}

/// An open, verified checkpoint.
pub struct Checkpoint {
    path: PathBuf,
    meta: CheckpointMeta,
    maps: Vec<Mmap>,
    pieces: HashMap<(String, &'static str), Vec<Piece>>,
}

/// Opens and verifies the checkpoint in `path`.
pub fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let manifest_path = path.join(MANIFEST);
    let text = std::fs::read(&manifest_path).map_err(|error| CheckpointError::io(&manifest_path, error))?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| damaged(&manifest_path, error))?;
    if manifest.format != FORMAT {
        return Err(damaged(&manifest_path, format!("format {} instead of {FORMAT}", manifest.format)));
    }
    let maps = manifest.files.par_iter().map(|record| verify(path, record)).collect::<Result<Vec<_>, _>>()?;
    let mut pieces: HashMap<(String, &'static str), Vec<Piece>> = HashMap::new();
    for (file, (map, record)) in maps.iter().zip(&manifest.files).enumerate() {
        index(file, map, &path.join(&record.name), &mut pieces)?;
    }
    Ok(Checkpoint { path: path.to_owned(), meta: manifest.meta, maps, pieces })
}

fn damaged(path: &Path, reason: impl ToString) -> CheckpointError {
    CheckpointError::Damaged { path: path.to_owned(), reason: reason.to_string() }
}

fn verify(directory: &Path, record: &FileRecord) -> Result<Mmap, CheckpointError> {
    let path = directory.join(&record.name);
    let file = File::open(&path).map_err(|error| CheckpointError::io(&path, error))?;
    let bytes = file.metadata().map_err(|error| CheckpointError::io(&path, error))?.len();
    if bytes != record.bytes {
        return Err(damaged(&path, format!("{bytes} bytes instead of {}", record.bytes)));
    }
    // SAFETY: the map is read-only and checkpoints are never changed in place; see `source` for the same trade.
    let map = unsafe { Mmap::map(&file) }.map_err(|error| CheckpointError::io(&path, error))?;
    if crc32fast::hash(&map) != record.crc32 {
        return Err(damaged(&path, "its checksum is wrong"));
    }
    Ok(map)
}

fn index(
    file: usize,
    map: &Mmap,
    path: &Path,
    pieces: &mut HashMap<(String, &'static str), Vec<Piece>>,
) -> Result<(), CheckpointError> {
    let tensors = SafeTensors::deserialize(map).map_err(|error| damaged(path, error))?;
    for (name, view) in tensors.tensors() {
        let (tensor, kind, row_start) = parse_name(&name).ok_or_else(|| damaged(path, format!("entry `{name}`")))?;
        let rows = view.shape().first().copied().unwrap_or(0).max(1);
        let offset = view.data().as_ptr() as usize - map.as_ptr() as usize;
        let piece = Piece { file, offset, row_start, rows, row_bytes: view.data().len() / rows };
        pieces.entry((tensor.to_owned(), kind)).or_default().push(piece);
    }
    Ok(())
}

fn parse_name(name: &str) -> Option<(&str, &'static str, usize)> {
    let (name, row) = name.rsplit_once('#')?;
    let (tensor, kind) = name.rsplit_once('@')?;
    let kinds = [Kind::Weight, Kind::Low, Kind::Master, Kind::Momentum, Kind::Variance, Kind::Gradient];
    let kind = kinds.into_iter().map(Kind::name).find(|known| *known == kind)?;
    Some((tensor, kind, row.parse().ok()?))
}

impl Checkpoint {
    /// What it says beside its states.
    pub fn meta(&self) -> &CheckpointMeta {
        &self.meta
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Copies rows of a state into `out`, however they were tiled when they were written.
    pub fn read_rows(
        &self,
        tensor: &str,
        kind: Kind,
        row_start: usize,
        rows: usize,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let missing = |from, to| CheckpointError::Missing { kind: kind.name(), tensor: tensor.to_owned(), from, to };
        let pieces = self.pieces.get(&(tensor.to_owned(), kind.name()));
        let pieces = pieces.ok_or_else(|| missing(row_start, row_start + rows))?;
        let row_bytes = out.len() / rows.max(1);
        let mut row = row_start;
        while row < row_start + rows {
            let piece = pieces
                .iter()
                .find(|piece| {
                    (piece.row_start..piece.row_start + piece.rows).contains(&row) && piece.row_bytes == row_bytes
                })
                .ok_or_else(|| missing(row, row_start + rows))?;
            let end = (piece.row_start + piece.rows).min(row_start + rows);
            let from = piece.offset + (row - piece.row_start) * row_bytes;
            let count = (end - row) * row_bytes;
            let target = (row - row_start) * row_bytes;
            out[target..target + count].copy_from_slice(&self.maps[piece.file][from..from + count]);
            row = end;
        }
        Ok(())
    }
}

/// The newest checkpoint in `root` that verifies, and a warning for each newer one that does not.
pub fn latest(root: &Path) -> Result<(Checkpoint, Vec<String>), CheckpointError> {
    let mut warnings = Vec::new();
    for path in candidates(root) {
        match open(&path) {
            Ok(checkpoint) => return Ok((checkpoint, warnings)),
            Err(error) => warnings.push(format!("skipping a checkpoint: {error}")),
        }
    }
    warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    Err(CheckpointError::NotFound(root.to_owned()))
}

/// Directories that may hold a checkpoint: the one `LATEST` names, then the others, newest first.
pub(super) fn candidates(root: &Path) -> Vec<PathBuf> {
    let named = std::fs::read_to_string(root.join(LATEST)).ok().map(|name| name.trim().to_owned());
    let mut found: Vec<(bool, u64, bool, PathBuf)> = std::fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let stepped_aside = name.strip_suffix(".old");
            let step = step_of(stepped_aside.unwrap_or(&name))?;
            Some((named.as_deref() == Some(&name), step, stepped_aside.is_none(), entry.path()))
        })
        .collect();
    found.sort_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, _, _, path)| path).collect()
}
