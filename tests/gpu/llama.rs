//! The operations of LLaMA-like models on the GPU against the host's.

use patrickstar::Activation;
use patrickstar::model::ops::{self, Attention, Rope, Segments};
use patrickstar_actors::types::Precision;

use crate::compare::{compare, input, whole};
use crate::harness::Op;
use crate::harness::definitions::TAILS;
use crate::harness::masks::INNER;
use crate::{PRECISIONS, sizes};

pub fn check_rms_norm(precision: Precision, [rows, width]: [usize; 2]) {
    let (x, specs) = (input(precision, &[rows, width]), [whole("w", &[width])]);
    compare(precision, "RMS norm", &x, &specs, 0, &|x, p, _| ops::rms_norm(x, &p[0], 1e-5));
    let op: Op<'_> = &|x, p, _| ops::add(x, &ops::rms_norm(x, &p[0], 1e-5)?);
    compare(precision, "RMS norm beside a branch", &x, &specs, 1, op);
}

#[test]
fn rms_norm() {
    for precision in PRECISIONS {
        let tails = sizes(&TAILS).flat_map(|s| [[s, 64], [33, s.max(2)]]);
        for sizes in tails.chain([[2500, 8], [5, 4096], [3, 12_289]]) {
            check_rms_norm(precision, sizes);
        }
    }
}

pub fn check_swiglu(precision: Precision, [rows, width]: [usize; 2]) {
    let x = input(precision, &[rows, 2 * width]);
    compare(precision, "SwiGLU", &x, &[], 0, &|x, _, _| ops::swiglu(x));
}

#[test]
fn swiglu() {
    for precision in PRECISIONS {
        for width in sizes(&TAILS) {
            check_swiglu(precision, [9, width]);
        }
    }
}

/// Two query heads and one key head are rotated, the value head is not.
pub fn check_rope(precision: Precision, [time, head_dim, rotary_dim]: [usize; 3]) {
    for interleaved in [false, true] {
        let rope = Rope { heads: 3, head_dim, rotary_dim, theta: 10_000.0, interleaved };
        let x = input(precision, &[2, time, 4 * head_dim]);
        compare(precision, "rope", &x, &[], 0, &|x, _, _| ops::rope(x, &rope));
        let op: Op<'_> = &|x, _, _| ops::add(x, &ops::rope(x, &rope)?);
        compare(precision, "rope beside a branch", &x, &[], 1, op);
    }
}

#[test]
fn rope() {
    for precision in PRECISIONS {
        for sizes in [[1, 8, 8], [5, 16, 4], [300, 64, 64], [77, 80, 40], [33, 128, 128]] {
            check_rope(precision, sizes);
        }
    }
}

/// Rows and heads that begin at no multiple of 16 bytes, and halves of heads that end at none.
#[test]
fn rope_of_heads_that_are_not_aligned() {
    for precision in PRECISIONS {
        for sizes in [[33, 6, 6], [77, 10, 4], [9, 7, 2], [300, 33, 32], [5, 16, 12], [40, 20, 10]] {
            check_rope(precision, sizes);
        }
    }
}

/// Activations that begin in the middle of a tensor, at no multiple of anything.
#[test]
fn views_that_begin_anywhere() {
    for precision in PRECISIONS {
        for width in [2, 7, 32, 33, 130, 1001] {
            // Rows that would be aligned are not where the first is not.
            let view = |dims: &[usize]| {
                let dims = dims.to_vec();
                move |x: &Activation| view_from_second(x, &dims)
            };
            let of = |dims: &[usize]| input(precision, &[1 + dims.iter().product::<usize>()]);
            let (dims, later) = ([5, width], view(&[5, width]));
            let op: Op<'_> = &|x, p, _| ops::rms_norm(&later(x)?, &p[0], 1e-5);
            compare(precision, "RMS norm of a view", &of(&dims), &[whole("w", &[width])], 0, op);
            let (dims, later) = ([5, 2 * width], view(&[5, 2 * width]));
            compare(precision, "SwiGLU of a view", &of(&dims), &[], 0, &|x, _, _| ops::swiglu(&later(x)?));
            let (dims, later) = ([2, 5, 4 * width], view(&[2, 5, 4 * width]));
            for interleaved in [false, true] {
                let rotary_dim = width / 2 * 2;
                let rope = Rope { heads: 3, head_dim: width, rotary_dim, theta: 10_000.0, interleaved };
                compare(precision, "rope of a view", &of(&dims), &[], 0, &|x, _, _| ops::rope(&later(x)?, &rope));
            }
        }
    }
}

/// All elements but the first.
fn view_from_second(x: &Activation, dims: &[usize]) -> candle_core::Result<Activation> {
    let dims = dims.to_vec();
    ops::candle(&[x], move |inputs| {
        let elements = inputs[0].elem_count() - 1;
        inputs[0].narrow(0, 1, elements)?.reshape(&dims[..])
    })
}

/// Lengths that sum to `time`, cut at places that are no tile's.
fn lengths(time: usize, salt: usize) -> Vec<usize> {
    let mut left = time;
    let mut lengths = Vec::new();
    while left > 0 {
        let length = (1 + (lengths.len() * 37 + salt * 11) % 90).min(left);
        lengths.push(length);
        left -= length;
    }
    lengths
}

/// Whether it is causal, its window, and whether samples are packed.
type Mask = (bool, Option<usize>, bool);

pub fn check_attention(
    precision: Precision,
    [time, head]: [usize; 2],
    (heads, kv_heads): (usize, usize),
    (causal, window, packed): Mask,
) {
    let x = input(precision, &[2, time, (heads + 2 * kv_heads) * head]);
    let segments = packed.then(|| Segments::new(&[lengths(time, 1), lengths(time, 2)]).unwrap());
    let attention = Attention { heads, kv_heads, causal, window, segments };
    let name = format!("attention {heads}/{kv_heads}, causal {causal}, {window:?}, packed {packed}");
    compare(precision, &name, &x, &[], INNER, &|x, _, _| ops::attention(x, &attention));
}

#[test]
fn attention_with_shared_heads_windows_and_segments() {
    for precision in PRECISIONS {
        for (time, head) in [(1, 8), (40, 16), (129, 64), (300, 80), (257, 128), (70, 256)] {
            for (heads, kv_heads) in [(2, 2), (4, 2), (3, 1)] {
                for mask in [
                    (false, None, false),
                    (true, Some(17), false),
                    (false, Some(130), false),
                    (true, None, true),
                    (false, None, true),
                    (true, Some(9), true),
                ] {
                    check_attention(precision, [time, head], (heads, kv_heads), mask);
                }
            }
        }
    }
}
