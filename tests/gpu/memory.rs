//! The pool from which activations come: how much the loss head takes from it, that its cap holds, and what it keeps. There
//! is one for the process, so these tests run alone: `gpu --ignored --test-threads=1 memory::`.

use candle_core::Tensor;
use patrickstar::model::ops;
use patrickstar::model::tape::Tape;
use patrickstar_actors::cuda::PoolUse;
use patrickstar_actors::types::{Bytes, Precision};

use crate::compare::{HEAD, noise, targets};
use crate::harness::{Owned, Place, context};
use crate::{PRECISIONS, gpu, ops};

const MIB: u64 = 1 << 20;
/// Width of the input of the head: small, so that logits are nearly all that it needs.
const WIDTH: usize = 8;

/// Use of the pool when nothing is queued.
fn pool(place: &Place) -> PoolUse {
    place.compute.synchronize().unwrap();
    ops().gpu().pool_use().unwrap()
}

/// The most that loss and gradients took from the pool beside what was there before.
fn peak_of_the_head(place: &Place, tokens: usize, vocabulary: usize) -> u64 {
    let weights = noise(HEAD, vocabulary * WIDTH);
    let mut owned = [Owned::from_values(HEAD, &[vocabulary, WIDTH], place.precision, &weights)];
    let targets = targets(tokens, vocabulary);
    place.with_params(&mut owned, true, |params| {
        let tape = Tape::recording(&place.compute);
        let x = tape.input(place.tensor(&noise("x", tokens * WIDTH), &[tokens, WIDTH]));
        let before = pool(place).live.0;
        ops().gpu().reset_pool_peak().unwrap();
        let loss = ops::linear_cross_entropy(&x, &params[0], &targets, &context(true)).unwrap();
        let gradient = tape.backward(&loss, None, &x).unwrap();
        assert!(gradient.is_some(), "no gradient of the input");
        pool(place).peak.0 - before
    })
}

/// `ops::cross_entropy::tokens_per_block` allows 2^27 logits at once, of 4 bytes: 512 MiB. All logits of the larger sizes
/// are 2 GiB.
#[test]
#[ignore = "measures the pool of the process; run alone"]
fn the_loss_head_needs_no_more_memory_for_more_tokens_or_a_larger_vocabulary() {
    const BLOCK: u64 = 512 * MIB;
    for precision in PRECISIONS {
        let place = gpu(precision);
        // Neither what is kept for later nor what the first call sets up is the head's.
        place.compute.keep_buffers(Bytes(0)).unwrap();
        peak_of_the_head(&place, 128, 1 << 17);
        let small = peak_of_the_head(&place, 1024, 1 << 17);
        assert!(small >= BLOCK, "{small} bytes are less than the logits of {precision:?} that exist at once");
        for (tokens, vocabulary) in [(4096, 1 << 17), (1024, 1 << 19)] {
            let large = peak_of_the_head(&place, tokens, vocabulary);
            // Four times as many logits: 1.5 GiB more, if all of them existed. What does grow with tokens is a few bytes each.
            let what =
                format!("{tokens} tokens of {vocabulary} classes in {precision:?}: {large} bytes, {small} before");
            assert!(large <= small + 16 * MIB, "{what}");
            assert!(large <= BLOCK + 32 * MIB, "{what}");
        }
    }
}

/// A capped pool for as long as it lives, then one as large as the GPU.
pub struct Capped;

impl Capped {
    pub fn at(limit: Bytes) -> Self {
        ops().gpu().cap_pool(limit).unwrap();
        Capped
    }

    /// As large as the GPU: engines of a test cap it further, and tests that follow find it as they do without that one.
    pub fn by_the_gpu() -> Self {
        lift_cap();
        Capped
    }
}

impl Drop for Capped {
    fn drop(&mut self) {
        lift_cap();
    }
}

fn lift_cap() {
    let (_, total) = ops().gpu().context().mem_get_info().unwrap();
    ops().gpu().cap_pool(Bytes(total as u64)).unwrap();
}

/// An activation of so many bytes.
fn activation(place: &Place, bytes: u64) -> Tensor {
    let elements = (bytes / 4) as usize;
    place.tensor(&vec![1.0; elements], &[elements])
}

#[test]
#[ignore = "caps the pool of the process; run alone"]
fn an_activation_beyond_the_cap_is_an_error_that_says_what_to_do() {
    let place = gpu(Precision::Fp32);
    place.compute.keep_buffers(Bytes(0)).unwrap();
    let _capped = Capped::at(Bytes(64 * MIB));
    let double = |x: &Tensor| {
        let x = Tape::forgetting(&place.compute).constant(x.clone());
        ops::add(&x, &x).and_then(|sum| sum.tensor())
    };
    let within = activation(&place, 24 * MIB);
    let sum = double(&within).expect("two of 24 MiB fit into 64 MiB");
    let message = double(&within).expect_err("a third one fits into 64 MiB").to_string();
    for part in [format!("no {} left for an activation", Bytes(24 * MIB)), "lower train.batch".into()] {
        assert!(message.contains(&part), "`{message}` does not say `{part}`");
    }
    assert!(pool(&place).reserved.0 <= 64 * MIB);
    // There is room again when something goes.
    drop(sum);
    double(&within).expect("what was given back is there for the next");
}

#[test]
#[ignore = "looks at the pool of the process; run alone"]
fn memory_that_is_given_back_stays_reserved_until_the_pool_is_trimmed() {
    let place = gpu(Precision::Fp32);
    place.compute.keep_buffers(Bytes(0)).unwrap();
    let _capped = Capped::at(Bytes(256 * MIB));
    let taken = activation(&place, 100 * MIB);
    let with = pool(&place);
    assert!(with.live.0 >= 100 * MIB && with.reserved >= with.live, "{with:?}");
    drop(taken);
    // Waiting for the GPU is when a pool gives back what is beyond its threshold.
    let without = pool(&place);
    assert!(without.live.0 + 100 * MIB <= with.live.0, "{with:?}, then {without:?}");
    assert_eq!(without.reserved, with.reserved);
    ops().gpu().trim_pool(Bytes(0)).unwrap();
    let trimmed = pool(&place);
    assert!(trimmed.reserved.0 + 100 * MIB <= without.reserved.0, "{without:?}, then {trimmed:?}");
}
