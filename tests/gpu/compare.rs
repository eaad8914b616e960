//! An operation on the GPU beside the host's, which computes in fp32.

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use patrickstar_actors::types::{Precision, Tier};

use crate::gpu;
use crate::harness::near::{near_above, tolerance, wide};
use crate::harness::{Op, Owned, Place, run_from};

/// Name of the weight of an operation whose output is a loss.
pub const HEAD: &str = "head";

/// A parameter: name, shape, rows of a tile.
pub type Spec = (&'static str, Vec<usize>, usize);

/// A parameter in one chunk.
pub fn whole(name: &'static str, shape: &[usize]) -> Spec {
    (name, shape.to_vec(), shape[0])
}

/// Numbers near a normal distribution, the same for the same name and place.
pub fn noise(name: &str, elements: usize) -> Vec<f32> {
    let seed = name.bytes().fold(7u64, |seed, byte| seed.wrapping_mul(0x100_0000_01B3) ^ u64::from(byte));
    let value = |index: usize| {
        let bits = mix(seed.wrapping_add(index as u64));
        let sum: i64 = (0..4).map(|part| (bits >> (16 * part) & 0xFFFF) as i64 - 32_768).sum();
        sum as f32 / 37_837.0
    };
    (0..elements).map(value).collect()
}

/// splitmix64
pub fn mix(index: u64) -> u64 {
    let mut z = index.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ z >> 31
}

/// As `noise`, of numbers that `precision` has.
pub fn representable(precision: Precision, name: &str, elements: usize) -> Vec<f32> {
    let mut values = noise(name, elements);
    match precision {
        Precision::Fp32 => {}
        Precision::Bf16 => values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
        Precision::Fp16 => values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
    }
    values
}

/// An activation in host memory.
pub fn input(precision: Precision, shape: &[usize]) -> Tensor {
    Tensor::from_vec(representable(precision, "x", shape.iter().product()), shape, &Device::Cpu).unwrap()
}

/// What an operation leaves.
struct Outcome {
    output: Vec<f32>,
    is_loss: bool,
    input_gradient: Vec<f32>,
    gradients: Vec<Vec<f32>>,
}

impl Outcome {
    fn parts<'a>(&'a self, specs: &'a [Spec]) -> Vec<(String, &'a [f32])> {
        let mut parts = vec![("output".into(), &self.output[..]), ("input gradient".into(), &self.input_gradient)];
        parts.extend(
            specs.iter().zip(&self.gradients).map(|(spec, values)| (format!("gradient of {}", spec.0), &values[..])),
        );
        parts
    }
}

fn outcome(place: &Place, values: Precision, x: &Tensor, specs: &[Spec], op: Op<'_>) -> Outcome {
    let mut owned: Vec<Owned> = specs
        .iter()
        .map(|(name, shape, rows)| {
            let weights = representable(values, name, shape.iter().product());
            Owned::from_values(name, shape, place.precision, &weights).tiled(*rows)
        })
        .collect();
    let upstream = |elements| representable(values, "upstream", elements);
    let (output, input_gradient) = run_from(place, x, &mut owned, &upstream, op);
    let is_loss = specs.first().is_some_and(|spec| spec.0 == HEAD);
    Outcome { output, is_loss, input_gradient, gradients: owned.iter().map(Owned::gradients).collect() }
}

/// Output, input gradient and weight gradients of `op` on the GPU against the host's on the same numbers, and a second
/// time on the GPU with the same bits.
pub fn compare(precision: Precision, name: &str, x: &Tensor, specs: &[Spec], inner: u32, op: Op<'_>) {
    compare_above(precision, name, x, specs, (inner, 0.0), op);
}

/// An operation that looks up rows, with its tables on the GPU and in host memory: the same bits.
pub fn compare_places(precision: Precision, name: &str, x: &Tensor, specs: &[Spec], op: Op<'_>) {
    let on_device = outcome(&gpu(precision), precision, x, specs, op);
    let on_host = outcome(&Place { tier: Tier::Host, ..gpu(precision) }, precision, x, specs, op);
    for ((part, first), (_, second)) in on_device.parts(specs).into_iter().zip(on_host.parts(specs)) {
        assert_same_bits(&format!("{name} of {:?} {specs:?} in {precision:?}, {part}", x.dims()), first, second);
    }
}

/// As [`compare`], for operations whose rounding is relative to numbers of size `scale` though the result may be smaller.
pub fn compare_above(
    precision: Precision,
    name: &str,
    x: &Tensor,
    specs: &[Spec],
    (inner, scale): (u32, f64),
    op: Op<'_>,
) {
    let place = gpu(precision);
    let expected = outcome(&Place::host(Precision::Fp32), precision, x, specs, op);
    let first = outcome(&place, precision, x, specs, op);
    let second = outcome(&place, precision, x, specs, op);
    let name = format!("{name} of {:?} {specs:?} in {precision:?}", x.dims());
    for (((part, got), (_, again)), (_, want)) in
        first.parts(specs).into_iter().zip(second.parts(specs)).zip(expected.parts(specs))
    {
        let what = format!("{name}, {part}");
        // A loss stays fp32.
        let rounded = if part == "output" && expected.is_loss { Precision::Fp32 } else { precision };
        near_above(&what, got, &wide(want), tolerance(rounded, inner), scale);
        assert_same_bits(&what, got, again);
    }
}

pub fn assert_same_bits(what: &str, first: &[f32], second: &[f32]) {
    for (index, (first, second)) in first.iter().zip(second).enumerate() {
        assert!(
            first.to_bits() == second.to_bits(),
            "{what}, element {index}: {first:e} in one run and {second:e} in another"
        );
    }
}

/// Token ids below `vocabulary`, in host memory.
pub fn ids(tokens: usize, vocabulary: usize) -> Tensor {
    let ids: Vec<u32> = (0..tokens as u64).map(|i| (mix(i ^ 0x5EED) % vocabulary as u64) as u32).collect();
    Tensor::from_vec(ids, (1, tokens), &Device::Cpu).unwrap()
}

/// Targets below `classes`, of which every fifth does not count.
pub fn targets(tokens: usize, classes: usize) -> Tensor {
    let target = |i: u64| if i % 5 == 3 { -100 } else { (mix(i ^ 0x7A6) % classes as u64) as i64 };
    Tensor::from_vec((0..tokens as u64).map(target).collect::<Vec<i64>>(), tokens, &Device::Cpu)
        .and_then(|targets| targets.to_dtype(DType::I64))
        .unwrap()
}
