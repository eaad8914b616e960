//! The optimizer's arithmetic: Adam and AdamW in f32, with the same bits on every instruction set.
//!
//! The update is PyTorch's single-tensor Adam with one rounding per operation in a written order: round-to-nearest
//! add, multiply, divide and square root, never a fused multiply-add. Those four are exactly defined by IEEE 754, so
//! any vector width, and a GPU built without contraction, gives the same result. (PyTorch's own vector code fuses some
//! of these operations, and so agrees with this to rounding only.) The one freedom left is the payload of a NaN.
//!
//! - [`scalars`](StepScalars): what is computed once on the host, in f64.
//! - [`fp16`](narrow_fp16): fp16 and back.
//! - [`split`](split_f32): an fp32 weight as a bf16 weight and 16 low bits.
//! - [`update`](step_fp32): the step itself, for each instruction set.
//! - [`norm`](sum_of_squares): sums of squares in a fixed order.

mod fp16;
mod norm;
mod scalars;
mod split;
mod update;

#[cfg(test)]
mod tests;

pub use fp16::{narrow_fp16, widen_fp16};
pub use norm::{sum_of_squares, sum_of_squares_bf16, sum_of_squares_fp16};
pub use scalars::{AdamConfig, StepScalars};
pub use split::{join, split_f32};
pub use update::{Isa, step_bf16, step_bf16_with, step_fp16, step_fp16_with, step_fp32, step_fp32_with};

/// Elements a caller hands to one thread at a time: 1.75 MiB of fp32 state, small enough that every core gets work in
/// the last chunk of a step and large enough that starting a task costs nothing.
pub const PIECE: usize = 1 << 16;
