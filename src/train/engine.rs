//! The engine: trains a list of blocks whose states live in chunks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor};
use patrickstar_actors::Lease;
use patrickstar_actors::memory::CpuBackend;
use patrickstar_actors::monitor::MemoryProbe;
use patrickstar_actors::runtime::{Runtime, StepStats};
use patrickstar_actors::timeline::{Timeline, Track};
use patrickstar_actors::types::{Bytes, ChunkId, Kind, Precision, Step, TensorId};
use serde::Serialize;

use super::lr::learning_rate;
use super::program::Program;
use super::states;
use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::error::Error;
use crate::model::block::{Block, Context};
use crate::model::param::{Param, ParamTile, Params};
use crate::model::recompute::{backward_with, into_leaf};
use crate::plan::Plan;
use crate::telemetry::alloc;

/// One micro-batch: what the first block reads and what the last compares with.
#[derive(Clone, Debug)]
pub struct MicroBatch {
    /// Input of the first block; the first dimension counts sequences.
    pub input: Tensor,
    /// Targets of the last block.
    pub targets: Tensor,
}

/// The data of one step.
#[derive(Clone, Debug)]
pub struct Batch {
    /// In order; gradients accumulate over them.
    pub micro: Vec<MicroBatch>,
    /// Targets that count, over all micro-batches: the loss is their mean.
    pub target_count: usize,
}

/// What a step did.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// Mean loss over the batch.
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Times, moves, stalls, memory.
    #[serde(flatten)]
    pub stats: StepStats,
}

