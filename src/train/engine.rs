//! The engine: trains a list of blocks whose states live in chunks.

#![expect(unsafe_code, reason = "binds parameters to leased chunks")]

use std::sync::Arc;
use std::time::Duration;

use candle_core::Tensor;
use patrickstar_actors::Lease;
use patrickstar_actors::runtime::{Runtime, StepStart, StepStats};
use patrickstar_actors::timeline::Timeline;
use patrickstar_actors::types::{Bytes, ChunkId, Kind, Precision, Step, TensorId};
use serde::Serialize;

use super::device::Device;
use super::loss_scale::LossScale;
use super::lr::learning_rate;
use super::phases::{Mark, Phases};
use super::program::Program;
use super::stash::{Moved, Stash};
use super::states;
use super::warmup::Warmup;
use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::error::Error;
use crate::model::block::{Block, Context};
use crate::model::compute::Compute;
use crate::model::param::{Param, ParamTile, Params};
use crate::plan::Plan;
use crate::telemetry::alloc;

/// One micro-batch: what the first block reads and what the last compares with.
#[derive(Clone, Debug)]
pub struct MicroBatch {
    /// Input of the first block, in host memory; the first dimension counts sequences. Numbers become activations where the
    /// blocks compute; token ids stay in host memory, where `ops::embedding` reads them.
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
    /// Processor time of the compute thread: on a GPU what it takes to queue the work.
    pub host: Duration,
    /// What the step consisted of.
    pub phases: Phases,
    /// Times, moves, stalls, memory.
    #[serde(flatten)]
    pub stats: StepStats,
}

