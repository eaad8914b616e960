//! The operations of LLaMA-like models on the host: each backward against finite differences of its forward, and each
//! forward against its definition in f64.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

mod harness;

use candle_core::{Device, Tensor};
use harness::{Op, Owned, Place, check, constant, floats, floats_of, run};
use patrickstar::model::ops::{self, Attention, Rope, Segments};
use patrickstar_actors::types::Precision;

const PRECISIONS: [Precision; 2] = [Precision::Fp32, Precision::Bf16];

fn host() -> Place {
    Place::host(Precision::Fp32)
}

/// Elements as f64.
fn wide(tensor: &Tensor) -> Vec<f64> {
    floats_of(tensor).into_iter().map(f64::from).collect()
}

fn near(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    let largest = want.iter().fold(0f64, |most, value| most.max(value.abs()));
    for (index, (&got, &want)) in got.iter().zip(want).enumerate() {
        let apart = (f64::from(got) - want).abs();
        assert!(apart <= tolerance * largest, "{what}, element {index}: {got}, by definition {want}");
    }
}

fn assert_error(result: candle_core::Result<patrickstar::Activation>, names: &str) {
    let message = result.err().expect("what does not fit is accepted").to_string();
    assert!(message.contains(names), "`{message}` does not name {names}");
}

#[test]
fn rms_norm() {
    for place in PRECISIONS.map(Place::host) {
        for width in [5, 16, 33] {
            let mut owned = [Owned::new("w", &[width], place.precision)];
            let op: Op<'_> = &|x, p, _| ops::rms_norm(x, &p[0], 1e-5);
            check(&place, "RMS norm", &floats(&[2, 3, width]), &mut owned, 2e-3, op);
            let op: Op<'_> = &|x, p, _| ops::add(x, &ops::rms_norm(x, &p[0], 1e-5)?);
            owned[0].gradient.fill(0);
            check(&place, "RMS norm beside a branch", &floats(&[4, width]), &mut owned, 2e-3, op);
        }
    }
}

#[test]
fn rms_norm_is_what_it_says() {
    let (x, mut owned) = (floats(&[3, 17]), [Owned::new("w", &[17], Precision::Fp32)]);
    let weights: Vec<f64> = (0..17).map(|i| f64::from(owned[0].read(&owned[0].weight, i))).collect();
    // An eps that a wrong place for it would show.
    let (y, _) = run(&host(), &x, &mut owned, &|x, p, _| ops::rms_norm(x, &p[0], 0.1));
    let normed = |row: &[f64]| {
        let root = (row.iter().map(|x| x * x).sum::<f64>() / 17.0 + 0.1).sqrt();
        row.iter().zip(&weights).map(|(x, w)| x / root * w).collect::<Vec<_>>()
    };
    near("RMS norm", &y, &wide(&x).chunks(17).flat_map(normed).collect::<Vec<_>>(), 1e-6);
}

#[test]
fn swiglu() {
    for width in [1, 4, 33] {
        let x = (floats(&[2, 3, 2 * width]) * 3.0).unwrap();
        check(&host(), "SwiGLU", &x, &mut [], 1e-3, &|x, _, _| ops::swiglu(x));
    }
    let op: Op<'_> = &|x, _, _| ops::add(&ops::swiglu(x)?, &ops::swiglu(&ops::add(x, x)?)?);
    check(&host(), "SwiGLU of a branch", &floats(&[3, 10]), &mut [], 1e-3, op);
}

#[test]
fn swiglu_is_what_it_says() {
    let x = (floats(&[5, 14]) * 4.0).unwrap();
    let (y, _) = run(&host(), &x, &mut [], &|x, _, _| ops::swiglu(x));
    let gated = |row: &[f64]| (0..7).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[7 + i]).collect::<Vec<_>>();
    near("SwiGLU", &y, &wide(&x).chunks(14).flat_map(gated).collect::<Vec<_>>(), 1e-6);
    // Exponentials that leave the range of fp32 are no NaN.
    let far = Tensor::new(&[[-1e4f32, 1e4, 2.0, 3.0]], &Device::Cpu).unwrap();
    let (y, dx) = run(&host(), &far, &mut [], &|x, _, _| ops::swiglu(x));
    assert_eq!(y, [0.0, 3e4]);
    assert!(dx.iter().all(|value| value.is_finite()), "{dx:?}");
}

/// Queries and keys of 2 and 1 heads of 6, then values, which stay.
fn ropes() -> Vec<Rope> {
    let mut ropes = Vec::new();
    for interleaved in [false, true] {
        for rotary_dim in [6, 4, 2] {
            ropes.push(Rope { heads: 3, head_dim: 6, rotary_dim, theta: 100.0, interleaved });
        }
    }
    ropes
}

#[test]
fn rope() {
    for rope in ropes() {
        check(&host(), "rope", &floats(&[2, 5, 24]), &mut [], 1e-3, &|x, _, _| ops::rope(x, &rope));
        let op: Op<'_> = &|x, _, _| ops::add(x, &ops::rope(x, &rope)?);
        check(&host(), "rope beside a branch", &floats(&[1, 3, 18]), &mut [], 1e-3, op);
    }
}

