//! Where chunks lie: the slots of each tier, and the backend that moves bytes between them.
//!
//! - [`SlotAllocator`]: which slots are taken. Pure.
//! - [`Arena`]: slots in main memory, one mapping of the exact size.
//! - [`DiskTier`]: slots in a file.
//! - [`Backend`]: slabs, streams and events of a device; [`CpuBackend`] is the one without a device.
//! - [`limits`]: how much memory this process may still take. [`numa`]: on which nodes it lies.
//! - [`bandwidth`]: what the memory of this machine can do, and how near the optimizer comes.

mod arena;
mod backend;
pub mod bandwidth;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_slab;
mod disk;
mod error;
pub mod limits;
pub mod numa;
#[cfg(any(feature = "cuda", test))]
mod registered;
mod slots;

pub use arena::Arena;
pub use backend::{
    Backend, CpuBackend, CpuEvent, CpuStream, DeviceEvent, DeviceMath, DeviceRoom, Event, Rows, Slab, StateAddresses,
    Stream,
};
#[cfg(feature = "cuda")]
pub use cuda::CudaBackend;
pub use disk::DiskTier;
pub use error::MemoryError;
pub use slots::{SlotAllocator, SlotIndex};
