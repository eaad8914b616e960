//! Normal numbers by Box and Muller, many at a time: the same loop compiled for each instruction set, with polynomials of its
//! own instead of a library's functions, so that a model begins with the same bits on every machine.

#![expect(unsafe_code, reason = "calls code compiled for instruction sets that were detected")]

use std::f32::consts::{FRAC_PI_2, LN_2};

use patrickstar_actors::adam::Isa;

use super::{ROUNDS, next_key, philox_round};

/// Blocks of four numbers that are computed side by side.
const BLOCKS: usize = 64;
/// Elements of as many blocks.
pub(super) const ELEMENTS: usize = 4 * BLOCKS;

/// Natural logarithm of a number in (0, 1], to about an ulp of numbers that are not close to 1.
#[inline(always)]
fn ln(x: f32) -> f32 {
    // x = 2^exponent * mantissa, which lies in [sqrt(1/2), sqrt(2)).
    const ROOT_HALF: u32 = 0x3f35_04f3;
    let shifted = x.to_bits().wrapping_sub(ROOT_HALF);
    let exponent = (shifted as i32) >> 23;
    let mantissa = f32::from_bits((shifted & 0x007f_ffff).wrapping_add(ROOT_HALF));
    // ln m = 2 artanh((m - 1) / (m + 1)).
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let z = s * s;
    let series = 1.0 + z * (1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z * (1.0 / 9.0))));
    exponent as f32 * LN_2 + 2.0 * s * series
}

/// Cosine and sine of a turn's part in [0, 1].
#[inline(always)]
fn cos_sin(turn: f32) -> (f32, f32) {
    // The nearest quarter, and what is left of it: at most an eighth of a turn each way.
    let quarters = turn * 4.0;
    let quadrant = (quarters + 0.5) as i32;
    let angle = (quarters - quadrant as f32) * FRAC_PI_2;
    let z = angle * angle;
    let sine = angle * (1.0 + z * (-1.0 / 6.0 + z * (1.0 / 120.0 + z * (-1.0 / 5040.0 + z * (1.0 / 362_880.0)))));
    let cosine =
        1.0 + z * (-0.5 + z * (1.0 / 24.0 + z * (-1.0 / 720.0 + z * (1.0 / 40_320.0 + z * (-1.0 / 3_628_800.0)))));
    let (a, b) = if quadrant & 1 == 0 { (cosine, sine) } else { (-sine, cosine) };
    if quadrant & 2 == 0 { (a, b) } else { (-a, -b) }
}

/// Two normal numbers from 64 random bits.
#[inline(always)]
fn two(radius: u32, angle: u32, std: f32) -> (f32, f32) {
    // Never zero, so that its logarithm is finite.
    let unit = |bits: u32| bits as f32 * 2.0f32.powi(-32) + 2.0f32.powi(-33);
    let radius = (-2.0 * ln(unit(radius))).sqrt() * std;
    let (cosine, sine) = cos_sin(unit(angle));
    (radius * cosine, radius * sine)
}

/// The four numbers of a block of bits.
#[inline(always)]
pub(super) fn four([a, b, c, d]: [u32; 4], std: f32) -> [f32; 4] {
    let ((x, y), (z, w)) = (two(a, b, std), two(c, d, std));
    [x, y, z, w]
}

/// Fills `out`, of whole [`ELEMENTS`], with the numbers of the blocks from `first_block` on.
pub(super) fn fill(seed: u64, stream: u64, first_block: u64, std: f32, out: &mut [f32]) {
    match Isa::detect() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has these features.
        Isa::Avx512 => unsafe { fill_avx512(seed, stream, first_block, std, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { fill_avx2(seed, stream, first_block, std, out) },
        _ => fill_any(seed, stream, first_block, std, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn fill_avx512(seed: u64, stream: u64, first_block: u64, std: f32, out: &mut [f32]) {
    fill_any(seed, stream, first_block, std, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn fill_avx2(seed: u64, stream: u64, first_block: u64, std: f32, out: &mut [f32]) {
    fill_any(seed, stream, first_block, std, out);
}

#[inline(always)]
fn fill_any(seed: u64, stream: u64, first_block: u64, std: f32, out: &mut [f32]) {
    let halves = |value: u64| [value as u32, (value >> 32) as u32];
    let ([key_low, key_high], [stream_low, stream_high]) = (halves(seed), halves(stream));
    for (piece, out) in out.chunks_exact_mut(ELEMENTS).enumerate() {
        let first = first_block + (piece * BLOCKS) as u64;
        // One array a lane of the blocks: every step below is the same operation on neighbours.
        let [mut a, mut b, mut c, mut d] = [[0u32; BLOCKS], [0; BLOCKS], [stream_low; BLOCKS], [stream_high; BLOCKS]];
        for i in 0..BLOCKS {
            [a[i], b[i]] = halves(first + i as u64);
        }
        let mut key = [key_low, key_high];
        for round in 0..ROUNDS {
            if round > 0 {
                key = next_key(key);
            }
            for i in 0..BLOCKS {
                [a[i], b[i], c[i], d[i]] = philox_round([a[i], b[i], c[i], d[i]], key);
            }
        }
        let [mut x, mut y, mut z, mut w] = [[0f32; BLOCKS]; 4];
        for i in 0..BLOCKS {
            (x[i], y[i]) = two(a[i], b[i], std);
        }
        for i in 0..BLOCKS {
            (z[i], w[i]) = two(c[i], d[i], std);
        }
        for (i, block) in out.chunks_exact_mut(4).enumerate() {
            block.copy_from_slice(&[x[i], y[i], z[i], w[i]]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_as_exact_as_fp32_allows() {
        for step in 1..=100_000u32 {
            let x = step as f32 / 100_000.0;
            let (exact, got) = (f64::from(x).ln(), f64::from(ln(x)));
            assert!((exact - got).abs() <= 2e-7 * exact.abs().max(0.5), "ln {x}: {got} for {exact}");
            let (cosine, sine) = cos_sin(x);
            let angle = std::f64::consts::TAU * f64::from(x);
            assert!((f64::from(cosine) - angle.cos()).abs() < 2.5e-7, "cos {x}");
            assert!((f64::from(sine) - angle.sin()).abs() < 2.5e-7, "sin {x}");
        }
        assert!((f64::from(ln(2f32.powi(-33))) + 33.0 * std::f64::consts::LN_2).abs() < 2e-6);
        assert!(ln(1.0) == 0.0);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let run = |fill: &dyn Fn(&mut [f32])| {
            let mut out = vec![0f32; 4 * ELEMENTS];
            fill(&mut out);
            out.iter().map(|value| value.to_bits()).collect::<Vec<u32>>()
        };
        let reference = run(&|out| fill_any(5, 6, 7, 0.3, out));
        let one_by_one: Vec<u32> = (0..4 * BLOCKS as u64)
            .flat_map(|i| four(super::super::block(5, 6, 7 + i), 0.3))
            .map(f32::to_bits)
            .collect();
        assert_eq!(reference, one_by_one);
        #[cfg(target_arch = "x86_64")]
        for isa in Isa::available() {
            let got = run(&|out| match isa {
                // SAFETY: the processor has these features.
                Isa::Avx512 => unsafe { fill_avx512(5, 6, 7, 0.3, out) },
                // SAFETY: as above.
                Isa::Avx2 => unsafe { fill_avx2(5, 6, 7, 0.3, out) },
                Isa::Scalar => fill_any(5, 6, 7, 0.3, out),
            });
            assert!(got == reference, "{isa:?}");
        }
    }
}
