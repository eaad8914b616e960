//! Custom operations that consume weights, each with its backward.
//!
//! Weights are fields of the operations, not inputs of the graph: `bwd` returns the gradient of the activation and
//! accumulates the weight's gradient straight into its chunk. Orders of summation never depend on how a parameter is
//! tiled over chunks or on the number of threads.

mod access;
mod attention;
mod cross_entropy;
mod dropout;
mod embedding;
mod gelu;
mod gemm;
mod layer_norm;
mod linear;

pub use attention::causal_attention;
pub use cross_entropy::linear_cross_entropy;
pub use dropout::dropout;
pub use embedding::{embedding, positional_embedding};
pub use gelu::{gelu_erf, gelu_tanh};
pub use layer_norm::layer_norm;
pub use linear::{linear, logits};
