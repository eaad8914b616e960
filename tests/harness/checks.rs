//! The derivatives of each operation, wherever it runs.

use candle_core::{DType, Device, Tensor};
use patrickstar::model::ops::{self, Attention, Rope};

use super::masks::packed_width;
use super::near::{near, tolerance, wide};
use super::{Op, Owned, Place, check, floats, random, run};

pub fn linear(place: &Place) {
    let new = |name, shape: &[usize]| Owned::new(name, shape, place.precision);
    for rows_per_tile in [7, 2] {
        let mut owned = [new("w", &[7, 5]).tiled(rows_per_tile), new("b", &[7])];
        check(place, "linear", &floats(&[2, 3, 5]), &mut owned, 1e-3, &|x, p, _| ops::linear(x, &p[0], Some(&p[1])));
    }
    let mut owned = [new("w", &[7, 5])];
    check(place, "linear without bias", &floats(&[3, 5]), &mut owned, 1e-3, &|x, p, _| ops::linear(x, &p[0], None));
}

/// Input and residual are the same tensor, so that its gradient has two parts.
pub fn linear_add(place: &Place) {
    let new = |name, shape: &[usize]| Owned::new(name, shape, place.precision);
    for rows_per_tile in [5, 2] {
        let mut owned = [new("w", &[5, 5]).tiled(rows_per_tile), new("b", &[5])];
        let op: Op<'_> = &|x, p, _| ops::linear_add(x, &p[0], Some(&p[1]), x);
        check(place, "linear_add", &floats(&[2, 3, 5]), &mut owned, 1e-3, op);
    }
    let mut owned = [new("w", &[5, 5])];
    let op: Op<'_> = &|x, p, _| ops::linear_add(x, &p[0], None, x);
    check(place, "linear_add without bias", &floats(&[3, 5]), &mut owned, 1e-3, op);
}

pub fn linear_gelu(place: &Place) {
    let new = |name, shape: &[usize]| Owned::new(name, shape, place.precision);
    for form in [ops::Gelu::Tanh, ops::Gelu::Erf] {
        for rows_per_tile in [7, 2] {
            let mut owned = [new("w", &[7, 5]).tiled(rows_per_tile), new("b", &[7])];
            let op: Op<'_> = &|x, p, _| ops::linear_gelu(x, &p[0], &p[1], form);
            check(place, "linear_gelu", &floats(&[2, 3, 5]), &mut owned, 2e-3, op);
        }
    }
}

pub fn layer_norm(place: &Place) {
    for width in [5, 16, 33] {
        let mut owned = ["w", "b"].map(|name| Owned::new(name, &[width], place.precision));
        let op: Op<'_> = &|x, p, _| ops::layer_norm(x, &p[0], &p[1], 1e-5);
        check(place, "layer norm", &floats(&[2, 3, width]), &mut owned, 2e-3, op);
    }
}

pub fn rms_norm(place: &Place) {
    for width in [5, 16, 33] {
        let mut owned = [Owned::new("w", &[width], place.precision)];
        let op: Op<'_> = &|x, p, _| ops::rms_norm(x, &p[0], 1e-5);
        check(place, "RMS norm", &floats(&[2, 3, width]), &mut owned, 2e-3, op);
        let op: Op<'_> = &|x, p, _| ops::add(x, &ops::rms_norm(x, &p[0], 1e-5)?);
        owned[0].gradient.fill(0);
        check(place, "RMS norm beside a branch", &floats(&[4, width]), &mut owned, 2e-3, op);
    }
}

/// Backwards of norms add to the gradients that are there, whatever way their kernels take.
pub fn norms_add_to_gradients(place: &Place, [rows, width]: [usize; 2]) {
    let layer: Op<'_> = &|x, p, _| ops::layer_norm(x, &p[0], &p[1], 1e-5);
    let rms: Op<'_> = &|x, p, _| ops::rms_norm(x, &p[0], 1e-5);
    for (name, op, vectors) in [("layer norm", layer, &["w", "b"][..]), ("RMS norm", rms, &["w"])] {
        let mut owned: Vec<Owned> = vectors.iter().map(|name| Owned::new(name, &[width], place.precision)).collect();
        let x = floats(&[rows, width]);
        run(place, &x, &mut owned, op);
        let alone: Vec<Vec<f32>> = owned.iter().map(Owned::gradients).collect();
        let earlier = |owned: &mut Owned| owned.begin_with(&random("earlier", width));
        let earlier: Vec<Vec<f32>> = owned.iter_mut().map(earlier).collect();
        run(place, &x, &mut owned, op);
        for ((owned, alone), earlier) in owned.iter().zip(&alone).zip(&earlier) {
            let sums = wide(alone).into_iter().zip(wide(earlier)).map(|(alone, earlier)| alone + earlier);
            let what = format!("{name} of {rows} x {width}, {}: what was added to a gradient", owned.name);
            // What is added and the sum were each rounded.
            near(&what, &owned.gradients(), &sums.collect::<Vec<_>>(), tolerance(place.precision, 1));
        }
    }
}

pub fn swiglu(place: &Place) {
    for width in [1, 4, 33] {
        let x = (floats(&[2, 3, 2 * width]) * 3.0).unwrap();
        check(place, "SwiGLU", &x, &mut [], 1e-3, &|x, _, _| ops::swiglu(x));
    }
    let op: Op<'_> = &|x, _, _| ops::add(&ops::swiglu(x)?, &ops::swiglu(&ops::add(x, x)?)?);
    check(place, "SwiGLU of a branch", &floats(&[3, 10]), &mut [], 1e-3, op);
}