#[test]
fn rope_is_what_it_says() {
    // Longer and shorter times than before, which a table is kept for.
    for (time, rope) in [3, 700, 5].into_iter().flat_map(|time| ropes().into_iter().map(move |rope| (time, rope))) {
        let x = floats(&[2, time, 24]);
        let (y, dx) = run(&host(), &x, &mut [], &|x, _, _| ops::rope(x, &rope));
        let mut want = wide(&x);
        for (row, columns) in want.chunks_mut(24).enumerate() {
            for head in 0..3 {
                for pair in 0..rope.rotary_dim / 2 {
                    let (first, second) =
                        if rope.interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + rope.rotary_dim / 2) };
                    let exponent = -2.0 * pair as f64 / rope.rotary_dim as f64;
                    let angle = (row % time) as f64 * rope.theta.powf(exponent);
                    let (a, b) = (columns[6 * head + first], columns[6 * head + second]);
                    columns[6 * head + first] = a * angle.cos() - b * angle.sin();
                    columns[6 * head + second] = a * angle.sin() + b * angle.cos();
                }
            }
        }
        near("rope", &y, &want, 1e-6);
        // The backward turns the other way: applied to what the forward made, it gives back the input.
        let turned = Tensor::from_vec(dx, x.shape(), &Device::Cpu).unwrap();
        let (again, _) = run(&host(), &turned, &mut [], &|x, _, _| ops::rope(x, &rope));
        let upstream: Vec<f64> = harness::upstream(&host(), again.len()).into_iter().map(f64::from).collect();
        near("rope there and back", &again, &upstream, 1e-6);
    }
}

#[test]
fn rope_leaves_its_input_alone() {
    let x = floats(&[1, 4, 24]);
    let before = floats_of(&x);
    let y = ops::rope(&constant(&x), &ropes()[0]).unwrap().tensor().unwrap();
    assert!(floats_of(&y) != before && floats_of(&x) == before);
}

/// The samples of each of two sequences.
fn samples(time: usize) -> [Vec<usize>; 2] {
    let mut rest = vec![1; time.min(2)];
    rest.extend((time > 2).then(|| time - 2));
    [vec![time / 2, time - time / 2], rest]
}

/// Heads, groups and masks in every combination, for two sequences.
fn attentions(time: usize) -> Vec<Attention> {
    let packed = Segments::new(&samples(time)).unwrap();
    let mut attentions = Vec::new();
    for (heads, kv_heads) in [(2, 2), (4, 2), (3, 1)] {
        for causal in [true, false] {
            for window in [None, Some(1), Some(3), Some(time), Some(usize::MAX)] {
                for segments in [None, Some(packed.clone())] {
                    attentions.push(Attention { heads, kv_heads, causal, window, segments });
                }
            }
        }
    }
    attentions
}

fn packed_width(attention: &Attention, head: usize) -> usize {
    (attention.heads + 2 * attention.kv_heads) * head
}

/// Whether a query sees a key: the masks' definition. `lengths` are those of the samples of one sequence.
fn sees(attention: &Attention, lengths: Option<&[usize]>, query: usize, key: usize) -> bool {
    let sample = |lengths: &[usize], token: usize| {
        let ends = lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        ends.take_while(|&end| end <= token).count()
    };
    (!attention.causal || key <= query)
        && attention.window.is_none_or(|window| (query as i128 - key as i128) < window as i128)
        && lengths.is_none_or(|lengths| sample(lengths, query) == sample(lengths, key))
}

/// Attention by its definition, one number after another.
fn naive(qkv: &Tensor, attention: &Attention, lengths: Option<&[Vec<usize>]>) -> Vec<f64> {
    let (batch, time, packed) = qkv.dims3().unwrap();
    let (heads, kv_heads) = (attention.heads, attention.kv_heads);
    let (values, width) = (wide(qkv), packed / (heads + 2 * kv_heads));
    let at = |b: usize, t: usize, head: usize, i: usize| values[(b * time + t) * packed + head * width + i];
    let mut out = Vec::new();
    for b in 0..batch {
        let lengths = lengths.map(|lengths| &lengths[b][..]);
        for (query, head) in (0..time).flat_map(|query| (0..heads).map(move |head| (query, head))) {
            let shared = head / (heads / kv_heads);
            let weight = |key: usize| {
                let dot: f64 = (0..width).map(|i| at(b, query, head, i) * at(b, key, heads + shared, i)).sum();
                if sees(attention, lengths, query, key) { (dot / (width as f64).sqrt()).exp() } else { 0.0 }
            };
            let weights: Vec<f64> = (0..time).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            for i in 0..width {
                let value = |key: usize| weights[key] / sum * at(b, key, heads + kv_heads + shared, i);
                out.push((0..time).map(value).sum());
            }
        }
    }
    out
}

#[test]
fn attention() {
    for attention in attentions(4) {
        let x = floats(&[2, 4, packed_width(&attention, 3)]);
        let name = format!("attention, {attention:?}");
        check(&host(), &name, &x, &mut [], 2e-3, &|x, _, _| ops::attention(x, &attention));
    }
    let grouped = Attention { kv_heads: 1, ..Attention::causal(2) };
    let op: Op<'_> = &|x, _, _| ops::add(&ops::attention(x, &grouped)?, &ops::attention(x, &grouped)?);
    check(&host(), "attention twice", &floats(&[1, 5, 4 * 3]), &mut [], 2e-3, op);
}

#[test]
fn attention_is_what_it_says() {
    for time in [2, 3, 7, 33] {
        let samples = samples(time);
        for attention in attentions(time) {
            let x = floats(&[2, time, packed_width(&attention, 5)]);
            let (y, _) = run(&host(), &x, &mut [], &|x, _, _| ops::attention(x, &attention));
            let lengths = attention.segments.is_some().then_some(&samples[..]);
            near(&format!("{attention:?}"), &y, &naive(&x, &attention, lengths), 1e-5);
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
    let want: Vec<f64> = values(&second, &alone).into_iter().map(f64::from).collect();
    near("the second sample", &packed[3 * 8..], &want, 1e-6);
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
