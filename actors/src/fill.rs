//! Filling chunks before training, in the tier in which their group stays.

#![expect(unsafe_code, reason = "fills leased chunks by address")]

use crate::chunk::Pass;
use crate::error::RuntimeError;
use crate::placement::Side;
use crate::runtime::Runtime;
use crate::shared::Lease;
use crate::table::{Access, Requester};
use crate::types::{ChunkId, Tier};

impl Runtime {
    /// Fills chunks of one group before training: `fill` gets their bytes, zeroed. They end up where the group is stepped.
    pub fn initialise(&self, chunks: &[ChunkId], fill: impl FnOnce(&mut [&mut [u8]])) -> Result<(), RuntimeError> {
        let lease = self.lease_all(chunks, Tier::Host, Access::Fresh)?;
        let bytes = self.shared.chunk_bytes().0 as usize;
        let mut payloads: Vec<&mut [u8]> = (0..chunks.len())
            // SAFETY: the lease gives this thread the whole slots alone, and they do not overlap.
            .map(|index| unsafe { std::slice::from_raw_parts_mut(lease.address(index), bytes) })
            .collect();
        fill(&mut payloads);
        lease.release(Pass::Other)?;
        match self.home(chunks) {
            Tier::Device => self.lease_all(chunks, Tier::Device, Access::Write)?.release(Pass::Other),
            Tier::Host | Tier::Disk => Ok(()),
        }
    }

    /// As [`Runtime::initialise`], for a group that lives on the device: `fill` gets the addresses of its chunks there,
    /// zeroed, and returns when they are written.
    pub fn initialise_on_device<E: From<RuntimeError>>(
        &self,
        chunks: &[ChunkId],
        fill: impl FnOnce(&[*mut u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let lease = self.lease_all(chunks, Tier::Device, Access::Fresh)?;
        let addresses: Vec<*mut u8> = (0..chunks.len()).map(|index| lease.address(index)).collect();
        fill(&addresses)?;
        Ok(lease.release(Pass::Other)?)
    }

    /// Fills chunks of one group with zeros before training, where the group is stepped.
    pub fn clear(&self, chunks: &[ChunkId]) -> Result<(), RuntimeError> {
        self.lease_all(chunks, self.home(chunks), Access::Fresh)?.release(Pass::Other)
    }

    fn lease_all(&self, chunks: &[ChunkId], tier: Tier, access: Access) -> Result<Lease, RuntimeError> {
        let chunks = chunks.iter().map(|&chunk| (chunk, access)).collect();
        self.shared.lease(Requester::Optimizer, tier, chunks)
    }

    /// The tier in which the states of a group stay between steps, given by its first chunk.
    pub fn home(&self, chunks: &[ChunkId]) -> Tier {
        let group = chunks.first().map(|&chunk| self.shared.layout.chunk(chunk).group);
        match group.map(|group| self.shared.lock().group(group).side) {
            Some(Side::Resident) => Tier::Device,
            _ => Tier::Host,
        }
    }
}
