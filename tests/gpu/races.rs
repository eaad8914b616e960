//! Every kernel that shares memory among threads without plain barriers, once, at the smallest size that takes all of its
//! ways: for a checker of races, under which the other tests of these kernels would take hours.

use patrickstar_actors::types::Precision;

use crate::compare::targets;
use crate::kernels::{head, loss_alone};
use crate::{attention, llama};

/// Several tiles of queries and keys, the last of them cut.
const TIME: usize = 257;

macro_rules! widths {
    ($($name:ident: $width:literal,)*) => {
        $(
            #[test]
            fn $name() {
                attention::check(Precision::Bf16, [2, TIME, 2, $width]);
            }
        )*
    };
}

// A kernel of its own each, but for 40 and 80, which leave some of the columns of 64 and 96 out.
widths! {
    attention_of_40: 40,
    attention_of_64: 64,
    attention_of_80: 80,
    attention_of_96: 96,
    attention_of_128: 128,
    attention_of_144: 144,
    attention_of_192: 192,
    attention_of_256: 256,
}

#[test]
fn attention_in_fp32() {
    attention::check(Precision::Fp32, [1, TIME, 1, 64]);
}

#[test]
fn attention_in_fp16() {
    attention::check(Precision::Fp16, [1, TIME, 1, 64]);
}

#[test]
fn attention_with_shared_heads_a_window_and_segments() {
    llama::check_attention(Precision::Bf16, [TIME, 64], (4, 2), (true, Some(100), true));
    llama::check_attention(Precision::Bf16, [TIME, 64], (2, 1), (false, None, false));
    llama::check_attention(Precision::Fp32, [129, 16], (2, 1), (true, Some(100), true));
}

/// Rows of a warp and of a block, aligned and not, and so many rows that blocks take several.
#[test]
fn rms_norm() {
    for sizes in [[600, 64], [5, 4096], [3, 8200], [5, 1001]] {
        llama::check_rms_norm(Precision::Bf16, sizes);
    }
    llama::check_rms_norm(Precision::Fp32, [5, 4100]);
}

#[test]
fn swiglu() {
    llama::check_swiglu(Precision::Bf16, [70, 264]);
    llama::check_swiglu(Precision::Bf16, [3, 33]);
}

#[test]
fn rope() {
    llama::check_rope(Precision::Bf16, [9, 64, 32]);
    llama::check_rope(Precision::Bf16, [9, 10, 6]);
}

/// As an evaluation has it.
#[test]
fn cross_entropy_without_gradients() {
    loss_alone(Precision::Bf16, [20, 2056, 8]);
    loss_alone(Precision::Bf16, [20, 601, 8]);
}

/// More rows than are worked on at once, kept wholly and in part.
#[test]
fn cross_entropy_of_wide_rows() {
    for vocabulary in [2056, 58_000] {
        let tokens = if vocabulary < 10_000 { 300 } else { 140 };
        head(Precision::Bf16, [tokens, vocabulary, 8], vocabulary, &targets(tokens, vocabulary), 1);
    }
}

#[test]
fn cross_entropy_of_narrow_rows() {
    head(Precision::Bf16, [70, 600, 8], 600, &targets(70, 600), 1);
}
