//! Attention on the GPU against the host's, over every time to 300 and every width of a head that kernels take.

use patrickstar::model::ops::{self, Attention, Segments};
use patrickstar_actors::types::Precision;

use crate::compare::{compare, input};
use crate::harness::Op;
use crate::harness::masks::INNER;
use crate::{PRECISIONS, gpu, sizes};

pub fn check(precision: Precision, [batch, time, heads, head]: [usize; 4]) {
    let x = input(precision, &[batch, time, 3 * heads * head]);
    compare(precision, "attention", &x, &[], INNER, &|x, _, _| ops::causal_attention(x, heads));
}

/// Every time, with heads of a width that walks through all multiples of 8.
fn every_time(precision: Precision) {
    let times: Vec<usize> = (1..=300).collect();
    for time in sizes(&times) {
        check(precision, [1 + time % 2, time, 1 + time % 3, 8 * (1 + time * 7 % 32)]);
    }
}

/// Every width, at times around the kernels' tiles.
fn every_width(precision: Precision) {
    let widths: Vec<usize> = (1..=32).map(|width| 8 * width).collect();
    for head in sizes(&widths) {
        for time in [1, 64, 81, 129, 225, 257] {
            check(precision, [2, time, 2, head]);
        }
    }
}

#[test]
fn every_time_in_fp32() {
    every_time(Precision::Fp32);
}

#[test]
fn every_time_in_bf16() {
    every_time(Precision::Bf16);
}

#[test]
fn every_time_in_fp16() {
    every_time(Precision::Fp16);
}

#[test]
fn every_width_in_fp32() {
    every_width(Precision::Fp32);
    // fp32 also takes multiples of 4.
    for head in [4, 12, 68, 252] {
        check(Precision::Fp32, [1, 70, 2, head]);
    }
}

#[test]
fn every_width_in_bf16() {
    every_width(Precision::Bf16);
}

#[test]
fn every_width_in_fp16() {
    every_width(Precision::Fp16);
}

/// More tiles than the GPU has multiprocessors: blocks draw several.
#[test]
fn many_tiles_and_long_sequences() {
    for precision in PRECISIONS {
        check(precision, [1, 2049, 1, 64]);
        check(precision, [9, 300, 8, 64]);
        check(precision, [2, 1100, 3, 128]);
        for head in [136, 144, 192, 256] {
            check(precision, [9, 300, 8, head]);
            check(precision, [1, 1100, 2, head]);
        }
    }
}

/// Widths above 128 have tiles of their own.
#[test]
fn masks_of_wide_heads() {
    for precision in PRECISIONS {
        for (time, head) in [(225, 136), (300, 144), (257, 160), (337, 192), (161, 256)] {
            for (heads, kv_heads) in [(2, 2), (3, 1)] {
                let x = input(precision, &[2, time, (heads + 2 * kv_heads) * head]);
                for (causal, window, packed) in
                    [(false, None, false), (true, Some(17), false), (false, Some(130), true), (true, None, true)]
                {
                    let segments =
                        packed.then(|| Segments::new(&[vec![1, 70, time - 71], vec![time - 113, 113]]).unwrap());
                    let attention = Attention { heads, kv_heads, causal, window, segments };
                    let name = format!("attention {heads}/{kv_heads} of {head}, {causal}, {window:?}, packed {packed}");
                    compare(precision, &name, &x, &[], INNER, &|x, _, _| ops::attention(x, &attention));
                }
            }
        }
    }
}

/// Two gradients of one input.
#[test]
fn beside_a_branch() {
    let op: Op<'_> = &|x, _, _| ops::add(&ops::causal_attention(x, 2)?, &ops::causal_attention(x, 4)?);
    compare(Precision::Fp32, "attention twice", &input(Precision::Fp32, &[2, 50, 3 * 64]), &[], 1, op);
    compare(Precision::Bf16, "attention twice", &input(Precision::Bf16, &[2, 50, 3 * 64]), &[], INNER + 2, op);
}

#[test]
fn widths_without_a_kernel_are_errors() {
    use patrickstar::model::tape::Tape;
    for (precision, heads, packed) in
        [(Precision::Fp32, 1, 3 * 6), (Precision::Bf16, 1, 3 * 12), (Precision::Fp32, 1, 3 * 260)]
    {
        let place = gpu(precision);
        let x = Tape::forgetting(&place.compute).constant(place.tensor(&vec![0.0; packed], &[1, 1, packed]));
        let message = ops::causal_attention(&x, heads).err().expect("a width without a kernel").to_string();
        assert!(message.contains("model.heads"), "{message} does not say what to change");
    }
}
