//! Each operation by itself on the host: its backward against finite differences of its forward, in fp32 and bf16, whole
//! and tiled. `tests/gpu` makes the same checks on a GPU.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

mod harness;

use candle_core::{DType, Device, Tensor};
use harness::definitions::{self, TAILS};
use harness::{Owned, Place, checks, constant, context, floats};
use patrickstar::Context;
use patrickstar::model::ops;
use patrickstar_actors::types::Precision;

/// Runs a check with either type of weights.
fn in_both(check: impl Fn(&Place)) {
    [Precision::Fp32, Precision::Bf16, Precision::Fp16].map(Place::host).iter().for_each(check);
}

#[test]
fn linear() {
    in_both(checks::linear);
}

/// Tokens, inner and outer width, each through the tails.
#[test]
fn results_are_what_definitions_say() {
    in_both(|place| {
        for s in TAILS {
            for sizes in [[s, 24, 10], [5, s, 7], [6, 16, s]] {
                definitions::linear(place, sizes);
                definitions::cross_entropy(place, sizes);
                definitions::embedding(place, sizes);
                definitions::positions(place, sizes);
            }
            for sizes in [[s, 24], [5, s]] {
                definitions::layer_norm(place, sizes);
            }
        }
    });
    for s in TAILS {
        definitions::gelu(&Place::host(Precision::Fp32), s);
        definitions::dropout(&Place::host(Precision::Fp32), s);
    }
}

#[test]
fn linear_with_a_residual() {
    in_both(checks::linear_add);
}

#[test]
fn linear_with_gelu() {
    in_both(checks::linear_gelu);
}

#[test]
fn layer_norm() {
    in_both(checks::layer_norm);
}

#[test]
fn gelu_in_both_forms() {
    checks::gelu(&Place::host(Precision::Fp32));
}

#[test]
fn attention() {
    checks::attention(&Place::host(Precision::Fp32), &[[2, 1, 1, 4], [2, 5, 3, 4], [1, 9, 2, 3]]);
}

#[test]
fn attention_sees_nothing_of_the_future() {
    let x = floats(&[1, 6, 24]);
    let later = Tensor::cat(&[&x.narrow(1, 0, 4).unwrap(), &(x.narrow(1, 4, 2).unwrap() + 3.0).unwrap()], 1).unwrap();
    let first = |x: &Tensor| {
        let out = ops::causal_attention(&constant(x), 2).unwrap().tensor().unwrap();
        out.narrow(1, 0, 4).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(first(&x), first(&later));
}

#[test]
fn embeddings() {
    in_both(checks::embeddings);
    in_both(checks::positions);
}

#[test]
fn cross_entropy() {
    in_both(checks::cross_entropy);
}

#[test]
fn sums_and_candle_functions() {
    checks::add(&Place::host(Precision::Fp32));
    checks::candle(&Place::host(Precision::Fp32));
}

#[test]
fn dropout() {
    checks::dropout(&Place::host(Precision::Fp32));
    let ones = Tensor::ones(100_000, DType::F32, &Device::Cpu).unwrap();
    let mask = |ctx: &Context, op| {
        ops::dropout(&constant(&ones), 0.3, ctx, op).unwrap().tensor().unwrap().to_vec1::<f32>().unwrap()
    };
    let (ctx, mut other) = (context(true), context(true));
    other.micro = 2;
    let first = mask(&ctx, 0);
    // The probability is a multiple of 2^-16, and the scale knows it.
    let scale = (65_536.0 / (65_536.0 - (0.3f64 * 65_536.0).round())) as f32;
    // The share kept lies within five standard deviations.
    let kept = first.iter().filter(|&&value| value != 0.0).count() as f64 / 1e5;
    assert!((kept - 0.7).abs() < 5.0 * (0.21f64 / 1e5).sqrt(), "{kept}");
    assert!(first.iter().all(|&value| value == 0.0 || value == scale));
    assert_eq!(first, mask(&ctx, 0), "recompute draws the same mask");
    assert!(first != mask(&ctx, 1) && first != mask(&other, 0), "operations and micro-batches have masks of their own");
    assert!(mask(&context(false), 0).iter().all(|&value| value == 1.0), "only training drops");
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let ctx = context(true);
    let mut owned = Owned::new("w", &[7, 5], Precision::Fp32);
    let (w, x) = (owned.param(), constant(&floats(&[2, 3, 4])));
    let ids = Tensor::from_vec(vec![7u32], (1, 1), &Device::Cpu).unwrap();
    let errors = [
        ops::linear(&x, &w, None),
        ops::layer_norm(&x, &w, &w, 1e-5),
        ops::causal_attention(&x, 3),
        ops::causal_attention(&x, 0),
        ops::embedding(&constant(&ids), &w),
        ops::positional_embedding(&x, &w),
        ops::linear_cross_entropy(&x, &w, &ids, &ctx),
        ops::dropout(&x, 1.0, &ctx, 0),
    ];
    for (index, result) in errors.into_iter().enumerate() {
        assert!(result.is_err(), "call {index} accepted a shape that does not fit");
    }
}
