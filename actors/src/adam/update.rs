//! One step of Adam over a run of elements, compiled for each instruction set from one text.
//!
//! The compiler vectorises the same loop for each set of features. It never contracts or reorders floating-point
//! operations, so there is no second version of the arithmetic that could drift from the first. Every line written was
//! read just before and is in cache: non-temporal stores would only add traffic.

#![expect(unsafe_code, reason = "calls code compiled for instruction sets that were detected")]

use super::fp16::{narrow_fp16, widen_fp16};
use super::scalars::StepScalars;
use super::split::{join, split_f32};

/// An instruction set that the step is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// What every processor of the target has: SSE2 on x86-64, NEON on aarch64.
    Scalar,
    /// AVX2, eight elements at a time.
    Avx2,
    /// AVX-512 F, BW and VL, sixteen elements at a time.
    Avx512,
}

impl Isa {
    /// The widest set this processor has.
    pub fn detect() -> Isa {
        [Isa::Avx512, Isa::Avx2].into_iter().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar)
    }

    /// Every set this processor has.
    pub fn available() -> impl Iterator<Item = Isa> {
        [Isa::Scalar, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.is_available())
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => std::arch::is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }
}

/// The update of one element; returns `(weight, momentum, variance)`. The order of operations is the contract with
/// every other implementation:
/// ```text
/// g = g * gradient_scale
/// Adam:  g = g + (l2 * w)                       AdamW: w = w * shrink
/// m = m + lerp * (g - m)                        (g + lerp * (g - m) where lerp_from_gradient)
/// v = (v * beta2) + ((one_minus_beta2 * g) * g)
/// w = w + ((negative_step_size * m) / ((sqrt(v) / sqrt_correction2) + eps))
/// ```
#[inline(always)]
fn update<const L2: bool, const FROM_GRADIENT: bool>(
    s: &StepScalars,
    mut weight: f32,
    momentum: f32,
    variance: f32,
    gradient: f32,
) -> (f32, f32, f32) {
    let mut gradient = gradient * s.gradient_scale;
    if L2 {
        gradient += s.l2 * weight;
    } else {
        weight *= s.shrink;
    }
    let base = if FROM_GRADIENT { gradient } else { momentum };
    let momentum = base + s.lerp * (gradient - momentum);
    let variance = variance * s.beta2 + (s.one_minus_beta2 * gradient) * gradient;
    let denominator = variance.sqrt() / s.sqrt_correction2 + s.eps;
    (weight + (s.negative_step_size * momentum) / denominator, momentum, variance)
}

#[inline(always)]
fn fp32_loop<const L2: bool, const FROM_GRADIENT: bool>(
    s: StepScalars,
    w: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    g: &[f32],
) {
    for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
        (*w, *m, *v) = update::<L2, FROM_GRADIENT>(&s, *w, *m, *v, *g);
    }
}

#[inline(always)]
fn bf16_loop<const L2: bool, const FROM_GRADIENT: bool>(
    s: StepScalars,
    high: &mut [u16],
    low: &mut [u16],
    m: &mut [f32],
    v: &mut [f32],
    g: &[u16],
) {
    for ((((high, low), m), v), g) in high.iter_mut().zip(low).zip(m).zip(v).zip(g) {
        let gradient = f32::from_bits(u32::from(*g) << 16);
        let weight;
        (weight, *m, *v) = update::<L2, FROM_GRADIENT>(&s, join(*high, *low), *m, *v, gradient);
        (*high, *low) = split_f32(weight);
    }
}

#[inline(always)]
fn fp16_loop<const L2: bool, const FROM_GRADIENT: bool>(
    s: StepScalars,
    weight: &mut [u16],
    master: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    g: &[u16],
) {
    for ((((weight, master), m), v), g) in weight.iter_mut().zip(master).zip(m).zip(v).zip(g) {
        (*master, *m, *v) = update::<L2, FROM_GRADIENT>(&s, *master, *m, *v, widen_fp16(*g));
        *weight = narrow_fp16(*master);
    }
}

/// Chooses the loop once a call, not once an element. Without decay neither term may touch a bit, so `shrink` becomes
/// one and Adam's term is left out: adding zero would turn a negative zero into a positive one.
macro_rules! body {
    ($name:ident = $loop:ident($($arg:ident: $ty:ty),*)) => {
        #[inline(always)]
        fn $name(s: &StepScalars, decay: bool, $($arg: $ty),*) {
            let l2 = decay && s.l2 != 0.0;
            let s = StepScalars { shrink: if decay { s.shrink } else { 1.0 }, ..*s };
            match (l2, s.lerp_from_gradient) {
                (false, false) => $loop::<false, false>(s, $($arg),*),
                (false, true) => $loop::<false, true>(s, $($arg),*),
                (true, false) => $loop::<true, false>(s, $($arg),*),
                (true, true) => $loop::<true, true>(s, $($arg),*),
            }
        }
    };
}

body!(fp32_body = fp32_loop(w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]));
body!(bf16_body = bf16_loop(high: &mut [u16], low: &mut [u16], m: &mut [f32], v: &mut [f32], g: &[u16]));

body!(fp16_body = fp16_loop(weight: &mut [u16], master: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[u16]));

macro_rules! compiled_for {
    ($name:ident = $body:ident with $features:literal ($($arg:ident: $ty:ty),*)) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        fn $name(s: &StepScalars, decay: bool, $($arg: $ty),*) {
            $body(s, decay, $($arg),*);
        }
    };
}

