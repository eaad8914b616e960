//! fp16 and back, by operations that every instruction set vectorises and rounds alike.

/// 2^112: the distance between the exponents' biases.
const REBIAS: f32 = 5_192_296_858_534_827_628_530_496_329_220_096.0;
const FP16_INFINITY: u32 = 0x7c00;
/// One NaN for all, so that no device has to keep a payload.
const FP16_NAN: u32 = 0x7e00;
/// 65536 in fp32: from here on nothing rounds to a finite fp16.
const OVERFLOW: u32 = 0x4780_0000;
/// The smallest normal fp16 in fp32.
const NORMAL: u32 = 0x3880_0000;
/// Adding it to a smaller number leaves that number's fp16 denormal in the low bits, rounded to nearest even.
const DENORMAL_MAGIC: f32 = 0.5;

/// The value of an fp16 given as bits.
#[inline(always)]
pub fn widen_fp16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff);
    let finite = f32::from_bits(magnitude << 13) * REBIAS;
    let special = magnitude << 13 | 0x7f80_0000;
    let value = if magnitude < FP16_INFINITY { finite.to_bits() } else { special };
    f32::from_bits(value | u32::from(bits & 0x8000) << 16)
}

/// The nearest fp16, ties to even, as bits; what is too large becomes infinite.
#[inline(always)]
pub fn narrow_fp16(value: f32) -> u16 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let special = if magnitude > 0x7f80_0000 { FP16_NAN } else { FP16_INFINITY };
    let denormal = (f32::from_bits(magnitude) + DENORMAL_MAGIC).to_bits().wrapping_sub(DENORMAL_MAGIC.to_bits());
    let odd = magnitude >> 13 & 1;
    // The exponent's bias moves from 127 to 15, and half a unit less one decides the rounding.
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    let result = if magnitude >= OVERFLOW {
        special
    } else if magnitude < NORMAL {
        denormal
    } else {
        normal
    };
    (result | bits >> 16 & 0x8000) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fp16_comes_back_and_has_the_value_of_the_format() {
        for bits in 0..=u16::MAX {
            let (value, expected) = (widen_fp16(bits), half::f16::from_bits(bits).to_f32());
            if expected.is_nan() {
                assert!(value.is_nan() && narrow_fp16(value) & 0x7fff == 0x7e00, "{bits:04x}");
            } else {
                assert_eq!(value.to_bits(), expected.to_bits(), "{bits:04x}");
                assert_eq!(narrow_fp16(value), bits);
            }
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_even() {
        // Every exponent with mantissas around each place where rounding changes its mind, and a walk over all bits.
        let near = (0..=u16::MAX)
            .flat_map(|high| [0, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000].map(|low| u32::from(high) << 16 | low));
        for bits in near.chain((0..1 << 20).map(|step: u32| step.wrapping_mul(4_099))) {
            let value = f32::from_bits(bits);
            let expected = half::f16::from_f32(value);
            if expected.is_nan() {
                assert_eq!(narrow_fp16(value) & 0x7fff, 0x7e00);
            } else {
                assert_eq!(narrow_fp16(value), expected.to_bits(), "{bits:08x}");
            }
        }
    }
}
