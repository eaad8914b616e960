//! Every kernel that shares memory among threads without plain barriers, once, at the smallest size that takes all of its
//! ways: for a checker of races, under which the other tests of these kernels would take hours.

use patrickstar_actors::types::Precision;

use crate::attention;
use crate::compare::targets;
use crate::kernels::head;

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

// A kernel of its own each, but for 40, which leaves some of the columns of 64 out.
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
