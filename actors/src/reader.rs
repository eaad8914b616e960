//! Reading chunks from another thread while training goes on, for checkpoints.

#![expect(unsafe_code, reason = "reads leased chunks by address")]

use std::sync::Arc;

use crate::chunk::{Layout, Pass};
use crate::error::RuntimeError;
use crate::shared::Shared;
use crate::table::{Access, Requester};
use crate::types::{ChunkId, GroupId, Tier};

/// Reads chunks from any thread.
#[derive(Clone)]
pub struct ChunkReader {
    pub(crate) shared: Arc<Shared>,
}

impl ChunkReader {
    /// Leases `chunks` in host memory for reading, waiting for pending updates, and passes their bytes.
    pub fn read(&self, chunks: &[ChunkId], read: impl FnOnce(&[&[u8]])) -> Result<(), RuntimeError> {
        let request = chunks.iter().map(|&chunk| (chunk, Access::Read)).collect();
        let lease = self.shared.lease(Requester::Checkpoint, Tier::Host, request)?;
        let bytes = self.shared.chunk_bytes().0 as usize;
        // SAFETY: the lease keeps the chunks in place and unwritten.
        let slices: Vec<&[u8]> =
            (0..chunks.len()).map(|index| unsafe { std::slice::from_raw_parts(lease.address(index), bytes) }).collect();
        read(&slices);
        lease.release(Pass::Other)
    }

    /// The group has been saved: its next update may be applied.
    pub fn saved(&self, group: GroupId) {
        self.shared.lock().group_mut(group).save_wanted = false;
        self.shared.changed.notify_all();
        self.shared.ring();
    }

    /// Where tensors lie.
    pub fn layout(&self) -> &Layout {
        &self.shared.layout
    }
}
