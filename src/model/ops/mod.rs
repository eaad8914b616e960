//! The operations of blocks, each with its backward, on every backend.
//!
//! Weights are not on the tape: an operation's backward adds the weight's gradient straight to its chunk and returns the
//! gradient of the activation. Orders of summation never depend on how a parameter is tiled over chunks.

/// Calls the function of the same name of the backend.
macro_rules! on {
    ($compute:expr, $name:ident($($arg:expr),* $(,)?)) => {
        match $compute {
            $crate::model::compute::Compute::Cpu => super::cpu::$name($($arg),*),
            #[cfg(feature = "cuda")]
            $crate::model::compute::Compute::Cuda(ops) => ops.$name($($arg),*),
        }
    };
}

mod add;
mod attention;
mod candle;
mod cpu;
pub(crate) mod cross_entropy;
mod dropout;
pub(crate) mod embedding;
pub(crate) mod gelu;
mod later;
mod layer_norm;
mod linear;
pub(crate) mod lookup;
mod rms_norm;
mod rope;
pub(crate) mod swiglu;

pub use add::add;
pub(crate) use add::sum;
pub use attention::{Attention, Segments, attention, causal_attention};
pub use candle::candle;
pub use cross_entropy::{IGNORE_INDEX, linear_cross_entropy};
pub use dropout::dropout;
pub use embedding::{embedding, positional_embedding};
pub use gelu::{Gelu, gelu_erf, gelu_tanh};
pub use layer_norm::layer_norm;
pub use linear::{linear, linear_add, linear_gelu, logits};
pub use rms_norm::rms_norm;
pub use rope::{Rope, rope};
pub use swiglu::swiglu;
