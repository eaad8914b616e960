//! First values of parameters, drawn where they stay: the bits of [`rng::fill`] in the memory of the GPU.

use candle_core::Result;
use patrickstar_actors::cuda::Arg;

use super::ops::{CudaOps, elementwise};
use crate::model::block::Init;
use crate::model::rng;

/// A run of elements of one parameter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run<'a> {
    pub init: Init,
    pub seed: u64,
    pub name: &'a str,
    /// The first of them, in the parameter.
    pub first: u64,
    pub count: usize,
}

/// Where a run's values go: addresses in device memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    Fp32 { weight: u64 },
    Bf16 { weight: u64, low: u64 },
    Fp16 { weight: u64, master: u64 },
}

impl CudaOps {
    /// Queues the first values of a run; its memory is zeroed.
    pub(crate) fn draw(&self, run: &Run<'_>, target: Target) -> Result<()> {
        // As draw.cu numbers them.
        let (init, scale) = match run.init {
            Init::Zeros => return Ok(()),
            Init::Ones => (0, 1.0),
            Init::Normal { std } => (1, std),
            Init::Uniform { bound } => (2, bound),
        };
        let (name, places) = match target {
            Target::Fp32 { weight } => ("draw_f32", vec![weight]),
            Target::Bf16 { weight, low } => ("draw_bf16", vec![weight, low]),
            Target::Fp16 { weight, master } => ("draw_f16", vec![weight, master]),
        };
        let mut args: Vec<Arg> = places.into_iter().map(Arg::Pointer).collect();
        args.extend([
            Arg::U64(run.first),
            Arg::U64(run.count as u64),
            Arg::U64(run.seed),
            Arg::U64(rng::stream_of(run.name)),
            Arg::I32(init),
            Arg::F32(scale),
        ]);
        self.launch(&self.draw, name, elementwise(run.count), &args)
    }
}
