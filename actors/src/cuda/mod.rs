//! NVIDIA GPUs: the context that all streams share, and kernels that were compiled with the program.

mod context;
mod launch;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub mod libraries;
mod math;
mod nvml;
mod profile;

pub(crate) use context::device_error;
pub use context::{Gpu, PoolUse, sleep_until_done};
pub use launch::{Arg, Grid, Kernels, TensorMap};
pub use math::ChunkMath;
pub use profile::{ClassTime, Profile};

/// Kernels of chunk work: the optimizer's step, norms, casts.
pub(crate) static CHUNK_KERNELS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/adam.cubin"));
