//! The operations on the host: all cores, activations in fp32.
//!
//! Orders of summation never depend on how a parameter is tiled over chunks or on the number of threads.

mod access;
mod attention;
mod cross_entropy;
mod dropout;
mod elementwise;
mod embedding;
mod gelu;
mod gemm;
mod layer_norm;
mod linear;
mod rms_norm;
mod rope;
mod swiglu;

pub(super) use attention::{attend, attend_backward};
pub(super) use cross_entropy::linear_cross_entropy;
pub(super) use dropout::dropout;
pub(super) use elementwise::sum;
pub(super) use embedding::{embedding_backward, embedding_forward, positions_backward, positions_forward};
pub(super) use gelu::{gelu_backward, gelu_backward_bias, gelu_forward};
pub(super) use layer_norm::{layer_norm_backward, layer_norm_forward};
pub(super) use linear::{linear_backward_input, linear_backward_weight, linear_forward};
pub(super) use rms_norm::{rms_norm_backward, rms_norm_forward};
pub(super) use rope::rope;
pub(super) use swiglu::{swiglu_backward, swiglu_forward};
