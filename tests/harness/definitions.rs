//! The results of operations by their definitions, in f64 and one number after another, wherever the operations run.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use candle_core::{Device, Tensor};
use patrickstar::model::ops::{self, Attention, Gelu, Rope};
use patrickstar::model::rng::Mask;
use patrickstar_actors::types::Precision;

use super::masks::{self, packed_width};
use super::near::{EXACT, Tolerance, near, near_above, tolerance, wide};
use super::{Op, Owned, Place, context, floats, floats_of, outputs, put, run, upstream};

/// Distances at which sums and elements are cut into threads, packs and tiles, one less and one more.
pub const TAILS: [usize; 8] = [1, 7, 31, 33, 127, 129, 1000, 2049];

/// The result, from the numbers of the input and of the parameters as they are stored.
type Definition<'a> = &'a dyn Fn(&[f64], &[Vec<f64>]) -> Vec<f64>;

/// What `inner` roundings of terms allow; the host computes in fp32 whatever weights are stored as.
pub fn within(place: &Place, inner: u32) -> Tolerance {
    if place.is_host() { Tolerance { relative: 1e-6, absolute: 1e-6 } } else { tolerance(place.precision, inner) }
}

fn check(
    place: &Place,
    name: &str,
    x: &Tensor,
    owned: &mut [Owned],
    tolerance: Tolerance,
    op: Op<'_>,
    define: Definition<'_>,
) {
    let values = wide(&floats_of(&put(place, x)));
    let weights: Vec<Vec<f64>> = owned.iter().map(|owned| wide(&owned.weights())).collect();
    let (got, _) = outputs(place, x, owned, op);
    let what = format!("{name} of {:?} in {:?}", x.dims(), place.precision);
    near(&what, &got, &define(&values, &weights), tolerance);
}

/// `x Wᵀ`, both with rows of `inner` elements.
fn product(x: &[f64], w: &[f64], inner: usize) -> Vec<f64> {
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum();
    x.chunks(inner).flat_map(|x| w.chunks(inner).map(move |w| dot(x, w))).collect()
}

/// Adds a vector to each row.
fn plus(mut rows: Vec<f64>, vector: &[f64]) -> Vec<f64> {
    rows.chunks_mut(vector.len()).for_each(|row| row.iter_mut().zip(vector).for_each(|(value, more)| *value += more));
    rows
}

/// Tokens, inner and outer width.
pub fn linear(place: &Place, [tokens, inner, outer]: [usize; 3]) {
    let new = |name, shape: &[usize]| Owned::new(name, shape, place.precision);
    let x = floats(&[tokens, inner]);
    let argument = |x: &[f64], w: &[Vec<f64>]| plus(product(x, &w[0], inner), &w[1]);
    for rows_per_tile in [outer, outer.div_ceil(3)] {
        let mut owned = [new("w", &[outer, inner]).tiled(rows_per_tile), new("b", &[outer])];
        let op: Op<'_> = &|x, p, _| ops::linear(x, &p[0], Some(&p[1]));
        // A library may round a product before it adds to it.
        check(place, "linear", &x, &mut owned, within(place, 1), op, &argument);
        let op: Op<'_> = &|x, p, _| ops::linear(x, &p[0], None);
        let define: Definition<'_> = &|x, w| product(x, &w[0], inner);
        check(place, "linear without bias", &x, &mut owned[..1], within(place, 1), op, define);
        for form in [Gelu::Tanh, Gelu::Erf] {
            let op: Op<'_> = &|x, p, _| ops::linear_gelu(x, &p[0], &p[1], form);
            let define: Definition<'_> = &|x, w| argument(x, w).into_iter().map(|u| gelu_of(form, u)).collect();
            // GELU gets its argument rounded, and is nowhere steeper than 1.13.
            check(place, "linear_gelu", &x, &mut owned, within(place, 3), op, define);
        }
    }
    let mut owned = [new("w", &[inner, inner]).tiled(inner.div_ceil(3)), new("b", &[inner])];
    let op: Op<'_> = &|x, p, _| ops::linear_add(x, &p[0], Some(&p[1]), x);
    let define: Definition<'_> = &|x, w| {
        let rows = plus(product(x, &w[0], inner), &w[1]);
        rows.into_iter().zip(x).map(|(row, x)| row + x).collect()
    };
    check(place, "linear_add", &x, &mut owned, within(place, 2), op, define);
}

/// By a series of positive terms, in which nothing cancels.
fn erf(x: f64) -> f64 {
    let square = x * x;
    let (mut term, mut sum, mut odd) = (x, x, 1.0);
    while term.abs() > sum.abs() * 1e-18 {
        odd += 2.0;
        term *= 2.0 * square / odd;
        sum += term;
    }
    2.0 / PI.sqrt() * (-square).exp() * sum
}

