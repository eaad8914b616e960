//! How far from exact a result may be.

use patrickstar_actors::types::Precision;

/// A share of the exact number itself, and of the largest of its tensor.
#[derive(Clone, Copy)]
pub struct Tolerance {
    pub relative: f64,
    pub absolute: f64,
}

/// Nothing is rounded.
pub const EXACT: Tolerance = Tolerance { relative: 0.0, absolute: 0.0 };

/// In fp32 sums of up to some thousand terms are rounded in one order or another, and a GPU's exponentials are a few units
/// in the last place off: 1e-5 of the largest.
///
/// bf16 has eight bits, so a result is off by at most 2^-8 of itself where the GPU computes in fp32 and rounds once, and
/// by `inner` times 2^-8 of the largest where terms of it were rounded before. fp16 has eleven.
pub fn tolerance(precision: Precision, inner: u32) -> Tolerance {
    match precision {
        Precision::Fp32 => Tolerance { relative: 1e-5, absolute: 1e-5 },
        Precision::Bf16 => Tolerance { relative: 1.0 / 256.0 + 1e-5, absolute: f64::from(inner) / 256.0 + 1e-5 },
        Precision::Fp16 => Tolerance { relative: 1.0 / 2048.0 + 1e-5, absolute: f64::from(inner) / 2048.0 + 1e-5 },
    }
}

pub fn near(what: &str, got: &[f32], want: &[f64], tolerance: Tolerance) {
    near_above(what, got, want, tolerance, 0.0);
}

/// As [`near`], where rounding is relative to numbers of size `scale` though the result may be smaller.
pub fn near_above(what: &str, got: &[f32], want: &[f64], tolerance: Tolerance, scale: f64) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    let largest = want.iter().fold(scale, |most, value| most.max(value.abs()));
    for (index, (&got, &want)) in got.iter().zip(want).enumerate() {
        let allowed = tolerance.relative * want.abs() + tolerance.absolute * largest;
        // Also wrong where one of them is no number.
        let within = (f64::from(got) - want).abs() <= allowed;
        assert!(within, "{what}, element {index}: {got} instead of {want}, more than {allowed:e} apart");
    }
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}