compiled_for!(fp32_avx2 = fp32_body with "avx2" (w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]));
compiled_for!(fp32_avx512 = fp32_body with "avx512f,avx512bw,avx512vl" (w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]));
compiled_for!(bf16_avx2 = bf16_body with "avx2" (high: &mut [u16], low: &mut [u16], m: &mut [f32], v: &mut [f32], g: &[u16]));
compiled_for!(bf16_avx512 = bf16_body with "avx512f,avx512bw,avx512vl" (high: &mut [u16], low: &mut [u16], m: &mut [f32], v: &mut [f32], g: &[u16]));

compiled_for!(fp16_avx2 = fp16_body with "avx2" (weight: &mut [u16], master: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[u16]));
compiled_for!(fp16_avx512 = fp16_body with "avx512f,avx512bw,avx512vl" (weight: &mut [u16], master: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[u16]));

/// Steps fp32 weights in place. `decay` says whether these parameters are decayed at all (biases and norms often are
/// not).
///
/// # Panics
/// When the slices differ in length.
pub fn step_fp32(
    s: &StepScalars,
    decay: bool,
    weight: &mut [f32],
    momentum: &mut [f32],
    variance: &mut [f32],
    gradient: &[f32],
) {
    step_fp32_with(Isa::detect(), s, decay, weight, momentum, variance, gradient);
}

/// [`step_fp32`] with a chosen instruction set; one this processor lacks runs as [`Isa::Scalar`], with the same bits.
///
/// # Panics
/// When the slices differ in length.
pub fn step_fp32_with(
    isa: Isa,
    s: &StepScalars,
    decay: bool,
    weight: &mut [f32],
    momentum: &mut [f32],
    variance: &mut [f32],
    gradient: &[f32],
) {
    let lengths = [momentum.len(), variance.len(), gradient.len()];
    assert!(lengths == [weight.len(); 3], "kinds of one group differ in length: {} and {lengths:?}", weight.len());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `is_available` says that this processor has the features.
        Isa::Avx512 if isa.is_available() => unsafe { fp32_avx512(s, decay, weight, momentum, variance, gradient) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 if isa.is_available() => unsafe { fp32_avx2(s, decay, weight, momentum, variance, gradient) },
        _ => fp32_body(s, decay, weight, momentum, variance, gradient),
    }
}

/// Steps weights stored as `weight` and `low` (see [`split_f32`]) in place, from a gradient in bf16 bits.
///
/// # Panics
/// When the slices differ in length.
pub fn step_bf16(
    s: &StepScalars,
    decay: bool,
    weight_hi: &mut [u16],
    low: &mut [u16],
    momentum: &mut [f32],
    variance: &mut [f32],
    gradient: &[u16],
) {
    step_bf16_with(Isa::detect(), s, decay, weight_hi, low, momentum, variance, gradient);
}

/// [`step_bf16`] with a chosen instruction set; one this processor lacks runs as [`Isa::Scalar`], with the same bits.
///
/// # Panics
/// When the slices differ in length.
#[expect(clippy::too_many_arguments, reason = "one slice for each kind of a group")]
pub fn step_bf16_with(
    isa: Isa,
    s: &StepScalars,
    decay: bool,
    weight_hi: &mut [u16],
    low: &mut [u16],
    momentum: &mut [f32],
    variance: &mut [f32],
    gradient: &[u16],
) {
    let lengths = [low.len(), momentum.len(), variance.len(), gradient.len()];
    assert!(
        lengths == [weight_hi.len(); 4],
        "kinds of one group differ in length: {} and {lengths:?}",
        weight_hi.len()
    );
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `is_available` says that this processor has the features.
        Isa::Avx512 if isa.is_available() => unsafe {
            bf16_avx512(s, decay, weight_hi, low, momentum, variance, gradient)
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 if isa.is_available() => unsafe { bf16_avx2(s, decay, weight_hi, low, momentum, variance, gradient) },
        _ => bf16_body(s, decay, weight_hi, low, momentum, variance, gradient),
    }
}

/// Steps fp32 `master` weights in place, from a gradient in fp16 bits, and rounds them to `weight`.
///
/// # Panics
/// When the slices differ in length.
pub fn step_fp16(
    s: &StepScalars,
    decay: bool,
    weight: &mut [u16],
    master: &mut [f32],
    momentum: &mut [f32],
    variance: &mut [f32],
    gradient: &[u16],
) {
    step_fp16_with(Isa::detect(), s, decay, weight, master, momentum, variance, gradient);
}

/// [`step_fp16`] with a chosen instruction set; one this processor lacks runs as [`Isa::Scalar`], with the same bits.
///
/// # Panics
/// When the slices differ in length.
#[expect(clippy::too_many_arguments, reason = "one slice for each kind of a group")]
pub fn step_fp16_with(
    isa: Isa,
    s: &StepScalars,
    decay: bool,
    weight: &mut [u16],
    master: &mut [f32],
    momentum: &mut [f32],
    variance: &mut [f32],
    gradient: &[u16],
) {
    let lengths = [master.len(), momentum.len(), variance.len(), gradient.len()];
    assert!(lengths == [weight.len(); 4], "kinds of one group differ in length: {} and {lengths:?}", weight.len());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `is_available` says that this processor has the features.
        Isa::Avx512 if isa.is_available() => unsafe {
            fp16_avx512(s, decay, weight, master, momentum, variance, gradient)
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 if isa.is_available() => unsafe { fp16_avx2(s, decay, weight, master, momentum, variance, gradient) },
        _ => fp16_body(s, decay, weight, master, momentum, variance, gradient),
    }
}
