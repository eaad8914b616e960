//! Slots in a file.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, pread, pwrite, retry_on_intr};

use super::{MemoryError, SlotIndex};
use crate::types::{Bytes, Tier};

/// What direct I/O wants of addresses, offsets and lengths.
const DIRECT: usize = 4096;

/// Memory aligned for direct I/O.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; DIRECT]);

/// The disk tier: a preallocated file of slots, past the page cache where the filesystem can. It is deleted on drop; a
/// file that a killed process left behind is taken over.
#[derive(Debug)]
pub struct DiskTier {
    file: File,
    path: PathBuf,
    slots: u32,
    slot_bytes: usize,
    direct: bool,
}

impl DiskTier {
    /// Creates the file with room for every slot, so that a full disk shows here and not in a step.
    pub fn create(path: impl AsRef<Path>, slots: u32, slot_bytes: Bytes) -> Result<DiskTier, MemoryError> {
        let path = path.as_ref().to_path_buf();
        let invalid = || MemoryError::SlotSize { tier: Tier::Disk, slots, slot_bytes, multiple: 1 };
        let total = slot_bytes.0.checked_mul(slots.into()).filter(|&n| n > 0 && n <= i64::MAX as u64);
        let total = total.ok_or_else(invalid)?;
        let io = |action| {
            let path = path.clone();
            move |source: io::Error| MemoryError::Io { action, path, source }
        };
        // Truncated only once it is locked: until then it may be another job's.
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = opened.map_err(io("open"))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(MemoryError::InUse { path }),
            Err(errno) => return Err(io("lock")(errno.into())),
        }
        // From here on the file is ours, and dropping the tier deletes it on every way out.
        let mut tier = DiskTier { file, path, slots, slot_bytes: slot_bytes.0 as usize, direct: false };
        tier.preallocate(total)?;
        tier.direct = tier.slot_bytes.is_multiple_of(DIRECT) && tier.go_direct();
        if !tier.direct {
            tracing::warn!(path = %tier.path.display(), "the disk tier uses buffered I/O: its page cache competes with the host tier");
        }
        Ok(tier)
    }

    /// Whether reads and writes go past the page cache.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// How many slots there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Size of a slot.
    pub fn slot_bytes(&self) -> Bytes {
        Bytes(self.slot_bytes as u64)
    }

    /// Reads a whole slot. Buffers that start on a page avoid a copy.
    pub fn read(&self, slot: SlotIndex, buffer: &mut [u8]) -> Result<(), MemoryError> {
        let offset = self.check(slot, buffer.len())?;
        if !self.direct || (buffer.as_ptr() as usize).is_multiple_of(DIRECT) {
            return self.read_at(buffer, offset);
        }
        let mut bounce = vec![Page([0; DIRECT]); 256];
        for (piece, at) in buffer.chunks_mut(256 * DIRECT).zip((offset..).step_by(256 * DIRECT)) {
            let aligned = &mut bytemuck::cast_slice_mut(&mut bounce)[..piece.len()];
            self.read_at(aligned, at)?;
            piece.copy_from_slice(aligned);
        }
        Ok(())
    }

    /// Writes a whole slot. Buffers that start on a page avoid a copy.
    pub fn write(&self, slot: SlotIndex, buffer: &[u8]) -> Result<(), MemoryError> {
        let offset = self.check(slot, buffer.len())?;
        if !self.direct || (buffer.as_ptr() as usize).is_multiple_of(DIRECT) {
            return self.write_at(buffer, offset);
        }
        let mut bounce = vec![Page([0; DIRECT]); 256];
        for (piece, at) in buffer.chunks(256 * DIRECT).zip((offset..).step_by(256 * DIRECT)) {
            let aligned = &mut bytemuck::cast_slice_mut(&mut bounce)[..piece.len()];
            aligned.copy_from_slice(piece);
            self.write_at(aligned, at)?;
        }
        Ok(())
    }

    fn check(&self, slot: SlotIndex, have: usize) -> Result<u64, MemoryError> {
        if slot.0 >= self.slots || have != self.slot_bytes {
            let (need, have) = (self.slot_bytes(), Bytes(have as u64));
            return Err(MemoryError::WholeSlots { tier: Tier::Disk, slot, slots: self.slots, need, have });
        }
        Ok(u64::from(slot.0) * self.slot_bytes as u64)
    }

    fn read_at(&self, mut buffer: &mut [u8], mut offset: u64) -> Result<(), MemoryError> {
        while !buffer.is_empty() {
            let done = retry_on_intr(|| pread(&self.file, &mut *buffer, offset));
            match done.map_err(|errno| self.io("read", errno.into()))? {
                0 => return Err(self.io("read", io::ErrorKind::UnexpectedEof.into())),
                count => (buffer, offset) = (&mut buffer[count..], offset + count as u64),
            }
        }
        Ok(())
    }

    fn write_at(&self, mut buffer: &[u8], mut offset: u64) -> Result<(), MemoryError> {
        while !buffer.is_empty() {
            let done = retry_on_intr(|| pwrite(&self.file, buffer, offset));
            match done.map_err(|errno| self.io("write", errno.into()))? {
                0 => return Err(self.io("write", io::ErrorKind::WriteZero.into())),
                count => (buffer, offset) = (&buffer[count..], offset + count as u64),
            }
        }
        Ok(())
    }

    fn io(&self, action: &'static str, source: io::Error) -> MemoryError {
        MemoryError::Io { action, path: self.path.clone(), source }
    }

    fn preallocate(&self, total: u64) -> Result<(), MemoryError> {
        self.file.set_len(0).map_err(|source| self.io("truncate", source))?;
        // Asked first: some filesystems fill the disk to the brim before they fail.
        let stat = rustix::fs::fstatvfs(&self.file).map_err(|errno| self.io("measure", errno.into()))?;
        let (need, have) = (Bytes(total), Bytes(stat.f_bavail.saturating_mul(stat.f_frsize)));
        let full = || MemoryError::Insufficient { tier: Tier::Disk, need, have };
        if need > have {
            return Err(full());
        }
        #[cfg(target_os = "linux")]
        match retry_on_intr(|| rustix::fs::fallocate(&self.file, rustix::fs::FallocateFlags::empty(), 0, total)) {
            Ok(()) => return Ok(()),
            Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => return Err(full()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(errno) => return Err(self.io("preallocate", errno.into())),
        }
        self.file.set_len(total).map_err(|source| self.io("preallocate", source))
    }

    #[cfg(target_os = "linux")]
    fn go_direct(&self) -> bool {
        use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
        let Ok(flags) = fcntl_getfl(&self.file) else { return false };
        if fcntl_setfl(&self.file, flags | OFlags::DIRECT).is_err() {
            return false;
        }
        // Some filesystems take the flag and then refuse the read.
        let mut page = [Page([0; DIRECT])];
        let works = self.read_at(bytemuck::cast_slice_mut(&mut page), 0).is_ok();
        works || fcntl_setfl(&self.file, flags).is_err()
    }

    #[cfg(not(target_os = "linux"))]
    fn go_direct(&self) -> bool {
        false
    }
}

