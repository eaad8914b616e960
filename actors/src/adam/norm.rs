//! Sums of squares whose order of additions is fixed, so that a norm has the same bits wherever it is taken.

#![expect(unsafe_code, reason = "calls code compiled for instruction sets that were detected")]

use super::fp16::widen_fp16;
use super::update::Isa;

/// Partial sums; element `i` belongs to lane `i % LANES` on every instruction set.
const LANES: usize = 16;

/// Sum of the squares of `row` in f64: sixteen lanes, then a fixed tree.
///
/// The square of an f32 is exact in f64 and no sum of finite ones overflows, so the result is finite exactly when every
/// element is.
pub fn sum_of_squares(row: &[f32]) -> f64 {
    dispatch(Isa::detect(), row, f64::from)
}

/// [`sum_of_squares`] of bf16 values given as bits.
pub fn sum_of_squares_bf16(row: &[u16]) -> f64 {
    dispatch(Isa::detect(), row, |bits| f64::from(f32::from_bits(u32::from(bits) << 16)))
}

/// [`sum_of_squares`] of fp16 values given as bits.
pub fn sum_of_squares_fp16(row: &[u16]) -> f64 {
    dispatch(Isa::detect(), row, |bits| f64::from(widen_fp16(bits)))
}

fn dispatch<T: Copy>(isa: Isa, row: &[T], widen: impl Fn(T) -> f64 + Copy) -> f64 {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `is_available` says that this processor has the features.
        Isa::Avx512 if isa.is_available() => unsafe { avx512(row, widen) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 if isa.is_available() => unsafe { avx2(row, widen) },
        _ => body(row, widen),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn avx512<T: Copy>(row: &[T], widen: impl Fn(T) -> f64) -> f64 {
    body(row, widen)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<T: Copy>(row: &[T], widen: impl Fn(T) -> f64) -> f64 {
    body(row, widen)
}

#[inline(always)]
fn body<T: Copy>(row: &[T], widen: impl Fn(T) -> f64) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (blocks, tail) = row.as_chunks::<LANES>();
    for block in blocks {
        for (lane, &element) in lanes.iter_mut().zip(block) {
            let value = widen(element);
            *lane += value * value;
        }
    }
    for (lane, &element) in lanes.iter_mut().zip(tail) {
        let value = widen(element);
        *lane += value * value;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_has_the_same_bits_on_every_instruction_set_and_tells_non_finite() {
        let mut row: Vec<f32> = (0..4096 + 67u32)
            .map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761)))
            .map(|x| if x.is_finite() { x } else { 1.0 })
            .collect();
        for start in 0..3 {
            for end in row.len() - 67..row.len() {
                let expected = body(&row[start..end], f64::from);
                assert!(expected.is_finite());
                for isa in Isa::available() {
                    assert_eq!(dispatch(isa, &row[start..end], f64::from).to_bits(), expected.to_bits(), "{isa:?}");
                }
                assert_eq!(sum_of_squares(&row[start..end]).to_bits(), expected.to_bits());
            }
        }
        assert_eq!(sum_of_squares(&[]), 0.0);
        assert_eq!(sum_of_squares(&[3.0; 100]), 900.0);
        row[4100] = f32::NEG_INFINITY;
        assert!(!sum_of_squares(&row).is_finite());
        row[4100] = f32::NAN;
        assert!(!sum_of_squares(&row).is_finite());
        assert!(!sum_of_squares_bf16(&[0x3f80, 0x7f80]).is_finite());
        assert_eq!(sum_of_squares_bf16(&[0x4040; 33]), 33.0 * 9.0);
        assert_eq!(sum_of_squares_fp16(&[0x4200; 33]), 33.0 * 9.0);
        assert!(!sum_of_squares_fp16(&[0x3c00, 0x7c00]).is_finite());
    }
}
