//! What only a GPU shows: every operation against finite differences and against the host's, the bits of chunk work, and
//! streams. Build with `cargo test --release --features cuda --test gpu --no-run`; `tests/gpu/run` runs the program on a
//! machine without cargo. Without a GPU it ends with one line that says so.
//!
//! With `PATRICKSTAR_GPU_SIZES=few` loops over sizes take every fifth, for checkers that make kernels a hundred times
//! slower.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

#[path = "../harness/branch.rs"]
mod branch;
#[path = "../harness/mod.rs"]
mod harness;

mod attention;
mod chunks;
mod compare;
mod definitions;
mod derivatives;
mod draws;
mod engines;
mod kernels;
mod llama;
mod memory;
mod neighbours;
mod races;
mod regions;
mod replays;
mod streams;

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use harness::Place;
use patrickstar::model::compute::Compute;
use patrickstar::model::cuda::CudaOps;
use patrickstar_actors::types::{Precision, Tier};

const PRECISIONS: [Precision; 3] = [Precision::Fp32, Precision::Bf16, Precision::Fp16];

/// The first GPU, or the end of the program.
fn ops() -> Arc<CudaOps> {
    static ONE_LINE: Mutex<()> = Mutex::new(());
    let guard = ONE_LINE.lock().unwrap_or_else(PoisonError::into_inner);
    let ops = CudaOps::open(0).unwrap_or_else(|error| {
        let reason = error.to_string();
        // Straight to stderr: what a test prints is kept back until the end, which does not come.
        let line = format!("no GPU to test on: {}; see nvidia-smi\n", reason.lines().next().unwrap_or_default());
        let _closed = std::io::stderr().write_all(line.as_bytes());
        std::process::exit(1)
    });
    drop(guard);
    ops
}

fn gpu(precision: Precision) -> Place {
    Place { compute: Compute::Cuda(ops()), precision, tier: Tier::Device }
}

/// `all`, or every fifth for slow checkers.
fn sizes<T: Copy>(all: &[T]) -> impl Iterator<Item = T> + '_ {
    let few = std::env::var("PATRICKSTAR_GPU_SIZES").is_ok_and(|value| value == "few");
    all.iter().copied().step_by(if few { 5 } else { 1 })
}
