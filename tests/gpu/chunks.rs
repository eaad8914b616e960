//! Chunk arithmetic on the GPU: the optimizer's step and the sums of rows have the bits of the host's.

#![expect(unsafe_code, reason = "tests bind parameters and call kernels by address")]

use std::sync::Arc;

use half::bf16;
use patrickstar_actors::adam::{self, AdamConfig, StepScalars};
use patrickstar_actors::memory::{Backend, CudaBackend, DeviceMath, Rows, Slab, SlotIndex, StateAddresses, Stream};
use patrickstar_actors::types::{Bytes, Precision, Step};

use crate::compare::mix;
use crate::{PRECISIONS, ops};

const STEPS: u64 = 1000;
/// No multiple of anything.
const ELEMENTS: usize = 10_007;

pub fn backend() -> CudaBackend {
    let ops = ops();
    CudaBackend::new(Arc::clone(ops.gpu()), Arc::clone(ops.stream()))
}

/// Device memory for some states, and a stream to copy them.
struct Memory {
    slab: Box<dyn Slab>,
    stream: Box<dyn Stream>,
}

impl Memory {
    fn new(slots: u32, bytes: usize) -> Self {
        let backend = backend();
        let slot = Bytes((bytes as u64).next_multiple_of(256));
        Memory { slab: backend.device_slab(slots, slot).unwrap(), stream: backend.new_stream("test").unwrap() }
    }

    fn address(&self, slot: u32) -> *mut u8 {
        self.slab.slot(SlotIndex(slot)).as_ptr()
    }

    fn upload<T: bytemuck::Pod>(&mut self, slot: u32, values: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        // SAFETY: the slot has room, and the copy is over when this returns.
        unsafe { self.stream.copy(bytes.as_ptr(), self.address(slot), bytes.len()) }.unwrap();
        self.stream.record().unwrap().synchronize().unwrap();
    }

    fn download<T: bytemuck::Pod>(&mut self, slot: u32, count: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); count];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        // SAFETY: as above.
        unsafe { self.stream.copy(self.address(slot), bytes.as_mut_ptr(), bytes.len()) }.unwrap();
        self.stream.record().unwrap().synchronize().unwrap();
        values
    }
}

/// States of the optimizer in host memory, bits by bits. `weight` holds halves where weights are bf16.
struct States {
    weight: Vec<f32>,
    high: Vec<u16>,
    low: Vec<u16>,
    momentum: Vec<f32>,
    variance: Vec<f32>,
}

/// Zeros of both signs, denormals, numbers whose square overflows, and ordinary ones of many sizes.
fn number(seed: u64) -> f32 {
    let bits = mix(seed);
    let sign = (bits as u32 & 1) << 31;
    let mantissa = (bits >> 8) as u32 & 0x007F_FFFF;
    match (bits >> 33) % 16 {
        0 | 1 => f32::from_bits(sign),
        2 | 3 => f32::from_bits(sign | mantissa),
        4 => f32::from_bits(sign | (127 - 126 + (bits >> 40) as u32 % 8) << 23 | mantissa),
        _ => f32::from_bits(sign | (127 - 24 + (bits >> 40) as u32 % 26) << 23 | mantissa),
    }
}

/// As `number`; every 16th element gets gradients up to the largest there are, whose squares are infinite.
fn gradient(step: u64, index: usize) -> f32 {
    let seed = step << 20 ^ index as u64;
    let value = number(seed);
    if !index.is_multiple_of(16) || !mix(seed ^ 0xBEEF).is_multiple_of(8) {
        return value;
    }
    f32::from_bits(value.to_bits() & 0x807F_FFFF | (254 - mix(seed) as u32 % 40) << 23)
}

impl States {
    fn new() -> Self {
        let weight: Vec<f32> = (0..ELEMENTS as u64).map(|i| number(i ^ 0xABCD_0000)).collect();
        let (high, low) = weight.iter().map(|&weight| adam::split_f32(weight)).unzip();
        States { high, low, momentum: vec![0.0; ELEMENTS], variance: vec![0.0; ELEMENTS], weight }
    }
}

const WEIGHT: u32 = 0;
const LOW: u32 = 1;
const MOMENTUM: u32 = 2;
const VARIANCE: u32 = 3;
const GRADIENT: u32 = 4;
const MASTER: u32 = 5;

fn same(what: &str, step: u64, host: &[u32], device: &[u32], is_nan: impl Fn(u32) -> bool) {
    for (index, (host, device)) in host.iter().zip(device).enumerate() {
        // The payload of a NaN is the one freedom that the contract leaves.
        let same = host == device || is_nan(*host) && is_nan(*device);
        assert!(same, "{what} {index} after step {step}: {host:08x} on the host, {device:08x} on the GPU");
    }
}

fn same_floats(what: &str, step: u64, host: &[f32], device: &[f32]) {
    same(what, step, bytemuck::cast_slice(host), bytemuck::cast_slice(device), |bits| f32::from_bits(bits).is_nan());
}