fn gelu_of(form: Gelu, x: f64) -> f64 {
    let inside = match form {
        Gelu::Tanh => ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh(),
        // It is 1 to the last bit long before the series would overflow.
        Gelu::Erf => erf((x * FRAC_1_SQRT_2).clamp(-7.0, 7.0)),
    };
    x / 2.0 * (1.0 + inside)
}

pub fn gelu(place: &Place, length: usize) {
    let x = (floats(&[length]) * 4.0).unwrap();
    for form in [Gelu::Tanh, Gelu::Erf] {
        let op: Op<'_> = &|x, _, _| match form {
            Gelu::Tanh => ops::gelu_tanh(x),
            Gelu::Erf => ops::gelu_erf(x),
        };
        let values = wide(&floats_of(&put(place, &x)));
        let want: Vec<f64> = values.iter().map(|&x| gelu_of(form, x)).collect();
        let (got, _) = outputs(place, &x, &mut [], op);
        // Far below zero both forms multiply the argument by a difference that is rounding alone.
        let scale = values.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        near_above(&format!("{form:?} of {length} in {:?}", place.precision), &got, &want, within(place, 0), scale);
    }
}

/// An eps that a wrong place for it would show.
const EPS: f64 = 0.1;

pub fn layer_norm(place: &Place, [rows, width]: [usize; 2]) {
    // A mean far from zero shows a variance that is a difference of large numbers.
    for shift in [0.0, 30.0] {
        let mut owned = ["w", "b"].map(|name| Owned::new(name, &[width], place.precision));
        let op: Op<'_> = &|x, p, _| ops::layer_norm(x, &p[0], &p[1], EPS);
        let normed = |row: &[f64], w: &[Vec<f64>]| {
            let mean = row.iter().sum::<f64>() / width as f64;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let scaled = row.iter().zip(&w[0]).map(|(x, w)| (x - mean) / (variance + EPS).sqrt() * w);
            plus(scaled.collect(), &w[1])
        };
        let define: Definition<'_> = &|x, w| x.chunks(width).flat_map(|row| normed(row, w)).collect();
        let x = (floats(&[rows, width]) + shift).unwrap();
        let mut allowed = within(place, 0);
        // The mean has units in the last place of numbers this large.
        allowed.absolute += shift * f64::from(f32::EPSILON);
        check(place, "layer norm", &x, &mut owned, allowed, op, define);
    }
}

pub fn rms_norm(place: &Place, [rows, width]: [usize; 2]) {
    let mut owned = [Owned::new("w", &[width], place.precision)];
    let normed = |row: &[f64], w: &[Vec<f64>]| {
        let root = (row.iter().map(|x| x * x).sum::<f64>() / width as f64 + EPS).sqrt();
        row.iter().zip(&w[0]).map(|(x, w)| x / root * w).collect::<Vec<_>>()
    };
    let op: Op<'_> = &|x, p, _| ops::rms_norm(x, &p[0], EPS);
    let define: Definition<'_> = &|x, w| x.chunks(width).flat_map(|row| normed(row, w)).collect();
    check(place, "RMS norm", &floats(&[rows, width]), &mut owned, within(place, 0), op, define);
}

pub fn swiglu(place: &Place, [rows, width]: [usize; 2]) {
    let gated = |row: &[f64]| {
        let (gates, ups) = row.split_at(width);
        gates.iter().zip(ups).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect::<Vec<_>>()
    };
    let x = (floats(&[rows, 2 * width]) * 4.0).unwrap();
    let define: Definition<'_> = &|x, _| x.chunks(2 * width).flat_map(gated).collect();
    check(place, "SwiGLU", &x, &mut [], within(place, 0), &|x, _, _| ops::swiglu(x), define);
}

/// Tokens, vocabulary and width; rows of a table are copied.
pub fn embedding(place: &Place, [tokens, vocabulary, width]: [usize; 3]) {
    let ids: Vec<u32> = (0..tokens).map(|token| (token * 31 % vocabulary) as u32).collect();
    let ids = Tensor::from_vec(ids, (1, tokens), &Device::Cpu).unwrap();
    let mut owned = [Owned::new("table", &[vocabulary, width], place.precision).tiled(vocabulary.div_ceil(3))];
    let define: Definition<'_> = &|ids, table| {
        let row = |id: f64| table[0][id as usize * width..][..width].to_vec();
        ids.iter().flat_map(|&id| row(id)).collect()
    };
    check(place, "embedding", &ids, &mut owned, EXACT, &|ids, p, _| ops::embedding(ids, &p[0]), define);
}

/// Sequences, time and width; the table has rows that no sequence reaches.
pub fn positions(place: &Place, [batch, time, width]: [usize; 3]) {
    let rows = time + 5;
    let mut owned = [Owned::new("positions", &[rows, width], place.precision).tiled(rows.div_ceil(3))];
    let op: Op<'_> = &|x, p, _| ops::positional_embedding(x, &p[0]);
    let define: Definition<'_> = &|x, table| plus(x.to_vec(), &table[0][..time * width]);
    check(place, "positions", &floats(&[batch, time, width]), &mut owned, within(place, 0), op, define);
}

