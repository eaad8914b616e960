//! Every operation but attention on the GPU against the host's, over sizes that leave tails.

use candle_core::{DType, Device, Tensor};
use patrickstar::Context;
use patrickstar::model::ops;
use patrickstar::model::tape::Tape;
use patrickstar_actors::types::Precision;

use crate::compare::{
    HEAD, assert_same_bits, compare, compare_above, compare_places, ids, input, noise, representable, targets, whole,
};
use crate::harness::definitions::TAILS;
use crate::harness::near::{near, tolerance, wide};
use crate::harness::{Op, Owned, Place, context, floats_of};
use crate::{PRECISIONS, gpu, sizes};

/// Lengths of element-wise operations: tails, and around what a block takes.
const LENGTHS: [usize; 12] = [100_003, 1, 7, 31, 33, 127, 129, 1000, 2049, 8191, 8192, 8193];

/// Rows of a tile that leave a shorter one at the end; few enough tiles for a small parameter.
fn tile(rows: usize) -> usize {
    rows.div_ceil(3).max(1)
}

/// Tokens, inner and outer width, each through the tails.
fn product_sizes() -> Vec<[usize; 3]> {
    sizes(&TAILS).flat_map(|s| [[s, 64, 96], [33, s, 40], [31, 48, s]]).collect()
}

#[test]
fn linear() {
    for precision in PRECISIONS {
        for [tokens, inner, outer] in product_sizes() {
            let x = input(precision, &[tokens, inner]);
            for rows in [outer, tile(outer)] {
                let specs = [("w", vec![outer, inner], rows), whole("b", &[outer])];
                compare(precision, "linear", &x, &specs, 1, &|x, p, _| ops::linear(x, &p[0], Some(&p[1])));
            }
            let specs = [whole("w", &[outer, inner])];
            compare(precision, "linear without bias", &x, &specs, 1, &|x, p, _| ops::logits(x, &p[0]));
        }
    }
}

#[test]
fn linear_add() {
    for precision in PRECISIONS {
        for width in sizes(&TAILS) {
            let x = input(precision, &[2, 17, width]);
            for rows in [width, tile(width)] {
                let specs = [("w", vec![width, width], rows), whole("b", &[width])];
                // The gradient of `x` is a sum of two that were rounded.
                compare(precision, "linear_add", &x, &specs, 2, &|x, p, _| ops::linear_add(x, &p[0], Some(&p[1]), x));
            }
        }
    }
}

#[test]
fn linear_gelu() {
    for precision in PRECISIONS {
        for [tokens, inner, outer] in product_sizes() {
            let x = input(precision, &[tokens, inner]);
            for (form, rows) in [(ops::Gelu::Tanh, outer), (ops::Gelu::Erf, tile(outer))] {
                let specs = [("w", vec![outer, inner], rows), whole("b", &[outer])];
                // The argument of GELU is rounded, which moves value and derivative, and the gradient after it.
                let op: Op<'_> = &|x, p, _| ops::linear_gelu(x, &p[0], &p[1], form);
                compare(precision, "linear_gelu", &x, &specs, 4, op);
            }
        }
    }
}

#[test]
fn layer_norm() {
    for precision in PRECISIONS {
        let tails = sizes(&TAILS).flat_map(|s| [[s, 64], [33, s.max(2)]]);
        // Rows of a warp and of a block, and those that the backward keeps in one pack a thread, in two, and not at all;
        // so many rows that a block takes several of them.
        let widths =
            [[2500, 8], [1100, 2048], [600, 4096], [5, 4096], [300, 8192], [3, 12_289], [3, 16_384], [3, 20_000]];
        for [rows, width] in tails.chain(widths) {
            let (x, specs) = (input(precision, &[rows, width]), [whole("w", &[width]), whole("b", &[width])]);
            compare(precision, "layer norm", &x, &specs, 0, &|x, p, _| ops::layer_norm(x, &p[0], &p[1], 1e-5));
            let op: Op<'_> = &|x, p, _| ops::add(x, &ops::layer_norm(x, &p[0], &p[1], 1e-5)?);
            compare(precision, "layer norm beside a branch", &x, &specs, 1, op);
        }
    }
}

#[test]
fn gelu_in_both_forms() {
    for precision in PRECISIONS {
        for length in sizes(&LENGTHS) {
            let x = (input(precision, &[length]) * 3.0).unwrap();
            let x = x.to_dtype(gpu(precision).dtype()).unwrap().to_dtype(DType::F32).unwrap();
            // Far below zero both forms multiply the argument by a difference that is rounding alone.
            let largest = x.abs().and_then(|x| x.max(0)).and_then(|x| x.to_scalar::<f32>()).unwrap();
            let scale = (0, f64::from(largest));
            compare_above(precision, "tanh", &x, &[], scale, &|x, _, _| ops::gelu_tanh(x));
            compare_above(precision, "erf", &x, &[], scale, &|x, _, _| ops::gelu_erf(x));
            compare(precision, "erf beside a branch", &x, &[], 1, &|x, _, _| ops::add(x, &ops::gelu_erf(x)?));
        }
    }
}

