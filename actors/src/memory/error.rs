//! What can go wrong with the memory of a tier, with the numbers and what to do about it.

use std::io;
use std::path::PathBuf;

use super::SlotIndex;
use crate::types::{Bytes, Tier};

/// A tier could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Every slot is taken.
    #[error("{tier} tier is out of slots: need {need}, have {have}; evict a chunk or raise the budget of this tier")]
    OutOfSlots {
        /// The tier that is full.
        tier: Tier,
        /// Slots asked for.
        need: u32,
        /// Free slots.
        have: u32,
    },
    /// A slot was freed that nobody held, or that does not exist.
    #[error("slot {} of the {tier} tier is not allocated, so it cannot be freed: a chunk was released twice", slot.0)]
    NotAllocated {
        /// The tier of the slot.
        tier: Tier,
        /// The slot.
        slot: SlotIndex,
    },
    /// The tier has less room than asked for; nothing was allocated.
    #[error("{tier} tier is too small: need {need}, have {have}; lower the budget of this tier or free some room")]
    Insufficient {
        /// The tier.
        tier: Tier,
        /// Bytes asked for.
        need: Bytes,
        /// Bytes available.
        have: Bytes,
    },
    /// The device has less free memory than asked for; nothing was allocated.
    #[error(
        "{tier} tier is too small: need {need}, have {have}; {neighbours}; end what is not needed, or lower memory.{tier}"
    )]
    Taken {
        /// The tier.
        tier: Tier,
        /// Bytes asked for.
        need: Bytes,
        /// Bytes that nobody holds.
        have: Bytes,
        /// Who holds others.
        neighbours: String,
    },
    /// The system refused the allocation.
    #[error("{tier} tier could not allocate {need}: {source}; lower the budget of this tier")]
    Allocation {
        /// The tier.
        tier: Tier,
        /// Bytes asked for.
        need: Bytes,
        /// What the system said.
        source: io::Error,
    },
    /// A library of CUDA is not there.
    #[error("{reason}: install {product}, or name its directory in LD_LIBRARY_PATH")]
    Library {
        /// Whose library.
        product: &'static str,
        /// What the loader said.
        reason: String,
    },
    /// A size that the tier cannot lay out in slots.
    #[error(
        "{tier} tier cannot have {slots} slots of {slot_bytes}: need a size that is a positive multiple of {multiple} bytes and fits the address space; change the chunk size"
    )]
    SlotSize {
        /// The tier.
        tier: Tier,
        /// Slots asked for.
        slots: u32,
        /// Size of a slot asked for.
        slot_bytes: Bytes,
        /// What it must be a multiple of.
        multiple: u64,
    },
    /// A slot or a buffer of the wrong size was given to the disk tier.
    #[error("{tier} tier moves whole slots: slot {} of {slots} with need {need}, have a buffer of {have}", slot.0)]
    WholeSlots {
        /// The tier.
        tier: Tier,
        /// The slot asked for.
        slot: SlotIndex,
        /// How many slots there are.
        slots: u32,
        /// Size of a slot.
        need: Bytes,
        /// Size of the buffer.
        have: Bytes,
    },
    /// Another process has the file of the disk tier.
    #[error("{} is in use by another process; give this job its own file for the disk tier", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A file operation failed.
    #[error("disk tier could not {action} {}: {source}; check the device and the path of the disk tier", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Compiled kernels do not fit this GPU or its driver.
    #[error(
        "the kernels `{name}` do not load on this GPU: {reason}; they are for compute capability 9.0 (H100, H200) and a driver of CUDA 13.0 or newer"
    )]
    Kernels {
        /// The source.
        name: &'static str,
        /// What the driver said.
        reason: String,
    },
    /// The driver's management library does not answer.
    #[error(
        "NVML could not {action}: {reason}; the GPU's free memory is known without it, but neither its neighbours nor its health (libnvidia-ml.so.1 comes with the driver)"
    )]
    Inspection {
        /// What was tried.
        action: &'static str,
        /// What it said.
        reason: String,
    },
    /// A device call failed.
    #[error("device could not {action}: {reason}; restart the job from its last checkpoint")]
    Device {
        /// What was tried.
        action: &'static str,
        /// What the driver said.
        reason: String,
    },
}