/// What stays is divided by the probability of staying.
pub fn dropout(place: &Place, length: usize) {
    let mut mask = vec![0f32; length];
    Mask::new(0.3, &context(true), 4).write(0, &mut mask);
    // Probabilities are multiples of 2^-16.
    let stays = 1.0 - (0.3f64 * 65_536.0).round() / 65_536.0;
    let define: Definition<'_> =
        &|x, _| x.iter().zip(&mask).map(|(x, &mask)| if mask == 0.0 { 0.0 } else { x / stays }).collect();
    let op: Op<'_> = &|x, _, ctx| ops::dropout(x, 0.3, ctx, 4);
    check(place, "dropout", &floats(&[length]), &mut [], within(place, 0), op, define);
}

/// Tokens, vocabulary and width. The logits of 16-bit numbers are fp32, and so is the loss.
pub fn cross_entropy(place: &Place, [tokens, vocabulary, width]: [usize; 3]) {
    let targets: Vec<i64> =
        (0..tokens).map(|token| if token % 5 == 3 { -100 } else { (token * 31 % vocabulary) as i64 }).collect();
    let on_host = Tensor::from_slice(&targets, tokens, &Device::Cpu).unwrap();
    let mut owned = [Owned::new("head", &[vocabulary, width], place.precision).tiled(vocabulary.div_ceil(3))];
    let define: Definition<'_> = &|x, w| {
        let logits = product(x, &w[0], width);
        let losses =
            logits.chunks(vocabulary).zip(&targets).filter(|(_, target)| **target >= 0).map(|(row, &target)| {
                let highest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = row.iter().map(|logit| (logit - highest).exp()).sum();
                highest + sum.ln() - row[target as usize]
            });
        vec![losses.sum::<f64>() / context(true).target_count as f64]
    };
    // Logits so large that their exponentials leave the range of fp32 are no NaN.
    for scale in [1.0, 100.0] {
        let x = (floats(&[tokens, width]) * scale).unwrap();
        let op: Op<'_> = &|x, p, ctx| ops::linear_cross_entropy(x, &p[0], &on_host, ctx);
        check(place, "cross-entropy", &x, &mut owned, tolerance(Precision::Fp32, 0), op, define);
    }
}

/// The first heads of rows of `columns`, whose others stay. The backward turns the other way.
pub fn rope(place: &Place, time: usize, columns: usize, rope: &Rope) {
    let define: Definition<'_> = &|x, _| {
        let mut rows = x.to_vec();
        rows.chunks_mut(columns).enumerate().for_each(|(row, columns)| rotate(columns, row % time, rope));
        rows
    };
    let (x, op): (_, Op<'_>) = (floats(&[2, time, columns]), &|x, _, _| ops::rope(x, rope));
    let name = format!("{rope:?}");
    check(place, &name, &x, &mut [], within(place, 0), op, define);
    // Applied to what the forward made, the backward gives back the input.
    let (_, dx) = run(place, &x, &mut [], op);
    let turned = Tensor::from_vec(dx, x.shape(), &Device::Cpu).unwrap();
    let (again, _) = run(place, &turned, &mut [], op);
    // Both of a pair were rounded on the way there, and either may be the larger by far.
    near(&format!("{name} there and back"), &again, &wide(&upstream(place, again.len())), within(place, 2));
}

fn rotate(row: &mut [f64], position: usize, rope: &Rope) {
    for (head, pair) in (0..rope.heads).flat_map(|head| (0..rope.rotary_dim / 2).map(move |pair| (head, pair))) {
        let (first, second) =
            if rope.interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + rope.rotary_dim / 2) };
        let angle = position as f64 * rope.theta.powf(-2.0 * pair as f64 / rope.rotary_dim as f64);
        let [first, second] = [first, second].map(|element| head * rope.head_dim + element);
        let (a, b) = (row[first], row[second]);
        row[first] = a * angle.cos() - b * angle.sin();
        row[second] = a * angle.sin() + b * angle.cos();
    }
}

/// Two sequences, with samples as [`masks::samples`] where they are packed.
pub fn attention(place: &Place, time: usize, head: usize, attention: &Attention) {
    let samples = masks::samples(time);
    let samples = attention.segments.is_some().then_some(&samples[..]);
    let x = floats(&[2, time, packed_width(attention, head)]);
    let define: Definition<'_> = &|x, _| masks::attention(x, [2, time, head], attention, samples);
    let mut allowed = within(place, masks::INNER);
    // Scores are sums, and their exponentials multiply what was rounded.
    allowed.absolute = allowed.absolute.max(1e-5);
    check(place, &format!("{attention:?}"), &x, &mut [], allowed, &|x, _, _| ops::attention(x, attention), define);
}