#[test]
fn sums() {
    for precision in PRECISIONS {
        for length in sizes(&LENGTHS) {
            let x = input(precision, &[length]);
            compare(precision, "x + x", &x, &[], 0, &|x, _, _| ops::add(x, x));
            compare(precision, "x + (x + x)", &x, &[], 1, &|x, _, _| ops::add(x, &ops::add(x, x)?));
        }
    }
}

#[test]
fn candle_functions() {
    for precision in PRECISIONS {
        for length in sizes(&TAILS) {
            // candle rounds after every step.
            let op: Op<'_> = &|x, _, _| ops::candle(&[x, x], |inputs| inputs[0].sqr()? + inputs[1].tanh()?);
            compare(precision, "candle", &input(precision, &[3, length]), &[], 4, op);
        }
    }
}

/// Activations that begin in the middle of a tensor, at no multiple of anything.
#[test]
fn views_that_begin_anywhere() {
    fn later_rows(x: &patrickstar::Activation) -> candle_core::Result<patrickstar::Activation> {
        ops::candle(&[x], |inputs| inputs[0].narrow(0, 1, inputs[0].dim(0)? - 1))
    }
    for precision in PRECISIONS {
        for width in [1, 3, 31, 33, 130, 1001] {
            let x = input(precision, &[6, width]);
            compare(precision, "gelu of a view", &x, &[], 0, &|x, _, _| ops::gelu_tanh(&later_rows(x)?));
            compare(precision, "sum of views", &x, &[], 1, &|x, _, _| {
                let view = later_rows(x)?;
                ops::add(&view, &view)
            });
            compare(precision, "dropout of a view", &x, &[], 1, &|x, _, ctx| {
                ops::dropout(&later_rows(x)?, 0.3, ctx, 1)
            });
            let specs = [whole("w", &[7, width]), whole("b", &[7])];
            let op: Op<'_> = &|x, p, _| ops::linear(&later_rows(x)?, &p[0], Some(&p[1]));
            compare(precision, "linear of a view", &x, &specs, 1, op);
            if width > 1 {
                let specs = [whole("w", &[width]), whole("b", &[width])];
                let op: Op<'_> = &|x, p, _| ops::layer_norm(&later_rows(x)?, &p[0], &p[1], 1e-5);
                compare(precision, "layer norm of a view", &x, &specs, 0, op);
            }
        }
    }
}

#[test]
fn dropout_draws_the_bits_of_the_host() {
    let place = gpu(Precision::Fp32);
    for length in sizes(&LENGTHS) {
        for (p, op) in [(0.1, 0), (0.5, 3), (0.97, 255)] {
            let mut ctx = context(true);
            (ctx.micro, ctx.block) = (length, 7);
            let value = |place: &Place, x: &[f32]| {
                let tape = Tape::forgetting(&place.compute);
                let out = ops::dropout(&tape.constant(place.tensor(x, &[length])), p, &ctx, op).unwrap();
                // What is dropped is a zero of either sign; this makes it positive.
                floats_of(&out.tensor().unwrap()).into_iter().map(|value| value + 0.0).collect::<Vec<f32>>()
            };
            let (host, x) = (Place::host(Precision::Fp32), noise("x", length));
            let expected = value(&host, &x);
            let what = format!("dropout {p} of {length}");
            assert_same_bits(&what, &value(&place, &x), &expected);
            let ones = value(&host, &vec![1.0; length]);
            assert_same_bits(&what, &value(&place, &vec![1.0; length]), &ones);
            let narrow = value(&gpu(Precision::Bf16), &vec![1.0; length]);
            assert!(ones.iter().zip(&narrow).all(|(a, b)| (*a == 0.0) == (*b == 0.0)), "{what}: another mask in bf16");
            assert!(length < 1000 || ones.contains(&0.0) && ones.iter().any(|&one| one != 0.0), "{what}: no mask");
        }
    }
    for precision in PRECISIONS {
        let x = input(precision, &[2049]);
        compare(precision, "dropout", &x, &[], 0, &|x, _, ctx: &Context| ops::dropout(x, 0.3, ctx, 4));
        let op: Op<'_> = &|x, _, ctx| ops::add(x, &ops::dropout(x, 0.3, ctx, 4)?);
        compare(precision, "dropout beside a branch", &x, &[], 1, op);
    }
}

