//! Each operation by itself: its backward against finite differences of its forward, in fp32 and bf16, whole and tiled.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

use candle_core::{DType, Device, Result, Tensor};
use half::bf16;
use patrickstar::model::compute::Compute;
use patrickstar::model::ops;
use patrickstar::model::param::{Param, ParamTile};
use patrickstar::model::tape::{Activation, Tape};
use patrickstar::{Context, Init, model::rng};
use patrickstar_actors::types::{Precision, Step};

/// A parameter in a vector, and room for its gradient.
struct Owned {
    name: &'static str,
    shape: Vec<usize>,
    precision: Precision,
    weight: Vec<u32>,
    gradient: Vec<u32>,
    rows_per_tile: usize,
}

impl Owned {
    fn new(name: &'static str, shape: &[usize], precision: Precision) -> Self {
        let elements: usize = shape.iter().product();
        let (weight, gradient) = (vec![0; elements], vec![0; elements]);
        let mut owned = Owned { name, shape: shape.to_vec(), precision, weight, gradient, rows_per_tile: shape[0] };
        random(name, elements).into_iter().enumerate().for_each(|(i, value)| owned.set(i, value));
        owned
    }

    fn halves(words: &[u32]) -> &[bf16] {
        bytemuck::cast_slice::<u32, bf16>(words)
    }

    fn read(&self, words: &[u32], i: usize) -> f32 {
        match self.precision {
            Precision::Fp32 => f32::from_bits(words[i]),
            Precision::Bf16 => Self::halves(words)[i].to_f32(),
        }
    }

    fn set(&mut self, i: usize, value: f32) {
        match self.precision {
            Precision::Fp32 => self.weight[i] = value.to_bits(),
            Precision::Bf16 => bytemuck::cast_slice_mut::<u32, bf16>(&mut self.weight)[i] = bf16::from_f32(value),
        }
    }

    fn param(&mut self) -> Param {
        let columns: usize = self.shape[1..].iter().product();
        let width = if self.precision == Precision::Fp32 { 4 } else { 2 };
        let (weight, gradient) = (self.weight.as_ptr().cast::<u8>(), self.gradient.as_mut_ptr().cast::<u8>());
        let tiles = (0..self.shape[0])
            .step_by(self.rows_per_tile)
            .map(|row_start| ParamTile {
                row_start,
                rows: self.rows_per_tile.min(self.shape[0] - row_start),
                weight: weight.wrapping_add(row_start * columns * width).cast(),
                gradient: gradient.wrapping_add(row_start * columns * width).cast(),
            })
            .collect();
        let panel = (self.rows_per_tile < self.shape[0]).then_some(self.rows_per_tile);
        let param = Param::new(self.name, &self.shape, self.precision, panel);
        // SAFETY: the vectors outlive the parameter, which no test keeps, and are not resized.
        unsafe { param.bind(tiles) };
        param
    }
}

fn random(name: &str, elements: usize) -> Vec<f32> {
    let mut values = vec![0f32; elements];
    rng::fill(Init::Normal { std: 0.7 }, 5, name, 0, &mut values);
    values
}

fn context(training: bool) -> Context {
    let step = Step(3);
    Context { seed: 9, step, micro: 1, block: 2, training, targets: None, target_count: 5 }
}

type Op<'a> = &'a dyn Fn(&Activation, &[Param], &Context) -> Result<Activation>;

/// `x` on a tape that forgets.
fn constant(x: &Tensor) -> Activation {
    Tape::forgetting(&Compute::Cpu).constant(x.clone())
}

/// The sum of the outputs, each with a weight of its own, in double precision.
fn loss(x: &Tensor, owned: &mut [Owned], op: Op<'_>) -> f64 {
    let params: Vec<Param> = owned.iter_mut().map(Owned::param).collect();
    let out = op(&constant(x), &params, &context(true)).unwrap().tensor().unwrap();
    let out = out.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    out.iter().zip(upstream(out.len())).map(|(out, weight)| f64::from(*out) * f64::from(weight)).sum()
}

fn upstream(elements: usize) -> Vec<f32> {
    if elements == 1 { vec![1.0] } else { random("upstream", elements) }
}