/// Queries and keys of 2 and 1 heads of 6 elements; what is behind them stays.
pub fn ropes() -> Vec<Rope> {
    let mut ropes = Vec::new();
    for interleaved in [false, true] {
        for rotary_dim in [6, 4, 2] {
            ropes.push(Rope { heads: 3, head_dim: 6, rotary_dim, theta: 100.0, interleaved });
        }
    }
    ropes
}

pub fn rope(place: &Place) {
    for rope in ropes() {
        check(place, "rope", &floats(&[2, 5, 24]), &mut [], 1e-3, &|x, _, _| ops::rope(x, &rope));
        let op: Op<'_> = &|x, _, _| ops::add(x, &ops::rope(x, &rope)?);
        check(place, "rope beside a branch", &floats(&[1, 3, 18]), &mut [], 1e-3, op);
    }
}

pub fn gelu(place: &Place) {
    let x = (floats(&[64]) * 4.0).unwrap();
    check(place, "tanh", &x, &mut [], 1e-3, &|x, _, _| ops::gelu_tanh(x));
    check(place, "erf", &x, &mut [], 1e-3, &|x, _, _| ops::gelu_erf(x));
}

/// Sizes are (batch, time, heads, elements of a head).
pub fn attention(place: &Place, sizes: &[[usize; 4]]) {
    for &[batch, time, heads, head] in sizes {
        let x = floats(&[batch, time, 3 * heads * head]);
        check(place, "attention", &x, &mut [], 2e-3, &|x, _, _| ops::causal_attention(x, heads));
    }
}

/// Sequences of `time` tokens, for masks that fit them.
pub fn masked_attention(place: &Place, sequences: usize, time: usize, head: usize, attention: &Attention) {
    let x = floats(&[sequences, time, packed_width(attention, head)]);
    let name = format!("attention, {attention:?}");
    check(place, &name, &x, &mut [], 2e-3, &|x, _, _| ops::attention(x, attention));
}

pub fn attention_twice(place: &Place, head: usize) {
    let grouped = Attention { kv_heads: 1, ..Attention::causal(2) };
    let op: Op<'_> = &|x, _, _| ops::add(&ops::attention(x, &grouped)?, &ops::attention(x, &grouped)?);
    check(place, "attention twice", &floats(&[1, 5, 4 * head]), &mut [], 2e-3, op);
}

pub fn embeddings(place: &Place) {
    let ids = Tensor::from_vec(vec![0u32, 3, 3, 9, 1, 3], (2, 3), &Device::Cpu).unwrap();
    for rows_per_tile in [10, 4] {
        let mut owned = [Owned::new("table", &[10, 4], place.precision).tiled(rows_per_tile)];
        check(place, "embedding", &ids, &mut owned, 1e-3, &|ids, p, _| ops::embedding(ids, &p[0]));
    }
}

pub fn positions(place: &Place) {
    for rows_per_tile in [6, 4] {
        let mut owned = [Owned::new("positions", &[6, 4], place.precision).tiled(rows_per_tile)];
        let op: Op<'_> = &|x, p, _| ops::positional_embedding(x, &p[0]);
        check(place, "positions", &floats(&[2, 5, 4]), &mut owned, 1e-3, op);
    }
}

pub fn cross_entropy(place: &Place) {
    let targets = Tensor::from_vec(vec![0i64, 6, -100, 3, 10, 6], (2, 3), &Device::Cpu).unwrap();
    for rows_per_tile in [11, 4] {
        let mut owned = [Owned::new("head", &[11, 5], place.precision).tiled(rows_per_tile)];
        let op: Op<'_> = &|x, p, ctx| ops::linear_cross_entropy(x, &p[0], &targets, ctx);
        check(place, "cross-entropy", &floats(&[2, 3, 5]), &mut owned, 2e-3, op);
    }
}

pub fn dropout(place: &Place) {
    check(place, "dropout", &floats(&[300]), &mut [], 1e-3, &|x, _, ctx| ops::dropout(x, 0.3, ctx, 4));
}

/// A tensor added to itself and to its GELU: gradients of several branches meet.
pub fn add(place: &Place) {
    let op: Op<'_> = &|x, _, _| ops::add(&ops::add(x, x)?, &ops::gelu_tanh(x)?);
    check(place, "add", &floats(&[3, 33]), &mut [], 1e-3, op);
}

pub fn candle(place: &Place) {
    let op: Op<'_> = &|x, _, _| ops::candle(&[x, x], |inputs| (inputs[0].sqr()? * 0.5)? + inputs[1].tanh()?);
    check(place, "candle", &floats(&[3, 17]), &mut [], 1e-3, op);
    // A reduction, whose gradient candle broadcasts.
    let op: Op<'_> = &|x, _, _| ops::candle(&[x], |inputs| inputs[0].broadcast_mul(&inputs[0].sum_keepdim(1)?));
    let small = (floats(&[3, 5]) * 0.5).unwrap().to_dtype(DType::F32).unwrap();
    check(place, "candle with a reduction", &small, &mut [], 2e-3, op);
}