impl Drop for DiskTier {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the file of the disk tier could not be deleted");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_come_back_whole_and_the_file_goes_with_the_tier() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("slots");
        for bytes in [3 << 20, 1000] {
            let tier = DiskTier::create(&path, 3, Bytes(bytes)).unwrap();
            assert!(bytes != 1000 || !tier.direct());
            assert!(matches!(DiskTier::create(&path, 1, Bytes(4096)), Err(MemoryError::InUse { .. })));
            // Offsets 0 and 1 in memory: at most one of them can be aligned.
            for shift in 0..2 {
                let data: Vec<u8> = (0..bytes as usize + shift).map(|i| ((i * 31) >> 5) as u8).collect();
                for slot in [2, 0, 1] {
                    tier.write(SlotIndex(slot), &data[shift..]).unwrap();
                }
                let mut back = vec![0; bytes as usize + shift];
                tier.read(SlotIndex(1), &mut back[shift..]).unwrap();
                assert_eq!(back[shift..], data[shift..]);
            }
            assert!(matches!(tier.write(SlotIndex(3), &[0; 1000]), Err(MemoryError::WholeSlots { .. })));
            assert!(matches!(tier.read(SlotIndex(0), &mut [0; 1]), Err(MemoryError::WholeSlots { .. })));
            drop(tier);
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_file_larger_than_the_disk_is_refused_with_the_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let error = DiskTier::create(folder.path().join("slots"), 1 << 20, Bytes(1 << 40)).unwrap_err();
        assert!(matches!(error, MemoryError::Insufficient { tier: Tier::Disk, .. }), "{error}");
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    }
}