#[test]
fn embeddings() {
    for precision in PRECISIONS {
        for s in sizes(&TAILS) {
            // Few tokens have long runs of positions, many have short ones.
            for [tokens, vocabulary, width] in [[s, 50, 24], [1000, 7, s], [300, s, 40]] {
                for rows in [vocabulary, tile(vocabulary)] {
                    let specs = [("table", vec![vocabulary, width], rows)];
                    let op: Op<'_> = &|ids, p, _| ops::embedding(ids, &p[0]);
                    compare(precision, "embedding", &ids(tokens, vocabulary), &specs, 0, op);
                    compare_places(precision, "embedding", &ids(tokens, vocabulary), &specs, op);
                }
            }
        }
    }
}

#[test]
fn positions() {
    for precision in PRECISIONS {
        for s in sizes(&TAILS) {
            for [batch, time, width] in [[3, s, 24], [2, 7, s], [s, 5, 12]] {
                for rows in [time + 5, tile(time + 5)] {
                    let specs = [("positions", vec![time + 5, width], rows)];
                    let x = input(precision, &[batch, time, width]);
                    let op: Op<'_> = &|x, p, _| ops::positional_embedding(x, &p[0]);
                    compare(precision, "positions", &x, &specs, 0, op);
                    compare_places(precision, "positions", &x, &specs, op);
                }
            }
        }
    }
}

/// `blocks` of tokens each add to the gradient of the weight.
pub fn head(precision: Precision, [tokens, vocabulary, width]: [usize; 3], rows: usize, targets: &Tensor, blocks: u32) {
    let specs = [(HEAD, vec![vocabulary, width], rows)];
    let op: Op<'_> = &|x, p, ctx| ops::linear_cross_entropy(x, &p[0], targets, ctx);
    // The gradient of logits is rounded, and what a block has added.
    compare(precision, "cross-entropy", &input(precision, &[tokens, width]), &specs, blocks, op);
}

#[test]
fn cross_entropy() {
    for precision in PRECISIONS {
        for s in sizes(&TAILS) {
            for [tokens, vocabulary, width] in [[s, 50, 24], [33, s, 24], [31, 40, s]] {
                for rows in [vocabulary, tile(vocabulary)] {
                    head(precision, [tokens, vocabulary, width], rows, &targets(tokens, vocabulary), 1);
                }
            }
        }
        let ignored = Tensor::from_vec(vec![-100i64; 40], 40, &Device::Cpu).unwrap();
        head(precision, [40, 60, 16], 60, &ignored, 1);
    }
}

/// Rows that a block keeps wholly or in part, so many that it fetches the next while it works on one, and some that do
/// not count.
#[test]
fn cross_entropy_of_many_rows() {
    for precision in PRECISIONS {
        for vocabulary in sizes(&[61_001, 2049, 4097, 24_577, 50_257, 57_344]) {
            head(precision, [300, vocabulary, 8], vocabulary, &targets(300, vocabulary), 1);
        }
        let ignored = Tensor::from_vec(vec![-100i64; 150], 150, &Device::Cpu).unwrap();
        head(precision, [150, 5000, 16], 5000, &ignored, 1);
    }
}

/// So many classes that the logits of all tokens do not exist at once.
#[test]
fn cross_entropy_in_several_blocks() {
    for precision in PRECISIONS {
        let [tokens, vocabulary] = [1100, 131_073];
        head(precision, [tokens, vocabulary, 8], vocabulary, &targets(tokens, vocabulary), 2);
        head(precision, [tokens, vocabulary, 8], tile(vocabulary), &targets(tokens, vocabulary), 2);
    }
}

/// Without a backward the loss is the same and no gradient is touched.
pub fn loss_alone(precision: Precision, [tokens, vocabulary, width]: [usize; 3]) {
    let (x, targets) = (input(precision, &[tokens, width]), targets(tokens, vocabulary));
    let loss = |place: &Place| {
        let weights = representable(precision, HEAD, vocabulary * width);
        let mut owned = [Owned::from_values(HEAD, &[vocabulary, width], place.precision, &weights)];
        let loss = place.with_params(&mut owned, true, |params| {
            let x = Tape::forgetting(&place.compute).constant(place.tensor(&floats_of(&x), x.dims()));
            let loss = ops::linear_cross_entropy(&x, &params[0], &targets, &context(true));
            floats_of(&loss.and_then(|loss| loss.tensor()).unwrap())
        });
        assert!(owned[0].gradients().iter().all(|&gradient| gradient == 0.0), "a gradient without a backward");
        loss
    };
    let (got, want) = (loss(&gpu(precision)), loss(&Place::host(Precision::Fp32)));
    near("loss without gradients", &got, &wide(&want), tolerance(Precision::Fp32, 0));
}

#[test]
fn cross_entropy_without_gradients() {
    for precision in PRECISIONS {
        loss_alone(precision, [129, 1000, 40]);
    }
}
