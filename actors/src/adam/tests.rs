//! The step against itself on every instruction set, and against an independent f64 reference.

use super::*;
use crate::types::Step;

struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    fn unit(&mut self) -> f32 {
        self.bits() as f32 / u32::MAX as f32 * 2.0 - 1.0
    }

    /// Any bit pattern now and then, zeros, denormals, infinities, huge values, and ordinary numbers.
    fn wild(&mut self) -> f32 {
        match self.bits() % 12 {
            0 => 0.0,
            1 => -0.0,
            2 => f32::from_bits(self.bits() & 0x807f_ffff),
            3 => f32::INFINITY,
            4 => self.unit() * 3e38,
            5 => self.unit() * 1e-30,
            6 => f32::from_bits(self.bits()),
            _ => self.unit(),
        }
    }
}

fn same(a: f32, b: f32) -> bool {
    // A NaN is a NaN: its sign and payload are the only things IEEE 754 leaves open.
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

fn configs() -> Vec<(AdamConfig, bool)> {
    let mut all = Vec::new();
    for decoupled in [true, false] {
        for beta1 in [0.9, 0.3] {
            for decay in [true, false] {
                all.push((AdamConfig { beta1, decoupled, ..AdamConfig::default() }, decay));
            }
        }
    }
    all
}

type Fp32 = [Vec<f32>; 3];

fn one_by_one(s: &StepScalars, decay: bool, [w, m, v]: &mut Fp32, g: &[f32]) {
    for i in 0..g.len() {
        let (w, m, v) = (&mut w[i..=i], &mut m[i..=i], &mut v[i..=i]);
        step_fp32_with(Isa::Scalar, s, decay, std::hint::black_box(w), m, v, &g[i..=i]);
    }
}

#[test]
fn every_instruction_set_gives_the_bits_of_one_element_at_a_time() {
    let mut random = Random(1);
    for (config, decay) in configs() {
        for len in 0..=67 {
            for start in 0..3 {
                let size = len + start;
                let state: Fp32 = std::array::from_fn(|_| (0..size).map(|_| random.wild()).collect());
                let g: Vec<f32> = (0..size).map(|_| random.wild()).collect();
                let s = StepScalars::new(&config, 1e-3, Step(1 + len as u64), 0.7);
                let mut expected: Fp32 = state.clone().map(|x| x[start..].to_vec());
                one_by_one(&s, decay, &mut expected, &g[start..]);
                for isa in Isa::available() {
                    let [mut w, mut m, mut v] = state.clone();
                    step_fp32_with(isa, &s, decay, &mut w[start..], &mut m[start..], &mut v[start..], &g[start..]);
                    for (got, want) in [w, m, v].iter().zip(&expected) {
                        assert!(got[start..].iter().zip(want).all(|(a, b)| same(*a, *b)), "{isa:?} {config:?} {len}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_thousand_steps_have_the_same_bits_on_every_instruction_set_and_in_both_layouts() {
    const N: usize = 131;
    for (config, decay) in configs() {
        let mut random = Random(7);
        let start: Vec<f32> = (0..N).map(|_| random.unit()).collect();
        let mut plain: Fp32 = [start.clone(), vec![0.0; N], vec![0.0; N]];
        let sets: Vec<Isa> = Isa::available().collect();
        let mut fp32: Vec<Fp32> = sets.iter().map(|_| plain.clone()).collect();
        let (high, low): (Vec<u16>, Vec<u16>) = start.iter().map(|&w| split_f32(w)).unzip();
        let mut split: Vec<_> = sets.iter().map(|_| (high.clone(), low.clone(), vec![0.0; N], vec![0.0; N])).collect();
        for step in 1..=1000 {
            let bits: Vec<u16> = (0..N).map(|_| half::bf16::from_f32(random.unit() * 0.1).to_bits()).collect();
            let g: Vec<f32> = bits.iter().map(|&b| half::bf16::from_bits(b).to_f32()).collect();
            let s = StepScalars::new(&config, 1e-3, Step(step), 0.9);
            one_by_one(&s, decay, &mut plain, &g);
            for (isa, [w, m, v]) in sets.iter().zip(&mut fp32) {
                step_fp32_with(*isa, &s, decay, w, m, v, &g);
            }
            for (isa, (high, low, m, v)) in sets.iter().zip(&mut split) {
                step_bf16_with(*isa, &s, decay, high, low, m, v, &bits);
            }
        }
        assert!(plain[0].iter().all(|w| w.is_finite()));
        for state in &fp32 {
            assert_eq!(state, &plain);
        }
        for (high, low, m, v) in &split {
            let w: Vec<f32> = high.iter().zip(low).map(|(&h, &l)| join(h, l)).collect();
            assert_eq!([&w, m, v], plain.each_ref());
        }
    }
}

#[test]
fn split_weights_agree_on_wild_data() {
    let mut random = Random(3);
    for (config, decay) in configs() {
        for len in 0..=67 {
            let words = |random: &mut Random| -> Vec<u16> { (0..len).map(|_| random.bits() as u16).collect() };
            let (high, low, g) = (words(&mut random), words(&mut random), words(&mut random));
            let m: Vec<f32> = (0..len).map(|_| random.wild()).collect();
            let s = StepScalars::new(&config, 1e-3, Step(9), 1.0);
            let (mut high1, mut low1, mut m1, mut v1) = (high.clone(), low.clone(), m.clone(), m.clone());
            for i in 0..len {
                let (h, l) = (&mut high1[i..=i], &mut low1[i..=i]);
                step_bf16_with(Isa::Scalar, &s, decay, h, l, &mut m1[i..=i], &mut v1[i..=i], &g[i..=i]);
            }
            for isa in Isa::available() {
                let (mut high, mut low, mut m, mut v) = (high.clone(), low.clone(), m.clone(), m.clone());
                step_bf16_with(isa, &s, decay, &mut high, &mut low, &mut m, &mut v, &g);
                assert_eq!((&high, &low), (&high1, &low1), "{isa:?}");
                assert!(m.iter().zip(&m1).chain(v.iter().zip(&v1)).all(|(a, b)| same(*a, *b)));
            }
        }
    }
}

#[test]
fn fp16_has_the_bits_of_fp32_and_rounds_the_weight() {
    let mut random = Random(23);
    for (config, decay) in configs() {
        for len in [0, 1, 15, 16, 33, 67] {
            let g: Vec<u16> = (0..len).map(|_| random.bits() as u16).collect();
            let states: Fp32 = std::array::from_fn(|_| (0..len).map(|_| random.wild()).collect());
            let s = StepScalars::new(&config, 1e-3, Step(9), 1.0 / 1024.0);
            let wide: Vec<f32> = g.iter().map(|&bits| half::f16::from_bits(bits).to_f32()).collect();
            let mut expected = states.clone();
            one_by_one(&s, decay, &mut expected, &wide);
            for isa in Isa::available() {
                let ([mut master, mut m, mut v], mut weight) = (states.clone(), vec![0; len]);
                step_fp16_with(isa, &s, decay, &mut weight, &mut master, &mut m, &mut v, &g);
                for (got, want) in [&master, &m, &v].into_iter().zip(&expected) {
                    assert!(got.iter().zip(want).all(|(a, b)| same(*a, *b)), "{isa:?}");
                }
                for (weight, master) in weight.iter().zip(&master) {
                    let rounded = half::f16::from_f32(*master);
                    assert!(rounded.is_nan() || rounded.to_bits() == *weight, "{isa:?}: {master}");
                }
            }
        }
    }
}

#[test]
fn ten_steps_agree_with_the_formulas_in_f64() {
    for (config, decay) in configs() {
        let mut random = Random(5);
        let mut state: Fp32 = [(0..100).map(|_| random.unit()).collect(), vec![0.0; 100], vec![0.0; 100]];
        let mut exact: Vec<[f64; 3]> = state[0].iter().map(|&w| [f64::from(w), 0.0, 0.0]).collect();
        let lr = 1e-2;
        for step in 1..=10 {
            let g: Vec<f32> = (0..100).map(|_| random.unit()).collect();
            let [w, m, v] = &mut state;
            step_fp32(&StepScalars::new(&config, lr, Step(step), 0.5), decay, w, m, v, &g);
            for ([w, m, v], &g) in exact.iter_mut().zip(&g) {
                let mut g = 0.5 * f64::from(g);
                let decay = if decay { config.weight_decay } else { 0.0 };
                if config.decoupled {
                    *w -= lr * decay * *w;
                } else {
                    g += decay * *w;
                }
                *m = config.beta1 * *m + (1.0 - config.beta1) * g;
                *v = config.beta2 * *v + (1.0 - config.beta2) * g * g;
                let m_hat = *m / (1.0 - config.beta1.powi(step as i32));
                let v_hat = *v / (1.0 - config.beta2.powi(step as i32));
                *w -= lr * m_hat / (v_hat.sqrt() + config.eps);
            }
        }
        for (i, exact) in exact.iter().enumerate() {
            for kind in 0..3 {
                let (got, want) = (f64::from(state[kind][i]), exact[kind]);
                assert!((got - want).abs() <= 2e-6 * want.abs().max(0.1), "{config:?} {kind}: {got} {want}");
            }
        }
    }
}

#[test]
fn a_gradient_scale_of_one_and_no_decay_change_nothing() {
    let config = AdamConfig::default();
    let none = AdamConfig { weight_decay: 0.0, ..config };
    let run = |config: &AdamConfig, decay| {
        let (mut w, mut m, mut v) = (vec![0.25f32, -0.0, 1e-40], vec![0.0; 3], vec![0.0; 3]);
        step_fp32(&StepScalars::new(config, 1e-3, Step(1), 1.0), decay, &mut w, &mut m, &mut v, &[0.1, 0.0, -0.0]);
        [w, m, v].map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
    };
    assert_eq!(run(&config, false), run(&none, true));
    assert_ne!(run(&config, true), run(&none, true));
    let l2 = AdamConfig { decoupled: false, ..config };
    assert_eq!(run(&l2, false), run(&none, true));
}
