//! Checkpoints of an engine: written by a thread of their own while training goes on, restored under any chunk size.
//!
//! Between two steps all weights stand still. The saver reads group after group in the order in which the next step will
//! update them, and the optimizer waits for a group only if it gets there first; so a consistent checkpoint needs neither a
//! copy of the states nor a pause.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use patrickstar_actors::ChunkReader;
use patrickstar_actors::chunk::Layout;
use patrickstar_actors::types::{ChunkId, GroupId, Kind, Precision, Step};
use safetensors::Dtype;

use super::engine::Engine;
use crate::checkpoint::{Checkpoint, CheckpointError, CheckpointMeta, CheckpointWriter, Entry, RealFs, prune};
use crate::error::Error;

/// A checkpoint that is being written.
pub struct Saving {
    thread: JoinHandle<Result<PathBuf, Error>>,
}

impl Saving {
    /// Waits until it is safe on disk.
    pub fn finish(self) -> Result<PathBuf, Error> {
        self.thread.join().map_err(|_| Error::Failed("the checkpoint writer panicked: please report this".into()))?
    }

    /// Whether `finish` would return at once.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

impl Engine {
    /// What a checkpoint says of this engine; the caller adds where it is in its data, and how it came there.
    pub fn meta(&self) -> Result<CheckpointMeta, Error> {
        let config_toml = toml::to_string(self.config())
            .map_err(|error| Error::Failed(format!("the configuration cannot be written: {error}")))?;
        Ok(CheckpointMeta {
            step: self.current_step(),
            parameters: self.plan().parameters,
            config_toml,
            data_position: serde_json::Value::Null,
            rng_seed: self.config().train.seed,
            precision: self.precision(),
            tokenizer: self.config().data.tokenizer.clone(),
            model: serde_json::Value::Null,
            loss_history_tail: Vec::new(),
            loss_scale: Some(self.loss_scale()),
        })
    }

    /// Starts a checkpoint of the state after the last step, in `root`; keeps the `keep` newest.
    pub fn save(&self, root: &Path, keep: usize, meta: CheckpointMeta) -> Result<Saving, Error> {
        self.drain()?;
        self.runtime().begin_save()?;
        let reader = self.runtime().reader();
        let groups = self.save_order();
        let (root, step) = (root.to_owned(), self.current_step());
        let thread = std::thread::Builder::new()
            .name("ps-checkpoint".into())
            .spawn(move || {
                let result = write(&reader, &groups, &root, step, meta);
                // Whatever happened, the optimizer must not wait for groups that nobody will read any more.
                groups.iter().for_each(|&group| reader.saved(group));
                let path = result?;
                prune(&root, keep)?;
                Ok(path)
            })
            .map_err(|error| Error::Failed(format!("no thread for the checkpoint: {error}")))?;
        Ok(Saving { thread })
    }

    /// The order in which the next step updates groups.
    fn save_order(&self) -> Vec<GroupId> {
        let groups = (0..self.runtime().layout().group_count() as u32).map(GroupId);
        if self.runtime().steps_together() { groups.collect() } else { groups.rev().collect() }
    }

    /// Fills the engine with a checkpoint's states.
    pub(super) fn restore(&mut self, checkpoint: &Checkpoint) -> Result<(), Error> {
        let meta = checkpoint.meta();
        let layout = self.runtime().layout();
        if meta.parameters != layout.parameters() || meta.precision != layout.precision() {
            return Err(Error::Failed(format!(
                "the checkpoint holds {} parameters in {:?}, the configuration describes {} in {:?}: resume with the configuration it was written with",
                meta.parameters,
                meta.precision,
                layout.parameters(),
                layout.precision()
            )));
        }
        for group in (0..layout.group_count() as u32).map(GroupId) {
            for &kind in layout.precision().persistent_kinds() {
                self.restore_kind(checkpoint, group, kind)?;
            }
        }
        self.set_step(meta.step, meta.loss_scale);
        Ok(())
    }

    fn restore_kind(&self, checkpoint: &Checkpoint, group: GroupId, kind: Kind) -> Result<(), Error> {
        let layout = self.runtime().layout();
        let size = layout.precision().element_bytes(kind).unwrap_or(4);
        let mut values = vec![0u8; layout.group_capacity() * size];
        for tile in layout.group_tiles(group) {
            let spec = &layout.tensors()[tile.tensor.0 as usize];
            let (from, to) = (tile.offset * size, (tile.offset + tile.rows * spec.columns) * size);
            checkpoint.read_rows(&spec.name, kind, tile.row_start, tile.rows, &mut values[from..to])?;
        }
        let chunk_bytes = layout.chunk_bytes().0 as usize;
        for (&chunk, part) in layout.group_chunks(group, kind).iter().zip(values.chunks(chunk_bytes)) {
            self.runtime().initialise(&[chunk], |payloads| payloads[0][..part.len()].copy_from_slice(part))?;
        }
        Ok(())
    }
}

fn write(
    reader: &ChunkReader,
    groups: &[GroupId],
    root: &Path,
    step: Step,
    meta: CheckpointMeta,
) -> Result<PathBuf, Error> {
    let mut writer = CheckpointWriter::begin(Arc::new(RealFs), root, step)?;
    for &group in groups {
        let chunks: Vec<ChunkId> = reader
            .layout()
            .precision()
            .persistent_kinds()
            .iter()
            .flat_map(|&kind| reader.layout().group_chunks(group, kind).iter().copied())
            .collect();
        let mut outcome: Result<(), CheckpointError> = Ok(());
        reader.read(&chunks, |slices| outcome = write_group(&mut writer, reader.layout(), group, &chunks, slices))?;
        outcome?;
        reader.saved(group);
    }
    Ok(writer.finish(meta)?)
}

fn write_group(
    writer: &mut CheckpointWriter,
    layout: &Layout,
    group: GroupId,
    chunks: &[ChunkId],
    slices: &[&[u8]],
) -> Result<(), CheckpointError> {
    // A kind of two chunks is written from one piece of memory.
    let joined: Vec<(Kind, std::borrow::Cow<'_, [u8]>)> = layout
        .precision()
        .persistent_kinds()
        .iter()
        .map(|&kind| {
            let parts: Vec<&[u8]> = chunks
                .iter()
                .zip(slices)
                .filter(|(chunk, _)| layout.chunk(**chunk).kind == kind)
                .map(|(_, slice)| *slice)
                .collect();
            let bytes = match parts.as_slice() {
                [one] => std::borrow::Cow::Borrowed(*one),
                many => std::borrow::Cow::Owned(many.concat()),
            };
            (kind, bytes)
        })
        .collect();
    let mut entries = Vec::new();
    for (kind, bytes) in &joined {
        let size = layout.precision().element_bytes(*kind).unwrap_or(4);
        for tile in layout.group_tiles(group) {
            let spec = &layout.tensors()[tile.tensor.0 as usize];
            let (from, to) = (tile.offset * size, (tile.offset + tile.rows * spec.columns) * size);
            entries.push(Entry {
                tensor: &spec.name,
                kind: *kind,
                row_start: tile.row_start,
                rows: tile.rows,
                columns: spec.columns,
                dtype: dtype(*kind, layout.precision()),
                data: &bytes[from..to],
            });
        }
    }
    writer.write_group(group.0, &entries)
}

fn dtype(kind: Kind, precision: Precision) -> Dtype {
    match (kind, precision) {
        (Kind::Weight, Precision::Bf16) => Dtype::BF16,
        (Kind::Weight, Precision::Fp16) => Dtype::F16,
        (Kind::Low, _) => Dtype::I16,
        _ => Dtype::F32,
    }
}
