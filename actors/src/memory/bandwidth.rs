//! What the memory of this machine can do, and how near the optimizer comes to it.
//!
//! Every figure counts the bytes a program asks for, and is the best of its repeats. The triad is written with
//! non-temporal stores on x86-64, where 12 bytes an element are also what crosses the memory bus; elsewhere plain
//! stores may first read the line (a fourth of the traffic, not counted). The step writes only lines that it has read,
//! so its count is its traffic everywhere.

#![expect(unsafe_code, reason = "cuts an arena in slices")]

use std::time::Instant;

use rayon::prelude::*;

use super::{Arena, MemoryError, SlotIndex};
use crate::adam::{AdamConfig, PIECE, StepScalars, narrow_fp16, split_f32, step_bf16, step_fp16, step_fp32};
use crate::types::{Bytes, Precision, Step, Tier};

/// How fast Adam steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamRate {
    /// 28 bytes a parameter in fp32, 26 in bf16, over the time of a step.
    pub bytes_per_s: f64,
    /// Parameters stepped in a second.
    pub params_per_s: f64,
}

const REPEATS: usize = 10;

/// STREAM triad `a = b + s * c` over three arrays of `bytes` each, counted as 12 bytes an element, in bytes a second.
pub fn triad_bandwidth(bytes: Bytes, threads: usize) -> Result<f64, MemoryError> {
    let elements = elements_of(bytes);
    let mut arrays = Arrays::new([4, 4, 4], elements)?;
    let [a, b, c] = arrays.slices::<f32, 3>(elements);
    b.fill(1.0);
    c.fill(2.0);
    let seconds = best(REPEATS, threads, || {
        a.par_chunks_mut(PIECE)
            .zip(b.par_chunks(PIECE))
            .zip(c.par_chunks(PIECE))
            .for_each(|((a, b), c)| triad(a, b, c));
    })?;
    Ok(12.0 * elements as f64 / seconds)
}

/// A plain copy between two arrays of `bytes` each, counted as one read and one write, in bytes a second.
pub fn copy_bandwidth(bytes: Bytes, threads: usize) -> Result<f64, MemoryError> {
    let elements = elements_of(bytes);
    let mut arrays = Arrays::new([4, 4], elements)?;
    let [a, b] = arrays.slices::<f32, 2>(elements);
    let seconds = best(REPEATS, threads, || {
        a.par_chunks_mut(PIECE).zip(b.par_chunks(PIECE)).for_each(|(a, b)| a.copy_from_slice(b));
    })?;
    Ok(8.0 * elements as f64 / seconds)
}

/// The fused step over `elements` parameters, on all threads of the current rayon pool.
pub fn adam_bandwidth(precision: Precision, elements: usize, repeats: usize) -> Result<AdamRate, MemoryError> {
    let elements = elements.max(1);
    let s = StepScalars::new(&AdamConfig::default(), 1e-3, Step(1), 1.0);
    let threads = rayon::current_num_threads();
    let (bytes, seconds) = match precision {
        Precision::Fp32 => {
            let mut arrays = Arrays::new([4; 4], elements)?;
            let [w, m, v, g] = arrays.slices::<f32, 4>(elements);
            w.fill(1.0);
            g.fill(0.1);
            let seconds = best(repeats, threads, || {
                (w.par_chunks_mut(PIECE), m.par_chunks_mut(PIECE), v.par_chunks_mut(PIECE), g.par_chunks(PIECE))
                    .into_par_iter()
                    .for_each(|(w, m, v, g)| step_fp32(&s, true, w, m, v, g));
            })?;
            (28.0, seconds)
        }
        Precision::Bf16 => {
            let (mut floats, mut halves) = (Arrays::new([4; 2], elements)?, Arrays::new([2; 3], elements)?);
            let [m, v] = floats.slices::<f32, 2>(elements);
            let [high, low, g] = halves.slices::<u16, 3>(elements);
            high.fill(split_f32(1.0).0);
            g.fill(split_f32(0.1).0);
            let seconds = best(repeats, threads, || {
                let (high, low) = (high.par_chunks_mut(PIECE), low.par_chunks_mut(PIECE));
                (high, low, m.par_chunks_mut(PIECE), v.par_chunks_mut(PIECE), g.par_chunks(PIECE))
                    .into_par_iter()
                    .for_each(|(high, low, m, v, g)| step_bf16(&s, true, high, low, m, v, g));
            })?;
            (26.0, seconds)
        }
        Precision::Fp16 => {
            let (mut floats, mut halves) = (Arrays::new([4; 3], elements)?, Arrays::new([2; 2], elements)?);
            let [master, m, v] = floats.slices::<f32, 3>(elements);
            let [weight, g] = halves.slices::<u16, 2>(elements);
            master.fill(1.0);
            g.fill(narrow_fp16(0.1));
            let seconds = best(repeats, threads, || {
                let (weight, master) = (weight.par_chunks_mut(PIECE), master.par_chunks_mut(PIECE));
                (weight, master, m.par_chunks_mut(PIECE), v.par_chunks_mut(PIECE), g.par_chunks(PIECE))
                    .into_par_iter()
                    .for_each(|(weight, master, m, v, g)| step_fp16(&s, true, weight, master, m, v, g));
            })?;
            (28.0, seconds)
        }
    };
    let params_per_s = elements as f64 / seconds;
    Ok(AdamRate { bytes_per_s: bytes * params_per_s, params_per_s })
}

