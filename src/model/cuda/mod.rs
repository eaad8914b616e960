//! The operations on an NVIDIA GPU: own kernels for what moves memory, cuBLASLt for products, tensors by candle.
//!
//! Everything is queued on one stream, in the order of the calls; nothing here waits for the GPU but what adds to a gradient
//! in host memory. Sums have a fixed
//! order, so results have the same bits in every run.

mod activation;
mod attention;
mod buffers;
mod capture;
mod cross_entropy;
mod draw;
mod embedding;
mod linear;
mod lookup;
mod matmul;
mod norm;
mod ops;
mod pace;
mod replay;
mod rope;
mod staging;
mod tensor_map;

pub(crate) use cross_entropy::LogitRows;
pub(crate) use draw::{Run, Target};
pub(crate) use embedding::dtype_of;
pub use ops::CudaOps;
