//! How fast a step could be at best, and what would hold it back.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use patrickstar_actors::error::RuntimeError;
use patrickstar_actors::memory::bandwidth::{copy_bandwidth, triad_bandwidth};
use patrickstar_actors::types::Bytes;
use serde::Serialize;

use super::Plan;
use super::split::{LINK, PRODUCTS};
use crate::config;
use crate::error::Error;
use crate::train::device::is_cuda;

/// Larger than a last-level cache; small enough for a plan to be quick.
const ARRAY: Bytes = Bytes(128 << 20);
/// Side of the product that measures compute: 2 GFLOP, long enough to leave the caches' and clocks' transients behind.
const SIDE: usize = 1024;
const REPEATS: usize = 5;

/// What a machine can do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// Matrix products, in FLOP/s.
    pub compute: f64,
    /// Copies between host and device, each direction, in bytes/s.
    pub link: f64,
    /// Host memory, reads and writes together, in bytes/s.
    pub host: f64,
}

/// Those of them that somebody told.
#[derive(Clone, Copy, Debug, Default)]
pub struct KnownRates {
    /// Matrix products, in FLOP/s.
    pub compute: Option<f64>,
    /// Copies between host and device, each direction, in bytes/s.
    pub link: Option<f64>,
    /// Host memory, reads and writes together, in bytes/s.
    pub host: Option<f64>,
}

impl Rates {
    /// What is not `known` is measured here in about a second; of a GPU and its link those of an H200 are taken, for a job may
    /// be planned where there is none.
    pub fn of(compute: &config::Compute, known: &KnownRates) -> Result<Self, Error> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let failed = |error| Error::from(RuntimeError::from(error));
        let on_gpu = is_cuda(compute);
        let products = || if on_gpu { Ok(PRODUCTS) } else { matmul_rate() };
        // One copy stream a direction.
        let copies = || if on_gpu { Ok(LINK) } else { copy_bandwidth(ARRAY, 1).map_err(failed).map(|rate| rate / 2.0) };
        Ok(Rates {
            compute: known.compute.map_or_else(products, Ok)?,
            link: known.link.map_or_else(copies, Ok)?,
            host: known.host.map_or_else(|| triad_bandwidth(ARRAY, threads).map_err(failed), Ok)?,
        })
    }
}

fn matmul_rate() -> Result<f64, Error> {
    let matrix = Tensor::ones((SIDE, SIDE), DType::F32, &Device::Cpu)?;
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        let start = Instant::now();
        matrix.matmul(&matrix)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (SIDE as f64).powi(3) / best)
}

/// What the slowest part of a step runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// Matrix products.
    Compute,
    /// Copies between host and device.
    Link,
    /// The optimizer's pass through host memory.
    Host,
}

/// A lower bound of a step's time: its parts overlap, so the longest one stays.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bound {
    /// Forward, recompute and backward, in seconds; 0 for models of the user's own.
    pub compute_s: f64,
    /// The busier direction, in seconds.
    pub link_s: f64,
    /// The optimizer's traffic, in seconds.
    pub host_s: f64,
    /// The longest, in seconds.
    pub step_s: f64,
    /// Which it is.
    pub limit: Limit,
}

impl Plan {
    /// The bound of a step on a machine with these rates.
    pub fn bound(&self, rates: &Rates) -> Bound {
        let compute_s = self.flops.unwrap_or(0.0) * (1.0 + self.computed_again(self.kept_layers)) / rates.compute;
        let link_s = self.host_to_device.0.max(self.device_to_host.0) as f64 / rates.link;
        let host_s = self.optimizer_bytes.0 as f64 / rates.host;
        let parts = [(compute_s, Limit::Compute), (link_s, Limit::Link), (host_s, Limit::Host)];
        let (step_s, limit) = parts.into_iter().fold(parts[0], |most, part| if part.0 > most.0 { part } else { most });
        Bound { compute_s, link_s, host_s, step_s, limit }
    }
}

impl Bound {
    /// In words.
    pub fn line(&self) -> String {
        let name = match self.limit {
            Limit::Compute => "compute",
            Limit::Link => "the link",
            Limit::Host => "host memory",
        };
        format!(
            "bound   {:.3} s a step by {name} (compute {:.3} s, link {:.3} s, host {:.3} s)",
            self.step_s, self.compute_s, self.link_s, self.host_s
        )
    }
}