fn elements_of(bytes: Bytes) -> usize {
    (bytes.0 / 4).max(1) as usize
}

/// Arrays in the kind of memory chunks have.
struct Arrays(Arena);

impl Arrays {
    fn new<const N: usize>(element_bytes: [u64; N], elements: usize) -> Result<Self, MemoryError> {
        let widest = element_bytes.into_iter().max().unwrap_or(4);
        let slot = (elements as u64).saturating_mul(widest).checked_next_multiple_of(64).unwrap_or(u64::MAX);
        let arena = Arena::new(Tier::Host, N as u32, Bytes(slot))?;
        // SAFETY: a fresh arena that nobody else has.
        unsafe { arena.prefault(0..arena.slots()) };
        Ok(Arrays(arena))
    }

    fn slices<T: bytemuck::Pod, const N: usize>(&mut self, elements: usize) -> [&mut [T]; N] {
        assert!(N as u32 <= self.0.slots() && (elements * size_of::<T>()) as u64 <= self.0.slot_bytes().0);
        std::array::from_fn(|slot| {
            let start = self.0.slot(SlotIndex(slot as u32)).cast::<T>();
            // SAFETY: slots are disjoint, zeroed by the mapping, aligned to a cache line and large enough; the exclusive
            // borrow of the arena covers them all.
            unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), elements) }
        })
    }
}

/// Least seconds of `repeats` runs on `threads` threads, after one that does not count.
fn best(repeats: usize, threads: usize, mut run: impl FnMut() + Send) -> Result<f64, MemoryError> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|error| MemoryError::Allocation {
        tier: Tier::Host,
        need: Bytes(0),
        source: std::io::Error::other(error),
    })?;
    Ok(pool.install(|| {
        run();
        let mut least = f64::INFINITY;
        for _ in 0..repeats.max(1) {
            let start = Instant::now();
            run();
            least = least.min(start.elapsed().as_secs_f64());
        }
        least
    }))
}

fn triad(a: &mut [f32], b: &[f32], c: &[f32]) {
    let (b, c) = (&b[..a.len()], &c[..a.len()]);
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_add_ps, _mm_loadu_ps, _mm_mul_ps, _mm_set1_ps, _mm_sfence, _mm_stream_ps};
        let whole = a.len() & !3;
        if (a.as_ptr() as usize).is_multiple_of(16) {
            // SAFETY: SSE is part of x86-64, every index is below `whole`, and stores are aligned to 16 bytes.
            unsafe {
                let s = _mm_set1_ps(3.0);
                for i in (0..whole).step_by(4) {
                    let sum =
                        _mm_add_ps(_mm_loadu_ps(b.as_ptr().add(i)), _mm_mul_ps(s, _mm_loadu_ps(c.as_ptr().add(i))));
                    _mm_stream_ps(a.as_mut_ptr().add(i), sum);
                }
                _mm_sfence();
            }
            for i in whole..a.len() {
                a[i] = b[i] + 3.0 * c[i];
            }
            return;
        }
    }
    for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
        *a = b + 3.0 * c;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_benchmark_gives_a_rate_and_the_triad_is_right() {
        let (b, c) = (vec![1.0; 103], vec![2.0; 103]);
        let mut a = vec![0.0; 103];
        for start in 0..5 {
            a.fill(0.0);
            triad(&mut a[start..], &b[start..], &c[start..]);
            assert!(a[start..].iter().all(|&x| x == 7.0));
        }
        for rate in [triad_bandwidth(Bytes(1 << 18), 2).unwrap(), copy_bandwidth(Bytes(1 << 18), 1).unwrap()] {
            assert!(rate.is_finite() && rate > 0.0);
        }
        for (precision, bytes) in [(Precision::Fp32, 28.0), (Precision::Bf16, 26.0), (Precision::Fp16, 28.0)] {
            let rate = adam_bandwidth(precision, PIECE + 3, 2).unwrap();
            assert!(rate.params_per_s > 0.0);
            assert!((rate.bytes_per_s / rate.params_per_s - bytes).abs() < 1e-9);
        }
    }
}
