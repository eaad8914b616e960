//! The pool from which activations come: how much the loss head takes from it. There is one for the process, so these tests
//! run alone: `gpu --ignored --test-threads=1 memory::`.

use patrickstar::model::ops;
use patrickstar::model::tape::Tape;
use patrickstar_actors::cuda::PoolUse;
use patrickstar_actors::types::Bytes;

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