fn same_halves(what: &str, step: u64, host: &[u16], device: &[u16]) {
    let wide = |values: &[u16]| values.iter().map(|&value| u32::from(value)).collect::<Vec<u32>>();
    same(what, step, &wide(host), &wide(device), |_| false);
}

/// The sign of a NaN is free as well.
fn same_fp16(what: &str, step: u64, host: &[u16], device: &[u16]) {
    let wide = |values: &[u16]| values.iter().map(|&value| u32::from(value)).collect::<Vec<u32>>();
    same(what, step, &wide(host), &wide(device), |bits| bits & 0x7fff > 0x7c00);
}

/// Steps host and device side by side.
fn walk(precision: Precision, config: &AdamConfig, decay: bool, gradient_scale: f32) {
    let math = backend().math().unwrap().expect("a GPU has arithmetic of its own");
    let mut memory = Memory::new(6, 4 * ELEMENTS);
    let mut host = States::new();
    match precision {
        Precision::Fp32 => memory.upload(WEIGHT, &host.weight),
        Precision::Bf16 => memory.upload(WEIGHT, &host.high),
        Precision::Fp16 => memory.upload(MASTER, &host.weight),
    }
    memory.upload(LOW, &host.low);
    memory.upload(MOMENTUM, &host.momentum);
    memory.upload(VARIANCE, &host.variance);
    let states = StateAddresses {
        weight: memory.address(WEIGHT),
        low: if precision == Precision::Bf16 { memory.address(LOW) } else { std::ptr::null_mut() },
        master: if precision == Precision::Fp16 { memory.address(MASTER) } else { std::ptr::null_mut() },
        momentum: memory.address(MOMENTUM),
        variance: memory.address(VARIANCE),
        gradient: memory.address(GRADIENT),
    };
    for step in 1..=STEPS {
        let scalars = StepScalars::new(config, 1e-3 * (1.0 + step as f64 % 7.0), Step(step), gradient_scale);
        let wide: Vec<f32> = (0..ELEMENTS).map(|index| gradient(step, index)).collect();
        let narrow: Vec<u16> = wide.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
        let (m, v) = (&mut host.momentum[..], &mut host.variance[..]);
        match precision {
            Precision::Fp32 => {
                memory.upload(GRADIENT, &wide);
                adam::step_fp32(&scalars, decay, &mut host.weight, m, v, &wide);
            }
            Precision::Bf16 => {
                memory.upload(GRADIENT, &narrow);
                adam::step_bf16(&scalars, decay, &mut host.high, &mut host.low, m, v, &narrow);
            }
            Precision::Fp16 => {
                let narrow: Vec<u16> = wide.iter().map(|&value| adam::narrow_fp16(value)).collect();
                memory.upload(GRADIENT, &narrow);
                adam::step_fp16(&scalars, decay, &mut host.high, &mut host.weight, m, v, &narrow);
            }
        }
        // SAFETY: slots with room for the elements, which nobody else uses.
        unsafe { math.step(precision, &scalars, decay, states, ELEMENTS) }.unwrap();
        math.finish().unwrap();
        if !step.is_multiple_of(50) && step > 3 {
            continue;
        }
        same_floats("momentum", step, &host.momentum, &memory.download(MOMENTUM, ELEMENTS));
        same_floats("variance", step, &host.variance, &memory.download(VARIANCE, ELEMENTS));
        match precision {
            Precision::Fp32 => same_floats("weight", step, &host.weight, &memory.download(WEIGHT, ELEMENTS)),
            Precision::Bf16 => {
                same_halves("weight", step, &host.high, &memory.download(WEIGHT, ELEMENTS));
                same_halves("low half", step, &host.low, &memory.download(LOW, ELEMENTS));
            }
            Precision::Fp16 => {
                same_floats("master", step, &host.weight, &memory.download(MASTER, ELEMENTS));
                same_fp16("weight", step, &host.high, &memory.download(WEIGHT, ELEMENTS));
            }
        }
    }
    // The data kept what it is for until the end. In fp16 huge gradients are infinite, and with decay in the gradient
    // soon no number.
    assert!(host.variance.iter().any(|v| !v.is_finite()) && host.variance.iter().any(|v| v.is_finite()));
    assert!(host.momentum.iter().any(|m| m.is_normal()));
}

#[test]
fn adamw_has_the_bits_of_the_host() {
    for precision in PRECISIONS {
        walk(precision, &AdamConfig::default(), true, 1.0);
    }
}

#[test]
fn adamw_without_decay_and_with_clipping_has_the_bits_of_the_host() {
    for precision in PRECISIONS {
        walk(precision, &AdamConfig::default(), false, 0.37);
    }
}