impl StepReport {
    /// Share of the step that the compute thread waited.
    pub fn stall_ratio(&self) -> f64 {
        self.stats.stats.stall().as_secs_f64() / self.stats.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Measures activations through the counting allocator of this process, where it is installed.
struct AllocatorProbe;

impl MemoryProbe for AllocatorProbe {
    fn live(&self) -> Bytes {
        Bytes(alloc::live_bytes())
    }

    fn take_peak(&self) -> Bytes {
        let peak = alloc::peak_bytes();
        alloc::reset_peak();
        Bytes(peak)
    }
}

type Hook = Box<dyn FnMut(&StepReport) + Send>;

/// Trains a model larger than its device. The thread that calls [`Engine::step`] is the compute thread.
pub struct Engine {
    blocks: Vec<Box<dyn Block>>,
    program: Program,
    runtime: Runtime,
    config: Config,
    plan: Plan,
    step: Step,
    hooks: Vec<Hook>,
}

impl Engine {
    /// Plans, refuses what does not fit, sets up the tiers, starts the actors and initialises the parameters.
    pub fn new(config: Config, blocks: Vec<Box<dyn Block>>) -> Result<Self, Error> {
        let engine = Self::uninitialised(config, blocks)?;
        states::initialise(&engine.runtime, &engine.program, engine.config.train.seed)?;
        Ok(engine)
    }

    /// As `new`, with parameters from `read(name, first_row, out)` instead of random ones.
    pub fn with_weights(
        config: Config,
        blocks: Vec<Box<dyn Block>>,
        read: impl FnMut(&str, usize, &mut [f32]) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let engine = Self::uninitialised(config, blocks)?;
        states::initialise_from(&engine.runtime, &engine.program, read)?;
        Ok(engine)
    }

    /// As `new`, with the states of a checkpoint, whichever chunk size and budgets it was written under.
    pub fn load(config: Config, blocks: Vec<Box<dyn Block>>, checkpoint: &Checkpoint) -> Result<Self, Error> {
        let mut engine = Self::uninitialised(config, blocks)?;
        engine.restore(checkpoint)?;
        Ok(engine)
    }

    /// As `new`, without any state.
    fn uninitialised(config: Config, blocks: Vec<Box<dyn Block>>) -> Result<Self, Error> {
        config.validate()?;
        let program = Program::new(&blocks)?;
        let non_model = crate::plan::non_model_estimate(&config, &program);
        let plan = Plan::new(&config, &program, non_model)?;
        if let Some(reason) = plan.refusal() {
            return Err(Error::DoesNotFit(reason));
        }
        let layout = plan.layout().clone();
        let uses = program.gradient_uses(&layout);
        let runtime = Runtime::start(
            layout,
            plan.runtime_config(&config),
            uses,
            Arc::new(CpuBackend),
            Arc::new(AllocatorProbe),
            Arc::new(Timeline::default()),
        )?;
        Ok(Engine { blocks, program, runtime, config, plan, step: Step(0), hooks: Vec::new() })
    }

    /// Calls `hook` after each step: metrics, logs, early stopping.
    pub fn on_step(&mut self, hook: impl FnMut(&StepReport) + Send + 'static) {
        self.hooks.push(Box::new(hook));
    }

    /// Forward, backward, and the optimizer's part that does not hide under the next forward.
    pub fn step(&mut self, batch: &Batch) -> Result<StepReport, Error> {
        let step = Step(self.step.0 + 1);
        let learning_rate = learning_rate(&self.config.train, step);
        alloc::track_this_thread(true);
        let outcome = self.run_step(batch, step, learning_rate);
        alloc::track_this_thread(false);
        let (loss, stats) = outcome?;
        self.step = step;
        let report = StepReport { loss, learning_rate, stats };
        for hook in &mut self.hooks {
            hook(&report);
        }
        Ok(report)
    }

    fn run_step(&mut self, batch: &Batch, step: Step, lr: f64) -> Result<(f64, StepStats), Error> {
        self.runtime.begin_step(step, lr)?;
        let mut boundaries = self.forward(batch, step)?;
        let loss = self.backward(batch, step, &mut boundaries)?;
        Ok((loss, self.runtime.end_step()?))
    }

    /// All blocks but the last, layer-major; returns the input of every block for every micro-batch.
    fn forward(&mut self, batch: &Batch, step: Step) -> Result<Vec<Vec<Tensor>>, Error> {
        let mut boundaries: Vec<Vec<Tensor>> = vec![batch.micro.iter().map(|micro| micro.input.clone()).collect()];
        for block in 0..self.blocks.len() - 1 {
            let leased = self.lease(block, false)?;
            let start = self.runtime.timeline().now();
            let mut outputs = Vec::with_capacity(batch.micro.len());
            for (micro, input) in boundaries[block].iter().enumerate() {
                let context = self.context(batch, step, block, micro);
                outputs.push(self.blocks[block].forward(input, &leased.params, &context)?);
            }
            self.compute_span(start, "forward", block);
            self.runtime.release_forward(leased.end())?;
            boundaries.push(outputs);
        }
        Ok(boundaries)
    }

    /// Recompute and backward inside each block, last to first; returns the loss.
    fn backward(&mut self, batch: &Batch, step: Step, boundaries: &mut Vec<Vec<Tensor>>) -> Result<f64, Error> {
        let last = self.blocks.len() - 1;
        let mut loss = 0.0;
        let mut upstream: Vec<Option<Tensor>> = vec![None; batch.micro.len()];
        for block in (0..self.blocks.len()).rev() {
            let inputs = boundaries.pop().unwrap_or_default();
            let leased = self.lease(block, true)?;
            let start = self.runtime.timeline().now();
            for (micro, input) in inputs.into_iter().enumerate() {
                let mut context = self.context(batch, step, block, micro);
                // Token ids cannot carry a graph: a tracked scalar stands in for them.
                let (input, leaf) = if input.dtype().is_float() {
                    let leaf = into_leaf(&input)?;
                    (leaf.clone(), leaf)
                } else {
                    let anchor = into_leaf(&Tensor::zeros((), candle_core::DType::F32, &Device::Cpu)?)?;
                    context.anchor = Some(anchor.clone());
                    (input, anchor)
                };
                context.targets = (block == last).then(|| batch.micro[micro].targets.clone());
                let output = self.blocks[block].forward(&input, &leased.params, &context)?;
                if block == last {
                    loss += f64::from(output.to_scalar::<f32>()?);
                }
                upstream[micro] = backward_with(&output, upstream[micro].as_ref(), &leaf)?;
            }
            self.compute_span(start, "backward", block);
            self.runtime.release_backward(leased.end())?;
        }
        Ok(loss)
    }

    /// Runs the blocks on `input` without training; the last block gives its prediction.
    pub fn predict(&mut self, input: &Tensor) -> Result<Tensor, Error> {
        let mut value = input.clone();
        for block in 0..self.blocks.len() {
            let lease = self.runtime.access_untraced(self.program.forward_access(self.runtime.layout(), block))?;
            let leased = self.leased(lease, block, false)?;
            let context = Context {
                seed: self.config.train.seed,
                step: self.step,
                micro: 0,
                block,
                training: false,
                anchor: None,
                targets: None,
                target_count: 1,
            };
            value = self.blocks[block].forward(&value, &leased.params, &context)?;
            self.runtime.release_forward(leased.end())?;
        }
        Ok(value)
    }

    fn context(&self, batch: &Batch, step: Step, block: usize, micro: usize) -> Context {
        Context {
            seed: self.config.train.seed,
            step,
            micro,
            block,
            training: true,
            anchor: None,
            targets: None,
            target_count: batch.target_count,
        }
    }

    fn compute_span(&self, start: std::time::Duration, pass: &str, block: usize) {
        self.runtime
            .timeline()
            .span(Track::Compute, start, None, Bytes(0), || format!("{pass} {}", self.blocks[block].name()));
    }

    fn lease(&mut self, block: usize, with_gradients: bool) -> Result<Leased, Error> {
        let chunks = if with_gradients {
            self.program.backward_access(self.runtime.layout(), block)
        } else {
            self.program.forward_access(self.runtime.layout(), block)
        };
        let pass = if with_gradients { "backward" } else { "forward" };
        let name = &self.program.names[block];
        let lease = self.runtime.access(|| format!("{pass} {name}"), chunks)?;
        self.leased(lease, block, with_gradients)
    }

    fn leased(&self, lease: Lease, block: usize, with_gradients: bool) -> Result<Leased, Error> {
        let alive = Arc::new(AtomicBool::new(true));
        let params = self.program.uses[block]
            .iter()
            .map(|&tensor| self.param(&lease, tensor, with_gradients, &alive))
            .collect::<Result<Vec<_>, Error>>()?;
        Ok(Leased { params: Params::new(params), alive, lease })
    }

    fn param(&self, lease: &Lease, tensor: TensorId, gradients: bool, alive: &Arc<AtomicBool>) -> Result<Param, Error> {
        let layout = self.runtime.layout();
        let spec = &self.program.parameters[tensor.0 as usize];
        let precision = layout.precision();
        let size = precision.element_bytes(Kind::Weight).unwrap_or(4);
        let address = |kind: Kind, group, offset: usize| -> Result<*mut u8, Error> {
            layout
                .group_chunks(group, kind)
                .first()
                .and_then(|&chunk: &ChunkId| lease.address_of(chunk))
                .map(|base| base.wrapping_add(offset * size))
                .ok_or_else(|| Error::Model(format!("{kind} of `{}` is not leased", spec.name)))
        };
        let mut tiles = Vec::new();
        for tile in layout.tiles(tensor) {
            tiles.push(ParamTile {
                row_start: tile.row_start,
                rows: tile.rows,
                weight: address(Kind::Weight, tile.group, tile.offset)?,
                gradient: if gradients {
                    address(Kind::Gradient, tile.group, tile.offset)?
                } else {
                    std::ptr::null_mut()
                },
            });
        }
        // SAFETY: the layout puts each tile inside its chunk, the lease keeps the chunks in place, and `Leased::end` turns
        // `alive` off before the lease is given back.
        Ok(unsafe { Param::new(&spec.name, &spec.shape, precision, tiles, spec.tile_rows, Arc::clone(alive)) })
    }

    /// The last completed step.
    pub fn current_step(&self) -> Step {
        self.step
    }

    pub(crate) fn set_step(&mut self, step: Step) {
        self.step = step;
    }

    /// Waits until every update is applied.
    pub fn drain(&self) -> Result<(), Error> {
        Ok(self.runtime.drain()?)
    }

    /// A parameter's current value, in fp32.
    pub fn parameter(&self, name: &str) -> Result<Vec<f32>, Error> {
        states::read_parameter(&self.runtime, name, Kind::Weight)
    }

    /// A parameter's momentum or variance.
    pub fn optimizer_state(&self, name: &str, kind: Kind) -> Result<Vec<f32>, Error> {
        states::read_parameter(&self.runtime, name, kind)
    }

    /// Names of all parameters, in definition order.
    pub fn parameter_names(&self) -> Vec<String> {
        self.program.parameters.iter().map(|spec| spec.name.clone()).collect()
    }

    /// The runtime below, for statistics, tuning and traces.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// What was predicted before anything was allocated.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The configuration it runs with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The program derived from the blocks.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// How weights are stored.
    pub fn precision(&self) -> Precision {
        self.runtime.layout().precision()
    }
}

/// Parameters of a block for the time of a lease.
struct Leased {
    params: Params,
    alive: Arc<AtomicBool>,
    lease: Lease,
}

impl Leased {
    /// Invalidates the parameters and gives up the lease.
    fn end(self) -> Lease {
        self.alive.store(false, Ordering::Release);
        self.lease
    }
}
