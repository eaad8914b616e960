//! What the tests of operations share: a place where operations run, parameters that are bound there, and the comparison
//! of a backward with finite differences of its forward.

#![expect(unsafe_code, reason = "tests bind parameters and call kernels by address")]
#![allow(dead_code)] // each test program uses its part of it

pub mod checks;
pub mod definitions;
pub mod masks;
pub mod near;

use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};
use patrickstar::model::compute::Compute;
use patrickstar::model::param::{Param, ParamTile};
use patrickstar::model::tape::{Activation, Tape};
use patrickstar::{Context, Init, model::rng};
use patrickstar_actors::types::{Precision, Step, Tier};

/// Where operations run, and what weights are stored as. On the host activations are fp32; on a GPU they have the type of
/// the weights.
#[derive(Clone)]
pub struct Place {
    pub compute: Compute,
    pub precision: Precision,
    /// Where parameters lie; not on the device for operations that look up rows in host memory.
    pub tier: Tier,
}

/// A parameter in a vector, and its gradient.
pub struct Owned {
    pub name: &'static str,
    pub shape: Vec<usize>,
    pub precision: Precision,
    pub weight: Vec<u32>,
    pub gradient: Vec<u32>,
    pub rows_per_tile: usize,
}

/// A parameter that is bound to memory where operations run.
struct Bound {
    param: Param,
    /// Tensors in device memory, a tile each; none on the host, where the parameter lies in the vectors themselves.
    gradients: Vec<Tensor>,
    _weights: Vec<Tensor>,
}

impl Place {
    pub fn host(precision: Precision) -> Self {
        Place { compute: Compute::Cpu, precision, tier: Tier::Device }
    }

    pub fn is_host(&self) -> bool {
        matches!(self.compute, Compute::Cpu)
    }

    /// Element type of activations.
    pub fn dtype(&self) -> DType {
        if self.is_host() { DType::F32 } else { stored(self.precision) }
    }

    /// Rounds as an activation here would be.
    pub fn round(&self, value: f32) -> f32 {
        match self.dtype() {
            DType::BF16 => bf16::from_f32(value).to_f32(),
            DType::F16 => f16::from_f32(value).to_f32(),
            _ => value,
        }
    }

    /// `values` as an activation.
    pub fn tensor(&self, values: &[f32], shape: &[usize]) -> Tensor {
        let tensor = Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
        tensor.to_dtype(self.dtype()).unwrap().to_device(&self.compute.device()).unwrap()
    }

    /// Calls `run` with `owned` bound, and copies gradients back if there are any.
    pub fn with_params<R>(&self, owned: &mut [Owned], gradients: bool, run: impl FnOnce(&[Param]) -> R) -> R {
        let bound: Vec<Bound> = owned.iter_mut().map(|owned| owned.bind(self, gradients)).collect();
        let params: Vec<Param> = bound.iter().map(|bound| bound.param.clone()).collect();
        let result = run(&params);
        for (owned, bound) in owned.iter_mut().zip(bound) {
            bound.param.release();
            owned.fetch(&bound);
        }
        result
    }
}

/// Element type in which weights are stored.
fn stored(precision: Precision) -> DType {
    match precision {
        Precision::Fp32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::Fp16 => DType::F16,
    }
}

