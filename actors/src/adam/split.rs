//! An fp32 weight stored as the bf16 weight the model multiplies with, and 16 signed low bits.

/// Splits a weight into `(weight, low)` so that [`join`] gives it back exactly, whatever its finite value or sign of
/// infinity.
///
/// `weight` is the nearest bf16. A tie goes away from zero, not to even: the even neighbour below would leave a rest of
/// `+0x8000`, which a signed 16-bit number cannot hold, while the one above leaves `-0x8000`, which it can. With that
/// rule `low` is just the low half of the bits. A weight beyond the largest bf16 gets an infinite `weight`, as any
/// rounding would give, and still joins exactly. Every NaN becomes one quiet NaN with an empty `low`: carrying its
/// payload could round `weight` to a number and hide it.
#[inline(always)]
pub fn split_f32(weight: f32) -> (u16, u16) {
    let bits = weight.to_bits();
    let nan = bits & 0x7fff_ffff > 0x7f80_0000;
    // No wrap-around unless it is a NaN, which is replaced.
    let high = (bits.wrapping_add(0x8000) >> 16) as u16;
    if nan { (0x7fc0, 0) } else { (high, bits as u16) }
}

/// The fp32 weight: `(weight << 16) + low`, with `low` signed.
#[inline(always)]
pub fn join(weight: u16, low: u16) -> f32 {
    f32::from_bits((u32::from(weight) << 16).wrapping_add(low as i16 as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bits: u32) {
        let value = f32::from_bits(bits);
        let (weight, low) = split_f32(value);
        if value.is_nan() {
            assert_eq!((weight, low), (0x7fc0, 0), "{bits:08x}");
            assert!(join(weight, low).is_nan());
            return;
        }
        assert_eq!(join(weight, low).to_bits(), bits, "{bits:08x}");
        let nearest_even = half::bf16::from_f32(value).to_bits();
        let tie_to_even_below = bits & 0x1_ffff == 0x8000;
        assert_eq!(weight, nearest_even + u16::from(tie_to_even_below), "{bits:08x}");
    }

    #[test]
    fn join_undoes_split_for_every_value_and_weight_is_the_nearest_bf16() {
        // Every high half with the low halves where rounding changes its mind, then a walk over all bits.
        for high in 0..=u32::from(u16::MAX) {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                check(high << 16 | low);
            }
        }
        for step in 0..(1 << 20) {
            check(step * 4093);
        }
    }
}
