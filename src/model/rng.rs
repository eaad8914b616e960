//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
//!
//! Every number is a function of seed, stream and position alone. So a parameter begins with the same bits wherever its
//! chunk lies, and a dropout mask repeats itself in the recompute without being stored.

use super::block::{Context, Init};

mod normal;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

const ROUNDS: u32 = 10;

#[inline(always)]
fn philox_round([a, b, c, d]: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let product = |multiplier: u32, value: u32| u64::from(multiplier) * u64::from(value);
    let (x, y) = (product(MULTIPLIERS[0], a), product(MULTIPLIERS[1], c));
    [(y >> 32) as u32 ^ b ^ key[0], y as u32, (x >> 32) as u32 ^ d ^ key[1], x as u32]
}

#[inline(always)]
fn next_key(key: [u32; 2]) -> [u32; 2] {
    [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])]
}

/// One block of four numbers.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key = next_key(key);
        }
        counter = philox_round(counter, key);
    }
    counter
}

fn block(seed: u64, stream: u64, index: u64) -> [u32; 4] {
    let halves = |value: u64| [value as u32, (value >> 32) as u32];
    let ([a, b], [c, d]) = (halves(index), halves(stream));
    philox([a, b, c, d], halves(seed))
}

/// FNV-1a, so that every parameter has a stream of its own.
pub(crate) fn stream_of(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

/// In (0, 1]: never zero, so that its logarithm is finite.
fn unit(bits: u32) -> f64 {
    (f64::from(bits) + 1.0) / 4_294_967_296.0
}

/// A number in (0, 1] for choices outside of training.
pub fn uniform(seed: u64, index: u64) -> f64 {
    unit(block(seed, stream_of("sample"), index)[0])
}

/// Fills `out` with the elements of parameter `name` that begin at `first_element`.
pub fn fill(init: Init, seed: u64, name: &str, first_element: u64, out: &mut [f32]) {
    match init {
        Init::Zeros => out.fill(0.0),
        Init::Ones => out.fill(1.0),
        Init::Uniform { bound } => {
            let draw = |bits: u32| ((2.0 * unit(bits) - 1.0) as f32) * bound;
            fill_by_blocks(seed, stream_of(name), first_element, out, |bits| bits.map(draw));
        }
        Init::Normal { std } => {
            let stream = stream_of(name);
            // Whole blocks in the middle go many at a time.
            let head = (first_element.next_multiple_of(4) - first_element).min(out.len() as u64) as usize;
            let (head, rest) = out.split_at_mut(head);
            let (middle, tail) = rest.split_at_mut(rest.len() / normal::ELEMENTS * normal::ELEMENTS);
            let first_of_middle = first_element + head.len() as u64;
            let first_of_tail = first_of_middle + middle.len() as u64;
            fill_by_blocks(seed, stream, first_element, head, |bits| normal::four(bits, std));
            normal::fill(seed, stream, first_of_middle / 4, std, middle);
            fill_by_blocks(seed, stream, first_of_tail, tail, |bits| normal::four(bits, std));
        }
    }
}

fn fill_by_blocks(seed: u64, stream: u64, first: u64, out: &mut [f32], draw: impl Fn([u32; 4]) -> [f32; 4]) {
    let mut current = (u64::MAX, [0f32; 4]);
    for (offset, value) in out.iter_mut().enumerate() {
        let element = first + offset as u64;
        if current.0 != element / 4 {
            current = (element / 4, draw(block(seed, stream, element / 4)));
        }
        *value = current.1[(element % 4) as usize];
    }
}

/// Dropout decisions of one operation in one pass. Each element has 16 bits of its own.
#[derive(Clone, Debug)]
pub struct Mask {
    seed: u64,
    stream: u64,
    /// Of 2^16 equally likely numbers the first so many drop the element.
    threshold: u32,
}

const CHOICES: u32 = 1 << 16;
/// Elements whose choices are one block of random numbers.
const CHOICES_PER_BLOCK: u64 = 8;

impl Mask {
    /// Drops with probability `p`, rounded to a multiple of 2^-16; `op` tells operations of a block apart.
    pub fn new(p: f64, ctx: &Context, op: u32) -> Self {
        let place = (ctx.block as u64) << 40 ^ (ctx.micro as u64) << 8 ^ u64::from(op);
        // The step goes through one more block, so that streams of neighbouring steps have nothing in common.
        let mixed = block(ctx.seed, stream_of("dropout"), ctx.step.0);
        let stream = place ^ u64::from(mixed[0]) << 32 ^ u64::from(mixed[1]);
        // Something always stays, so that the scale is finite.
        let threshold = ((p * f64::from(CHOICES)).round() as u32).min(CHOICES - 1);
        Mask { seed: ctx.seed, stream, threshold }
    }

    /// What elements that stay are multiplied with, so that the expectation is what it was.
    pub fn scale(&self) -> f32 {
        (f64::from(CHOICES) / f64::from(CHOICES - self.threshold)) as f32
    }

    /// Seed, stream and threshold, for kernels that draw the same numbers.
    #[cfg(feature = "cuda")]
    pub(crate) fn parts(&self) -> (u64, u64, u32) {
        (self.seed, self.stream, self.threshold)
    }

    /// Writes 0 or the scale for elements `first..`.
    pub fn write(&self, first: u64, out: &mut [f32]) {
        let scale = self.scale();
        let mut current = (u64::MAX, [0; 4]);
        for (element, value) in (first..).zip(out) {
            let index = element / CHOICES_PER_BLOCK;
            if current.0 != index {
                current = (index, block(self.seed, self.stream, index));
            }
            let place = (element % CHOICES_PER_BLOCK) as usize;
            let bits = current.1[place / 2] >> (16 * (place % 2)) & (CHOICES - 1);
            *value = if bits >= self.threshold { scale } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use patrickstar_actors::types::Step;

    use super::*;

    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        let pi = [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344];
        assert_eq!(philox(pi, [0xA409_3822, 0x299F_31D0]), [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]);
    }

    #[test]
    fn any_part_of_a_parameter_has_the_same_bits() {
        for init in [Init::Normal { std: 0.02 }, Init::Uniform { bound: 0.1 }] {
            let mut whole = vec![0.0; 3000];
            fill(init, 7, "w", 0, &mut whole);
            for (from, to) in [(0, 3000), (1, 2), (3, 1501), (998, 1000), (4, 2999), (2, 260)] {
                let mut part = vec![0.0; to - from];
                fill(init, 7, "w", from as u64, &mut part);
                assert_eq!(part, whole[from..to]);
            }
        }
    }

    #[test]
    fn normal_numbers_have_the_moments_of_the_distribution() {
        const COUNT: usize = 1 << 20;
        let mut values = vec![0.0; COUNT];
        fill(Init::Normal { std: 1.0 }, 3, "w", 0, &mut values);
        let moment = |power: i32| values.iter().map(|&x| f64::from(x).powi(power)).sum::<f64>() / COUNT as f64;
        // Five standard errors of each.
        for (power, expected, error) in [(1, 0.0, 5e-3), (2, 1.0, 7e-3), (3, 0.0, 2e-2), (4, 3.0, 5e-2)] {
            assert!((moment(power) - expected).abs() < error, "moment {power}: {}", moment(power));
        }
        let beyond = |limit: f32| values.iter().filter(|x| x.abs() > limit).count() as f64 / COUNT as f64;
        assert!((beyond(1.0) - 0.317_31).abs() < 2.5e-3 && (beyond(3.0) - 0.0027).abs() < 2.6e-4);
        assert!(values.iter().all(|x| x.is_finite()) && beyond(4.5) > 0.0);
        // Neighbours are independent: also the two that share a radius.
        for distance in 1..4 {
            let products = values.iter().zip(&values[distance..]).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            assert!((products / COUNT as f64).abs() < 5e-3, "distance {distance}");
        }
    }

    #[test]
    fn a_mask_drops_its_share_and_keeps_the_expectation_wherever_it_begins() {
        let context =
            Context { seed: 5, step: Step(3), micro: 0, block: 2, training: true, targets: None, target_count: 1 };
        for p in [0.0, 1e-4, 0.1, 0.5, 0.9] {
            let mask = Mask::new(p, &context, 1);
            let mut whole = vec![0f32; 1 << 18];
            mask.write(0, &mut whole);
            let mean = whole.iter().map(|&x| f64::from(x)).sum::<f64>() / whole.len() as f64;
            // Five standard errors.
            let error = 5.0 * (p / (1.0 - p) / whole.len() as f64).sqrt();
            assert!((mean - 1.0).abs() <= error + 1e-6, "p {p}: {mean}");
            for first in [1, 7, 8, 4095] {
                let mut part = vec![0f32; 37];
                mask.write(first as u64, &mut part);
                assert_eq!(part, whole[first..first + 37]);
            }
        }
    }
}