#[test]
fn adam_with_decay_in_the_gradient_has_the_bits_of_the_host() {
    for precision in PRECISIONS {
        let config = AdamConfig { decoupled: false, weight_decay: 0.1, ..AdamConfig::default() };
        walk(precision, &config, true, 1.0);
    }
}

/// A momentum that forgets fast interpolates from its other end.
#[test]
fn adam_with_a_short_memory_has_the_bits_of_the_host() {
    for precision in PRECISIONS {
        let config = AdamConfig { beta1: 0.3, beta2: 0.95, ..AdamConfig::default() };
        walk(precision, &config, true, 1.0);
    }
}

/// A step of few elements leaves its neighbours alone.
#[test]
fn a_step_writes_its_elements_only() {
    let math = backend().math().unwrap().expect("a GPU has arithmetic of its own");
    for elements in [1, 3, 255, 1023, 1025] {
        let mut memory = Memory::new(5, 4 * 2048);
        (0..4).for_each(|slot| memory.upload(slot, &[1.5f32; 2048]));
        memory.upload(GRADIENT, &[0.25f32; 2048]);
        let states = StateAddresses {
            weight: memory.address(WEIGHT),
            low: memory.address(LOW),
            master: std::ptr::null_mut(),
            momentum: memory.address(MOMENTUM),
            variance: memory.address(VARIANCE),
            gradient: memory.address(GRADIENT),
        };
        let scalars = StepScalars::new(&AdamConfig::default(), 1e-2, Step(1), 1.0);
        // SAFETY: slots with room for the elements, which nobody else uses.
        unsafe { math.step(Precision::Fp32, &scalars, true, states, elements) }.unwrap();
        math.finish().unwrap();
        for slot in [WEIGHT, MOMENTUM, VARIANCE] {
            let values = memory.download::<f32>(slot, 2048);
            assert!(values[..elements].iter().all(|&value| value != 1.5), "slot {slot}, {elements}: not all written");
            assert!(values[elements..].iter().all(|&value| value == 1.5), "slot {slot}, {elements}: too much written");
        }
        assert!(memory.download::<f32>(LOW, 2048).iter().all(|&value| value == 1.5), "fp32 has no low halves");
    }
}

fn row_sums(math: &dyn DeviceMath, precision: Precision, [rows, columns]: [usize; 2], odd: Option<f32>) {
    let mut values: Vec<f32> = (0..rows * columns).map(|index| gradient(1, index)).collect();
    if let Some(odd) = odd {
        values[rows * columns / 2] = odd;
    }
    let narrow: Vec<u16> = values.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
    let mut memory = Memory::new(1, 4 * rows * columns);
    let expected: Vec<f64> = match precision {
        Precision::Fp32 => {
            memory.upload(0, &values);
            values.chunks(columns).map(adam::sum_of_squares).collect()
        }
        Precision::Bf16 => {
            memory.upload(0, &narrow);
            narrow.chunks(columns).map(adam::sum_of_squares_bf16).collect()
        }
        Precision::Fp16 => {
            let narrow: Vec<u16> = values.iter().map(|&value| adam::narrow_fp16(value)).collect();
            memory.upload(0, &narrow);
            narrow.chunks(columns).map(adam::sum_of_squares_fp16).collect()
        }
    };
    // Twice, at the same time: each has its own place for sums.
    let gradient = Rows { gradient: memory.address(0), rows, columns };
    // SAFETY: the slot holds that many elements.
    let [first, sums] = unsafe { math.row_sums(precision, &[gradient, gradient]) }.unwrap().try_into().unwrap();
    assert_eq!(first.len(), rows);
    assert!(first.iter().zip(&sums).all(|(a, b)| a.to_bits() == b.to_bits()), "the same gradient has other sums");
    for (row, (got, want)) in sums.iter().zip(&expected).enumerate() {
        // What is no number has other bits on other machines.
        assert!(
            got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
            "row {row} of {rows} x {columns} in {precision:?}: {got:e} on the GPU, {want:e} on the host"
        );
    }
    if let Some(odd) = odd {
        let sum = sums[rows / 2];
        assert!(if odd.is_nan() { sum.is_nan() } else { sum.is_infinite() }, "{odd} becomes {sum} in {precision:?}");
    }
}

#[test]
fn sums_of_rows_have_the_bits_of_the_host() {
    let math = backend().math().unwrap().expect("a GPU has arithmetic of its own");
    for precision in PRECISIONS {
        for shape in [
            [1, 1],
            [1, 100_003],
            [3, 7],
            [31, 33],
            [129, 127],
            [33, 15],
            [34, 16],
            [35, 17],
            [1000, 2049],
            [2049, 31],
            [64, 4096],
        ] {
            row_sums(math.as_ref(), precision, shape, None);
        }
        for odd in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            // Staged and not, and a tail.
            for shape in [[33, 1000], [33, 1024], [3, 7]] {
                row_sums(math.as_ref(), precision, shape, Some(odd));
            }
        }
    }
}