/// The elements of a tensor, wherever and whatever it is.
pub fn floats_of(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

impl Owned {
    pub fn new(name: &'static str, shape: &[usize], precision: Precision) -> Self {
        Self::from_values(name, shape, precision, &random(name, shape.iter().product()))
    }

    pub fn from_values(name: &'static str, shape: &[usize], precision: Precision, values: &[f32]) -> Self {
        let (weight, gradient) = (vec![0; values.len()], vec![0; values.len()]);
        let mut owned = Owned { name, shape: shape.to_vec(), precision, weight, gradient, rows_per_tile: shape[0] };
        values.iter().enumerate().for_each(|(i, &value)| owned.set(i, value));
        owned
    }

    pub fn tiled(mut self, rows_per_tile: usize) -> Self {
        self.rows_per_tile = rows_per_tile;
        self
    }

    pub fn read(&self, words: &[u32], i: usize) -> f32 {
        match self.precision {
            Precision::Fp32 => f32::from_bits(words[i]),
            Precision::Bf16 => bytemuck::cast_slice::<u32, bf16>(words)[i].to_f32(),
            Precision::Fp16 => bytemuck::cast_slice::<u32, f16>(words)[i].to_f32(),
        }
    }

    fn write(precision: Precision, words: &mut [u32], i: usize, value: f32) {
        match precision {
            Precision::Fp32 => words[i] = value.to_bits(),
            Precision::Bf16 => bytemuck::cast_slice_mut::<u32, bf16>(words)[i] = bf16::from_f32(value),
            Precision::Fp16 => bytemuck::cast_slice_mut::<u32, f16>(words)[i] = f16::from_f32(value),
        }
    }

    pub fn set(&mut self, i: usize, value: f32) {
        Self::write(self.precision, &mut self.weight, i, value);
    }

    /// The gradient so far.
    pub fn gradients(&self) -> Vec<f32> {
        (0..self.gradient.len()).map(|i| self.read(&self.gradient, i)).collect()
    }

    /// Begins with a gradient that an earlier micro-batch may have left, and returns it as it is stored.
    pub fn begin_with(&mut self, values: &[f32]) -> Vec<f32> {
        let precision = self.precision;
        values.iter().enumerate().for_each(|(i, &value)| Self::write(precision, &mut self.gradient, i, value));
        self.gradients()
    }

    /// The weights as they are stored.
    pub fn weights(&self) -> Vec<f32> {
        (0..self.weight.len()).map(|i| self.read(&self.weight, i)).collect()
    }

    pub fn columns(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// First row and number of rows of each tile.
    fn tiles(&self) -> impl Iterator<Item = (usize, usize)> {
        let (all, height) = (self.shape[0], self.rows_per_tile);
        (0..all).step_by(height).map(move |first| (first, height.min(all - first)))
    }

    /// An unbound parameter of this name and shape.
    fn unbound(&self) -> Param {
        let panel = (self.rows_per_tile < self.shape[0]).then_some(self.rows_per_tile);
        Param::new(self.name, &self.shape, self.precision, panel)
    }

    /// On the host to the vectors themselves; they must outlive the parameter and keep their size.
    pub fn param(&mut self) -> Param {
        self.bind(&Place::host(self.precision), true).param
    }

    fn bind(&mut self, place: &Place, gradients: bool) -> Bound {
        let in_vectors = place.is_host() || place.tier == Tier::Host;
        let bound = if in_vectors { self.bind_host(gradients) } else { self.bind_device(place, gradients) };
        let (param, tiles) = (bound.0.in_tier(place.tier), bound.1);
        // SAFETY: host tiles lie in the vectors, which no test drops before the parameter, and device tiles in the tensors
        // kept beside it.
        unsafe { param.bind(tiles) };
        Bound { param, gradients: bound.2, _weights: bound.3 }
    }

    fn bind_host(&mut self, gradients: bool) -> (Param, Vec<ParamTile>, Vec<Tensor>, Vec<Tensor>) {
        let row_bytes = self.columns() * if self.precision == Precision::Fp32 { 4 } else { 2 };
        let (weight, gradient) = (self.weight.as_ptr().cast::<u8>(), self.gradient.as_mut_ptr().cast::<u8>());
        let tiles = self
            .tiles()
            .map(|(row_start, rows)| ParamTile {
                row_start,
                rows,
                weight: weight.wrapping_add(row_start * row_bytes),
                gradient: if gradients { gradient.wrapping_add(row_start * row_bytes) } else { std::ptr::null_mut() },
            })
            .collect();
        (self.unbound(), tiles, Vec::new(), Vec::new())
    }

    /// Each tile in an allocation of exactly its size, so that a checker of memory sees every step outside.
    fn bind_device(&self, place: &Place, gradients: bool) -> (Param, Vec<ParamTile>, Vec<Tensor>, Vec<Tensor>) {
        let upload = |words: &[u32], first: usize, rows: usize| {
            let range = first * self.columns()..(first + rows) * self.columns();
            let values: Vec<f32> = range.map(|i| self.read(words, i)).collect();
            let tensor = Tensor::from_vec(values, rows * self.columns(), &Device::Cpu).unwrap();
            tensor.to_dtype(stored(self.precision)).unwrap().to_device(&place.compute.device()).unwrap()
        };
        let (mut tiles, mut to_gradients, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for (row_start, rows) in self.tiles() {
            let weight = upload(&self.weight, row_start, rows);
            let mut tile = ParamTile {
                row_start,
                rows,
                weight: place.compute.address(&weight).unwrap(),
                gradient: std::ptr::null_mut(),
            };
            if gradients {
                let gradient = upload(&self.gradient, row_start, rows);
                tile.gradient = place.compute.address(&gradient).unwrap().cast_mut();
                to_gradients.push(gradient);
            }
            weights.push(weight);
            tiles.push(tile);
        }
        (self.unbound(), tiles, to_gradients, weights)
    }

    /// Copies gradients back from device memory.
    fn fetch(&mut self, bound: &Bound) {
        let values = bound.gradients.iter().flat_map(floats_of);
        values.enumerate().for_each(|(i, value)| Self::write(self.precision, &mut self.gradient, i, value));
    }
}

pub fn random(name: &str, elements: usize) -> Vec<f32> {
    let mut values = vec![0f32; elements];
    rng::fill(Init::Normal { std: 0.7 }, 5, name, 0, &mut values);
    values
}

pub fn context(training: bool) -> Context {
    let step = Step(3);
    Context { seed: 9, step, micro: 1, block: 2, training, targets: None, target_count: 5 }
}

pub type Op<'a> = &'a dyn Fn(&Activation, &[Param], &Context) -> Result<Activation>;

/// `x` on a tape of the host that forgets.
pub fn constant(x: &Tensor) -> Activation {
    Tape::forgetting(&Compute::Cpu).constant(x.clone())
}

pub fn floats(shape: &[usize]) -> Tensor {
    Tensor::from_vec(random("x", shape.iter().product()), shape, &Device::Cpu).unwrap()
}

/// The outputs for `x`, and the most by which their type has rounded each.
fn outputs(place: &Place, x: &Tensor, owned: &mut [Owned], op: Op<'_>) -> (Vec<f32>, f64) {
    place.with_params(owned, false, |params| {
        let tape = Tape::forgetting(&place.compute);
        let out = op(&tape.constant(put(place, x)), params, &context(true)).unwrap().tensor().unwrap();
        // Half a unit in the last place, and as much again for what is rounded on the way, such as probabilities.
        let unit = match out.dtype() {
            DType::BF16 => 2f64.powi(-7),
            DType::F16 => 2f64.powi(-10),
            _ => 0.0,
        };
        (floats_of(&out), unit)
    })
}

/// An input that lies in host memory as an activation; token ids stay there on every backend.
fn put(place: &Place, x: &Tensor) -> Tensor {
    if x.dtype() == DType::F32 { place.tensor(&floats_of(x), x.dims()) } else { x.clone() }
}

pub fn upstream(place: &Place, elements: usize) -> Vec<f32> {
    if elements == 1 {
        return vec![1.0];
    }
    random("upstream", elements).into_iter().map(|value| place.round(value)).collect()
}

/// Adds to the parameters' gradients and returns the output and the input's gradient.
pub fn run(place: &Place, x: &Tensor, owned: &mut [Owned], op: Op<'_>) -> (Vec<f32>, Vec<f32>) {
    run_from(place, x, owned, &|elements| upstream(place, elements), op)
}

/// As [`run`], with the output's gradient by `upstream`.
pub fn run_from(
    place: &Place,
    x: &Tensor,
    owned: &mut [Owned],
    upstream: &dyn Fn(usize) -> Vec<f32>,
    op: Op<'_>,
) -> (Vec<f32>, Vec<f32>) {
    place.with_params(owned, true, |params| {
        let tape = Tape::recording(&place.compute);
        let put = put(place, x);
        // Integers have no gradient.
        let input = if x.dtype() == DType::F32 { tape.input(put) } else { tape.constant(put) };
        let out = op(&input, params, &context(true)).unwrap();
        let value = floats_of(&out.tensor().unwrap());
        // A loss has no upstream.
        let weights = (!out.dims().is_empty()).then(|| place.tensor(&upstream(out.elements()), out.dims()));
        let gradient = tape.backward(&out, weights, &input).unwrap();
        (value, gradient.map_or(Vec::new(), |gradient| floats_of(&gradient)))
    })
}

fn close(what: &str, numeric: f64, analytic: f64, allowed: f64) {
    assert!(
        (numeric - analytic).abs() <= allowed,
        "{what}: {numeric} by differences, {analytic} by backward, more than {allowed} apart"
    );
}

/// Half the distance over which a difference is taken in fp32.
const STEP: f32 = 1e-2;

/// Half the distance over which a difference is taken between numbers of 16 bits, and what it may be off beside the
/// rounding of the outputs, relative to the largest derivative: the roundings of a gradient on its way, and the third
/// derivative, which a step this wide does not leave out. `None` where numbers are fp32.
fn narrow_step(dtype: DType) -> Option<(f32, f64)> {
    match dtype {
        // Numbers near 1 are 1/128 apart.
        DType::BF16 => Some((0.125, 3e-2)),
        // And these 1/1024.
        DType::F16 => Some((0.0625, 8e-3)),
        _ => None,
    }
}

/// The outputs above and below, weighted: their difference, and by how much rounding may have changed it.
fn difference(place: &Place, up: &(Vec<f32>, f64), down: &(Vec<f32>, f64)) -> (f64, f64) {
    let weights = upstream(place, up.0.len());
    let (mut sum, mut slack) = (0.0, 0.0);
    for ((up, down), weight) in up.0.iter().zip(&down.0).zip(&weights) {
        sum += (f64::from(*up) - f64::from(*down)) * f64::from(*weight);
        if up != down {
            slack += f64::from((up.abs() + down.abs()) * weight.abs());
        }
    }
    (sum, slack * up.1)
}

/// Compares every derivative of `op` with a central difference. `tolerance` is relative to the largest derivative, where
/// numbers are fp32.
pub fn check(place: &Place, name: &str, x: &Tensor, owned: &mut [Owned], tolerance: f64, op: Op<'_>) {
    let (_, dx) = run(place, x, owned, op);
    let largest = |values: &[f32]| values.iter().fold(0f64, |most, v| most.max(f64::from(v.abs())));
    let narrow = narrow_step(place.dtype());
    let (step, within) = narrow.unwrap_or((STEP, tolerance));
    let values: Vec<f32> = if dx.is_empty() { Vec::new() } else { floats_of(x) };
    let scale = largest(&dx);
    for i in 0..dx.len() {
        let mut at = |delta: f32| {
            let mut moved = values.clone();
            moved[i] = place.round(values[i] + delta);
            (outputs(place, &Tensor::from_slice(&moved, x.shape(), &Device::Cpu).unwrap(), owned, op), moved[i])
        };
        let ((up, above), (down, below)) = (at(step), at(-step));
        let (sum, slack) = difference(place, &up, &down);
        let width = f64::from(above - below);
        let analytic = f64::from(dx[i]);
        let allowed = within * scale.max(analytic.abs()) + slack / width;
        close(&format!("{name}, input {i}"), sum / width, analytic, allowed);
    }
    for which in 0..owned.len() {
        let gradient = owned[which].gradients();
        let (scale, precision) = (largest(&gradient), owned[which].precision);
        assert!(scale > 0.0, "{name}, {}: no gradient", owned[which].name);
        // The weights that bf16 has are far apart, and its gradients have eight bits.
        let (delta, within) = match (precision, narrow) {
            (Precision::Fp32, _) => (STEP, tolerance),
            (Precision::Bf16 | Precision::Fp16, None) => (0.05, 2e-2),
            (Precision::Bf16 | Precision::Fp16, Some(narrow)) => narrow,
        };
        for (i, &analytic) in gradient.iter().enumerate() {
            let original = owned[which].read(&owned[which].weight, i);
            let mut at = |delta: f32| {
                owned[which].set(i, original + delta);
                let there = owned[which].read(&owned[which].weight, i);
                (outputs(place, x, owned, op), there)
            };
            let ((up, above), (down, below)) = (at(delta), at(-delta));
            owned[which].set(i, original);
            let (sum, slack) = difference(place, &up, &down);
            let (width, analytic) = (f64::from(above - below), f64::from(analytic));
            let allowed = within * scale.max(analytic.abs()) + slack / width;
            close(&format!("{name}, {} {i}", owned[which].name), sum / width, analytic, allowed);
        }
    }
    // A second micro-batch adds to the first. In bf16 the first was rounded, by 2^-8, and the sum of twice its size is.
    let once: Vec<Vec<f32>> = owned.iter().map(Owned::gradients).collect();
    run(place, x, owned, op);
    for (param, once) in owned.iter().zip(&once) {
        for (i, (two, one)) in param.gradients().iter().zip(once).enumerate() {
            let allowed = 1.2e-2 * one.abs();
            assert!((two - 2.0 * one).abs() <= allowed, "{name}, {} {i}: {one}, then {two}", param.name);
        }
    }
}