impl StepReport {
    /// Share of the step in which the device had nothing to do.
    pub fn stall_ratio(&self) -> f64 {
        self.stats.stats.stall().as_secs_f64() / self.stats.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Processor time that this thread has used.
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

type Hook = Box<dyn FnMut(&StepReport) + Send>;

/// Trains a model larger than its device. The thread that calls [`Engine::step`] is the compute thread.
pub struct Engine {
    pub(super) blocks: Vec<Box<dyn Block>>,
    /// Of each block; bound to chunks while the block is leased.
    pub(super) params: Vec<Params>,
    pub(super) compute: Compute,
    program: Program,
    pub(super) runtime: Runtime,
    #[cfg(feature = "cuda")]
    _watch: Option<crate::telemetry::periodic::Periodic>,
    /// Inputs of blocks that wait in host memory.
    pub(super) stash: Stash,
    pub(super) config: Config,
    pub(super) plan: Plan,
    /// What the first step shows of blocks of the user's own.
    pub(super) warmup: Warmup,
    step: Step,
    pub(super) loss_scale: LossScale,
    hooks: Vec<Hook>,
}

impl Engine {
    /// Plans, refuses what does not fit, sets up the tiers, starts the actors and initialises the parameters.
    pub fn new(config: Config, blocks: Vec<Box<dyn Block>>) -> Result<Self, Error> {
        let engine = Self::uninitialised(config, blocks)?;
        states::initialise(&engine.runtime, &engine.program, &engine.compute, engine.config.train.seed)?;
        engine.registered()
    }

    /// As `new`, with parameters from `read(name, first_row, out)` instead of random ones.
    pub fn with_weights(
        config: Config,
        blocks: Vec<Box<dyn Block>>,
        read: impl FnMut(&str, usize, &mut [f32]) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let engine = Self::uninitialised(config, blocks)?;
        states::initialise_from(&engine.runtime, &engine.program, read)?;
        engine.registered()
    }

    /// As `new`, with the states of a checkpoint, whichever chunk size and budgets it was written under.
    pub fn load(config: Config, blocks: Vec<Box<dyn Block>>, checkpoint: &Checkpoint) -> Result<Self, Error> {
        let mut engine = Self::uninitialised(config, blocks)?;
        engine.restore(checkpoint)?;
        engine.registered()
    }

    /// Host memory is registered while states are drawn or read.
    fn registered(self) -> Result<Self, Error> {
        self.runtime.registered()?;
        Ok(self)
    }

    /// As `new`, without any state.
    fn uninitialised(config: Config, blocks: Vec<Box<dyn Block>>) -> Result<Self, Error> {
        config.validate()?;
        let program = Program::new(&blocks, config.model.embedding)?;
        let plan = Plan::new(&config, &program)?;
        if let Some(reason) = plan.refusal() {
            return Err(Error::DoesNotFit(reason));
        }
        let device = Device::open(&config.compute)?;
        device.compute.keep_buffers(plan.buffers)?;
        let layout = plan.layout().clone();
        let uses = program.gradient_uses(&layout);
        let timeline = Arc::new(Timeline::default());
        let stash = Stash::new(device.compute.clone(), Arc::clone(&device.backend), Arc::clone(&timeline))?;
        let runtime =
            Runtime::start(layout, plan.runtime_config(&config), uses, device.backend, device.probe, timeline)?;
        let precision = runtime.layout().precision();
        let params = program
            .uses
            .iter()
            .zip(&program.tiers)
            .map(|(uses, &tier)| {
                Params::new(uses.iter().map(|&tensor| {
                    let spec = &program.parameters[tensor.0 as usize];
                    Param::new(&spec.name, &spec.shape, precision, spec.tile_rows).in_tier(tier)
                }))
            })
            .collect();
        let compute = device.compute;
        Ok(Engine {
            blocks,
            params,
            compute,
            program,
            runtime,
            #[cfg(feature = "cuda")]
            _watch: device.watch,
            stash,
            warmup: Warmup::of(&config, &plan),
            config,
            plan,
            step: Step(0),
            loss_scale: LossScale::new(precision),
            hooks: Vec::new(),
        })
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
        let (loss, host, [forward, backward], stats) = outcome?;
        self.step = step;
        let Some(loss_scale) = self.loss_scale.after(self.precision(), stats.overflow) else {
            return Err(Error::Failed(format!(
                "gradients of step {} overflow fp16 although the loss is not scaled up any more: lower train.lr, or set model.precision = \"bf16\"",
                step.0
            )));
        };
        self.loss_scale = loss_scale;
        let optimizer = stats.elapsed.saturating_sub(forward + backward);
        let report = StepReport { loss, learning_rate, host, phases: Phases { forward, backward, optimizer }, stats };
        for hook in &mut self.hooks {
            hook(&report);
        }
        Ok(report)
    }

    /// Loss, host work, the times of both passes, and what the runtime says.
    fn run_step(
        &mut self,
        batch: &Batch,
        step: Step,
        lr: f64,
    ) -> Result<(f64, Duration, [Duration; 2], StepStats), Error> {
        let began = thread_time();
        let update = Step(self.loss_scale.updates.0 + 1);
        self.runtime.begin_step(StepStart { step, update, lr, loss_scale: self.loss_scale.scale })?;
        let start = Mark::now(&self.runtime)?;
        let inputs = self.forward(batch, step)?;
        let middle = Mark::now(&self.runtime)?;
        let losses = self.backward(batch, step, inputs)?;
        let end = Mark::now(&self.runtime)?;
        let host = thread_time().saturating_sub(began);
        // Read last: reading waits for the device.
        self.compute.sleep_until_done()?;
        let loss = losses.iter().map(|loss| Ok(f64::from(loss.to_scalar::<f32>()?))).sum::<Result<f64, Error>>()?;
        let passes = [middle.since(&start)?, end.since(&middle)?];
        self.keep_what_fits(batch);
        Ok((loss, host, passes, self.runtime.end_step()?))
    }

    pub(super) fn context(&self, batch: &Batch, step: Step, block: usize, micro: usize) -> Context {
        Context {
            seed: self.config.train.seed,
            step,
            micro,
            block,
            training: true,
            targets: None,
            target_count: batch.target_count,
        }
    }

    pub(super) fn draw(&self, lease: &mut Lease, start: Duration, pass: &str, block: usize) {
        lease.draw(start, || format!("{pass} {}", self.blocks[block].name()));
    }

    pub(super) fn lease(&mut self, block: usize, with_gradients: bool) -> Result<Lease, Error> {
        let chunks = if with_gradients {
            self.program.backward_access(self.runtime.layout(), block)
        } else {
            self.program.forward_access(self.runtime.layout(), block)
        };
        let pass = if with_gradients { "backward" } else { "forward" };
        let name = &self.program.names[block];
        let lease = self.runtime.access(|| format!("{pass} {name}"), self.program.tiers[block], chunks)?;
        self.bind(&lease, block, with_gradients)?;
        Ok(lease)
    }

    /// Binds the parameters of `block` to the leased chunks.
    pub(super) fn bind(&self, lease: &Lease, block: usize, with_gradients: bool) -> Result<(), Error> {
        for &tensor in &self.program.uses[block] {
            let tiles = self.tiles(lease, tensor, with_gradients)?;
            let param = self.params[block].get(&self.program.parameters[tensor.0 as usize].name)?;
            // SAFETY: the layout puts each tile inside its chunk, the lease keeps the chunks in place, and `end` releases
            // the parameters before the lease is given back.
            unsafe { param.bind(tiles) };
        }
        Ok(())
    }

    /// Releases the parameters of `block`; the lease may be given back then.
    pub(super) fn end(&self, block: usize, lease: Lease) -> Lease {
        self.params[block].iter().for_each(Param::release);
        lease
    }

    fn tiles(&self, lease: &Lease, tensor: TensorId, gradients: bool) -> Result<Vec<ParamTile>, Error> {
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
        Ok(tiles)
    }

    /// The last completed step.
    pub fn current_step(&self) -> Step {
        self.step
    }

    /// Scale of the loss, and the updates made so far.
    pub fn loss_scale(&self) -> LossScale {
        self.loss_scale
    }

    pub(super) fn set_step(&mut self, step: Step, loss_scale: Option<LossScale>) {
        self.step = step;
        self.loss_scale = loss_scale.unwrap_or(LossScale::unscaled(step));
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

    /// What this job would need under another configuration: what it keeps of activations stays.
    pub fn replan(&self, config: &Config) -> Result<Plan, Error> {
        self.plan.again(config, &self.program)
    }

    /// The runtime below, for statistics, tuning and traces.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Host memory of inputs of blocks that wait there for the backward pass.
    pub fn stash_bytes(&self) -> Bytes {
        self.stash.bytes()
    }

    /// Inputs of blocks that went there and came back so far.
    pub(crate) fn stash_moved(&self) -> Moved {
        self.stash.moved()
    }

    /// What was predicted before anything was allocated; how many of a user's own layers keep activations the first step shows.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Where its operations are computed.
    pub fn compute(&self) -> &Compute {
        &self.compute
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
