//! The operations of LLaMA-like models on the host: each backward against finite differences of its forward, and each
//! forward against its definition in f64.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

mod harness;

use candle_core::{Device, Tensor};
use harness::checks::{self, ropes};
use harness::definitions::{self, TAILS};
use harness::masks::attentions;
use harness::near::{near, wide};
use harness::{Op, Owned, Place, constant, floats, floats_of, run};
use patrickstar::model::ops::{self, Attention, Rope, Segments};
use patrickstar_actors::types::Precision;

const PRECISIONS: [Precision; 2] = [Precision::Fp32, Precision::Bf16];

fn host() -> Place {
    Place::host(Precision::Fp32)
}

fn assert_error(result: candle_core::Result<patrickstar::Activation>, names: &str) {
    let message = result.err().expect("what does not fit is accepted").to_string();
    assert!(message.contains(names), "`{message}` does not name {names}");
}

#[test]
fn rms_norm() {
    PRECISIONS.map(Place::host).iter().for_each(checks::rms_norm);
}

#[test]
fn norms_add_to_gradients() {
    for place in PRECISIONS.map(Place::host) {
        checks::norms_add_to_gradients(&place, [6, 33]);
    }
}

#[test]
fn rms_norm_is_what_it_says() {
    for place in PRECISIONS.map(Place::host) {
        for width in TAILS {
            definitions::rms_norm(&place, [3, width]);
        }
    }
}

#[test]
fn swiglu() {
    checks::swiglu(&host());
}

#[test]
fn swiglu_is_what_it_says() {
    for width in TAILS {
        definitions::swiglu(&host(), [5, width]);
    }
    // Exponentials that leave the range of fp32 are no NaN.
    let far = Tensor::new(&[[-1e4f32, 1e4, 2.0, 3.0]], &Device::Cpu).unwrap();
    let (y, dx) = run(&host(), &far, &mut [], &|x, _, _| ops::swiglu(x));
    assert_eq!(y, [0.0, 3e4]);
    assert!(dx.iter().all(|value| value.is_finite()), "{dx:?}");
}

#[test]
fn rope() {
    checks::rope(&host());
}

#[test]
fn rope_is_what_it_says() {
    // Longer and shorter times than before, which a table is kept for.
    for time in [3, 700, 5] {
        for rope in ropes() {
            definitions::rope(&host(), time, 24, &rope);
        }
    }
}

#[test]
fn rope_leaves_its_input_alone() {
    let x = floats(&[1, 4, 24]);
    let before = floats_of(&x);
    let y = ops::rope(&constant(&x), &ropes()[0]).unwrap().tensor().unwrap();
    assert!(floats_of(&y) != before && floats_of(&x) == before);
}

#[test]
fn attention() {
    for attention in attentions(4) {
        checks::masked_attention(&host(), 2, 4, 3, &attention);
    }
    checks::attention_twice(&host(), 3);
}

#[test]
fn attention_is_what_it_says() {
    for time in [2, 3, 7, 33] {
        for attention in attentions(time) {
            definitions::attention(&host(), time, 5, &attention);
        }
    }
}

#[test]
fn packed_samples_do_not_see_each_other() {
    let attention = Attention { segments: Some(Segments::new(&[[3, 4]]).unwrap()), ..Attention::causal(2) };
    let (x, alone) = (floats(&[1, 7, 24]), Attention::causal(2));
    let values = |x: &Tensor, attention: &Attention| {
        floats_of(&ops::attention(&constant(x), attention).unwrap().tensor().unwrap())
    };
    let packed = values(&x, &attention);
    let second = x.narrow(1, 3, 4).unwrap().contiguous().unwrap();
    near("the second sample", &packed[3 * 8..], &wide(&values(&second, &alone)), definitions::within(&host(), 0));
}

/// The general operation has the bits of the causal one, and masks that hide nothing change none.
#[test]
fn masks_that_hide_nothing_change_no_bit() {
    let x = floats(&[2, 9, 3 * 8]);
    let plain = run(&host(), &x, &mut [], &|x, _, _| ops::causal_attention(x, 2));
    let segments = Some(Segments::new(&[[9], [9]]).unwrap());
    let masked = Attention { window: Some(9), segments, ..Attention::causal(2) };
    assert_eq!(plain, run(&host(), &x, &mut [], &|x, _, _| ops::attention(x, &masked)));
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let grouped = Attention { kv_heads: 1, window: Some(20), ..Attention::causal(4) };
    let rope = Rope { heads: 5, head_dim: 8, rotary_dim: 8, theta: 1e4, interleaved: false };
    let outcome = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut owned = [Owned::new("w", &[48], Precision::Fp32)];
            let op: Op<'_> = &|x, p, _| {
                let normed = ops::rms_norm(x, &p[0], 1e-5)?;
                ops::swiglu(&ops::attention(&ops::rope(&normed, &rope)?, &grouped)?)
            };
            let (y, dx) = run(&host(), &floats(&[3, 65, 48]), &mut owned, op);
            (y, dx, owned[0].gradients())
        })
    };
    assert_eq!(outcome(1), outcome(3));
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let mut owned = Owned::new("w", &[5], Precision::Fp32);
    let (w, x) = (owned.param(), constant(&floats(&[2, 3, 12])));
    let rows = constant(&floats(&[3, 12]));
    assert_error(ops::rms_norm(&x, &w, 1e-5), "`w` has shape [5]");
    assert_error(ops::swiglu(&constant(&floats(&[2, 3]))), "[2, 3]");

    let good = Rope { heads: 3, head_dim: 4, rotary_dim: 4, theta: 1e4, interleaved: false };
    assert!(ops::rope(&x, &good).is_ok());
    assert_error(ops::rope(&rows, &good), "(batch, time, columns)");
    assert_error(ops::rope(&x, &Rope { heads: 4, ..good }), "4 heads of 4 elements");
    assert_error(ops::rope(&x, &Rope { heads: 0, ..good }), "0 heads");
    assert_error(ops::rope(&x, &Rope { rotary_dim: 3, ..good }), "3 elements");
    assert_error(ops::rope(&x, &Rope { rotary_dim: 6, ..good }), "6 elements");
    assert_error(ops::rope(&x, &Rope { theta: 0.0, ..good }), "base 0");

    let good = Attention { kv_heads: 1, ..Attention::causal(2) };
    assert!(ops::attention(&x, &good).is_ok());
    assert_error(ops::attention(&rows, &good), "(batch, time");
    assert_error(ops::attention(&x, &Attention { kv_heads: 0, ..good.clone() }), "0 heads of keys");
    assert_error(ops::attention(&x, &Attention { heads: 3, kv_heads: 2, ..good.clone() }), "3 heads");
    assert_error(ops::attention(&x, &Attention::causal(5)), "12 columns");
    assert_error(ops::attention(&x, &Attention { window: Some(0), ..good.clone() }), "window of 0");
    let segments = |lengths: &[Vec<usize>]| Some(Segments::new(lengths).unwrap());
    let short = segments(&[vec![1, 1], vec![2]]);
    assert_error(ops::attention(&x, &Attention { segments: short, ..good.clone() }), "2 sequences of 2 tokens");
    let few = segments(&[vec![3]]);
    assert_error(ops::attention(&x, &Attention { segments: few, ..good }), "1 sequences of 3 tokens");
}