/// Adds to the parameters' gradients and returns the input's.
fn backward(x: &Tensor, owned: &mut [Owned], op: Op<'_>) -> Vec<f32> {
    let params: Vec<Param> = owned.iter_mut().map(Owned::param).collect();
    let tape = Tape::recording(&Compute::Cpu);
    // Integers have no gradient.
    let input = if x.dtype() == DType::F32 { tape.input(x.clone()) } else { tape.constant(x.clone()) };
    let out = op(&input, &params, &context(true)).unwrap();
    let weights = Tensor::from_vec(upstream(out.elements()), out.dims(), &Device::Cpu).unwrap();
    let gradient = tape.backward(&out, (out.elements() > 1).then_some(weights), &input).unwrap();
    gradient.map_or(Vec::new(), |g| g.flatten_all().unwrap().to_vec1().unwrap())
}

fn close(what: &str, numeric: f64, analytic: f64, scale: f64, tolerance: f64) {
    let allowed = tolerance * scale.max(analytic.abs());
    assert!((numeric - analytic).abs() <= allowed, "{what}: {numeric} by differences, {analytic} by backward");
}

const STEP: f32 = 1e-2;

/// Compares every derivative of `op` with a central difference. `tolerance` is relative to the largest derivative.
fn check(name: &str, x: &Tensor, owned: &mut [Owned], tolerance: f64, op: Op<'_>) {
    let dx = backward(x, owned, op);
    let largest = |values: &[f32]| values.iter().fold(0f64, |most, v| most.max(f64::from(v.abs())));
    let values: Vec<f32> = if dx.is_empty() { Vec::new() } else { x.flatten_all().unwrap().to_vec1().unwrap() };
    let scale = largest(&dx);
    for i in 0..dx.len() {
        let mut at = |delta: f32| {
            let mut moved = values.clone();
            moved[i] += delta;
            loss(&Tensor::from_vec(moved, x.shape(), &Device::Cpu).unwrap(), owned, op)
        };
        let numeric = (at(STEP) - at(-STEP)) / f64::from(2.0 * STEP);
        close(&format!("{name}, input {i}"), numeric, f64::from(dx[i]), scale, tolerance);
    }
    for which in 0..owned.len() {
        let elements = owned[which].weight.len();
        let gradient: Vec<f32> = (0..elements).map(|i| owned[which].read(&owned[which].gradient, i)).collect();
        let (scale, precision) = (largest(&gradient), owned[which].precision);
        assert!(scale > 0.0, "{name}, {}: no gradient", owned[which].name);
        // The weights that bf16 has are far apart, and its gradients have eight bits.
        let (delta, tolerance) = if precision == Precision::Fp32 { (STEP, tolerance) } else { (0.05, 2e-2) };
        for (i, &analytic) in gradient.iter().enumerate() {
            let original = owned[which].read(&owned[which].weight, i);
            let mut at = |delta: f32| {
                owned[which].set(i, original + delta);
                let there = owned[which].read(&owned[which].weight, i);
                (loss(x, owned, op), there)
            };
            let ((up, above), (down, below)) = (at(delta), at(-delta));
            owned[which].set(i, original);
            let numeric = (up - down) / f64::from(above - below);
            close(&format!("{name}, {} {i}", owned[which].name), numeric, f64::from(analytic), scale, tolerance);
        }
    }
    // A second micro-batch adds to the first.
    let once: Vec<Vec<u32>> = owned.iter().map(|param| param.gradient.clone()).collect();
    backward(x, owned, op);
    for (param, once) in owned.iter().zip(&once) {
        for i in 0..param.weight.len() {
            let (one, two) = (param.read(once, i), param.read(&param.gradient, i));
            assert!((two - 2.0 * one).abs() <= 1e-2 * one.abs(), "{name}, {} {i}: {one}, then {two}", param.name);
        }
    }
}

fn floats(shape: &[usize]) -> Tensor {
    Tensor::from_vec(random("x", shape.iter().product()), shape, &Device::Cpu).unwrap()
}

const PRECISIONS: [Precision; 2] = [Precision::Fp32, Precision::Bf16];

