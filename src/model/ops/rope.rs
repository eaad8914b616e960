//! Rotary position embedding (Su et al., 2021) of the heads in a packed buffer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, bail};

use crate::model::tape::Activation;

/// What is rotated, and by how much.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Heads at the beginning of each row that are rotated: queries and keys of a packed buffer.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a head that are rotated: an even number of them, the first ones.
    pub rotary_dim: usize,
    /// Base of the wavelengths: pair `i` turns by `theta^(-2 i / rotary_dim)` a position.
    pub theta: f64,
    /// Pairs are neighbours (2i, 2i + 1), as in the paper, and not (i, i + rotary_dim / 2), as Hugging Face has them.
    pub interleaved: bool,
}

/// Cosines and sines of the first positions.
pub(crate) struct Angles {
    /// (positions, rotary_dim / 2)
    pub cos: Vec<f32>,
    /// As `cos`.
    pub sin: Vec<f32>,
    /// At least as many as were asked for.
    pub positions: usize,
}

/// Rotates the first heads of `x` (batch, time, columns) by their index in time; the other columns stay as they are. The
/// gradient is rotated back.
pub fn rope(x: &Activation, rope: &Rope) -> Result<Activation> {
    rope.check(x.dims())?;
    let (compute, into_x, rope) = (x.compute().clone(), x.slot(), *rope);
    let forward = {
        let (compute, x) = (compute.clone(), x.clone());
        move || on!(&compute, rope(&x.tensor()?, &rope, 1))
    };
    x.tape().record_deferred(x.dims(), x.dtype(), forward, move |dy, gradients| {
        gradients.add(into_x, |before| {
            let gradient = on!(&compute, rope(&dy, &rope, -1))?;
            before.map_or(Ok(gradient.clone()), |before| super::sum(&compute, &before, &gradient))
        })
    })
}

impl Rope {
    fn check(&self, dims: &[usize]) -> Result<()> {
        let &Rope { heads, head_dim, rotary_dim, theta, .. } = self;
        let &[_, time, columns] = dims else { bail!("rope: {dims:?} is not (batch, time, columns)") };
        if heads * head_dim > columns || time == 0 {
            bail!("rope: {heads} heads of {head_dim} elements do not fit the {columns} columns of {dims:?}");
        }
        if heads == 0 || rotary_dim == 0 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
            bail!("rope: {rotary_dim} elements of {heads} heads of {head_dim} cannot be rotated in pairs");
        }
        if !theta.is_finite() || theta <= 0.0 {
            bail!("rope: the base {theta} is no positive number");
        }
        Ok(())
    }

    /// What tables for it are told apart by.
    pub(crate) fn key(&self) -> (u64, usize) {
        (self.theta.to_bits(), self.rotary_dim)
    }

    /// Cosines and sines for `time` positions or more, computed in f64 and rounded once. Kept for the next call: the
    /// table for a longer time begins with that for a shorter one.
    pub(crate) fn angles(&self, time: usize) -> Arc<Angles> {
        static TABLES: Mutex<BTreeMap<(u64, usize), Arc<Angles>>> = Mutex::new(BTreeMap::new());
        let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
        match tables.get(&self.key()) {
            Some(table) if table.positions >= time => Arc::clone(table),
            _ => {
                let table = Arc::new(self.compute_angles(time.next_power_of_two()));
                tables.insert(self.key(), Arc::clone(&table));
                table
            }
        }
    }

    fn compute_angles(&self, positions: usize) -> Angles {
        let pairs = 0..self.rotary_dim / 2;
        let steps: Vec<f64> = pairs.map(|i| self.theta.powf(-2.0 * i as f64 / self.rotary_dim as f64)).collect();
        let angles = (0..positions).flat_map(|position| steps.iter().map(move |step| position as f64 * step));
        let (cos, sin) = angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip();
        Angles { cos, sin, positions }
    }
}