#[test]
fn linear() {
    for precision in PRECISIONS {
        for rows_per_tile in [7, 2] {
            let mut owned = [Owned::new("w", &[7, 5], precision), Owned::new("b", &[7], precision)];
            owned[0].rows_per_tile = rows_per_tile;
            check("linear", &floats(&[2, 3, 5]), &mut owned, 1e-3, &|x, p, _| ops::linear(x, &p[0], Some(&p[1])));
        }
        let mut owned = [Owned::new("w", &[7, 5], precision)];
        check("linear without bias", &floats(&[3, 5]), &mut owned, 1e-3, &|x, p, _| ops::linear(x, &p[0], None));
    }
}

#[test]
fn layer_norm() {
    for precision in PRECISIONS {
        for width in [5, 16, 33] {
            let mut owned = [Owned::new("w", &[width], precision), Owned::new("b", &[width], precision)];
            let op: Op<'_> = &|x, p, _| ops::layer_norm(x, &p[0], &p[1], 1e-5);
            check("layer norm", &floats(&[2, 3, width]), &mut owned, 2e-3, op);
        }
    }
}

#[test]
fn gelu_in_both_forms() {
    let x = (floats(&[64]) * 4.0).unwrap();
    check("tanh", &x, &mut [], 1e-3, &|x, _, _| ops::gelu_tanh(x));
    check("erf", &x, &mut [], 1e-3, &|x, _, _| ops::gelu_erf(x));
}

#[test]
fn attention() {
    for (batch, time, heads, head) in [(2, 1, 1, 4), (2, 5, 3, 4), (1, 9, 2, 3)] {
        let x = floats(&[batch, time, 3 * heads * head]);
        check("attention", &x, &mut [], 2e-3, &|x, _, _| ops::causal_attention(x, heads));
    }
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
    for precision in PRECISIONS {
        let ids = Tensor::from_vec(vec![0u32, 3, 3, 9, 1, 3], (2, 3), &Device::Cpu).unwrap();
        let mut owned = [Owned::new("table", &[10, 4], precision)];
        owned[0].rows_per_tile = 4;
        check("embedding", &ids, &mut owned, 1e-3, &|ids, p, _| ops::embedding(ids, &p[0]));
        let mut owned = [Owned::new("positions", &[6, 4], precision)];
        let op: Op<'_> = &|x, p, _| ops::positional_embedding(x, &p[0]);
        check("positions", &floats(&[2, 5, 4]), &mut owned, 1e-3, op);
    }
}

#[test]
fn cross_entropy() {
    let targets = Tensor::from_vec(vec![0i64, 6, -100, 3, 10, 6], (2, 3), &Device::Cpu).unwrap();
    for precision in PRECISIONS {
        for rows_per_tile in [11, 4] {
            let mut owned = [Owned::new("head", &[11, 5], precision)];
            owned[0].rows_per_tile = rows_per_tile;
            let op: Op<'_> = &|x, p, ctx| ops::linear_cross_entropy(x, &p[0], &targets, ctx);
            check("cross-entropy", &floats(&[2, 3, 5]), &mut owned, 2e-3, op);
        }
    }
}

#[test]
fn dropout() {
    check("dropout", &floats(&[300]), &mut [], 1e-3, &|x, _, ctx| ops::dropout(x, 0.3, ctx, 4));
    let ones = Tensor::ones(100_000, DType::F32, &Device::Cpu).unwrap();
    let mask = |ctx: &Context, op| {
        ops::dropout(&constant(&ones), 0.3, ctx, op).unwrap().tensor().unwrap().to_vec1::<f32>().unwrap()
    };
    let (ctx, mut other) = (context(true), context(true));
    other.micro = 2;
    let first = mask(&ctx, 0);
    // The share kept lies within five standard deviations.
    let kept = first.iter().filter(|&&value| value != 0.0).count() as f64 / 1e5;
    assert!((kept - 0.7).abs() < 5.0 * (0.21f64 / 1e5).sqrt(), "{kept}");
    assert!(first.iter().all(|&value| value == 0.0 || value == (1.0 / 0.7) as f32));
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
