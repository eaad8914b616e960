//! The forward and backward passes of a step, layer by layer.

use candle_core::Tensor;
use patrickstar_actors::types::Step;

use super::engine::{Batch, Engine};
use super::stash::{Coming, Stashed};
use crate::error::Error;
use crate::model::tape::{Activation, Tape};

/// Blocks ahead of the backward pass whose inputs are on their way back.
pub(crate) const FETCHED_AHEAD: usize = 2;

/// A block's forward pass on one micro-batch, kept for its backward.
pub(super) struct Pass {
    tape: Tape,
    input: Activation,
    output: Activation,
}

/// What a block's backward on one micro-batch begins with.
pub(super) enum Start {
    /// The block's input: its forward is computed again.
    Input(Tensor),
    /// The same in host memory.
    Away(Stashed),
    /// The same on its way back.
    Coming(Coming),
    /// Its forward.
    Pass(Pass),
}

impl Engine {
    /// All blocks but the last, layer-major; returns what the backward of each block begins with.
    pub(super) fn forward(&mut self, batch: &Batch, step: Step) -> Result<Vec<Vec<Start>>, Error> {
        let mut starts = Vec::with_capacity(self.blocks.len());
        let mut inputs = self.inputs(batch)?;
        let may_keep = self.warmup.may_keep(batch);
        for block in 0..self.blocks.len() - 1 {
            let keep = may_keep && self.plan.keeps_activations(block);
            let away = self.plan.keeps_input_away(block);
            let mut lease = self.lease(block, false)?;
            let start = self.runtime.timeline().now();
            let mut outputs = Vec::with_capacity(inputs.len());
            let mut of_block = Vec::with_capacity(inputs.len());
            for (micro, input) in inputs.into_iter().enumerate() {
                let tape = match (keep, self.plan.frugal) {
                    (true, true) => Tape::frugal(&self.compute, self.loss_scale.scale),
                    (true, false) => Tape::scaled(&self.compute, self.loss_scale.scale),
                    (false, _) => Tape::forgetting(&self.compute),
                };
                let pass = self.pass(batch, step, (block, micro), input.clone(), tape)?;
                outputs.push(pass.output.tensor()?);
                of_block.push(match (keep, away) {
                    (true, _) => Start::Pass(pass),
                    (false, true) => Start::Away(self.stash.put(input)?),
                    (false, false) => Start::Input(input),
                });
            }
            self.draw(&mut lease, start, "forward", block);
            self.runtime.release_forward(self.end(block, lease))?;
            starts.push(of_block);
            inputs = outputs;
        }
        starts.push(inputs.into_iter().map(Start::Input).collect());
        Ok(starts)
    }

    /// What the first block reads of each micro-batch.
    pub(super) fn inputs(&self, batch: &Batch) -> Result<Vec<Tensor>, Error> {
        batch.micro.iter().map(|micro| Ok(self.compute.input(&micro.input, self.precision())?)).collect()
    }

    /// Applies `block` to `input` on `tape`, which records if a backward follows.
    fn pass(
        &self,
        batch: &Batch,
        step: Step,
        (block, micro): (usize, usize),
        input: Tensor,
        tape: Tape,
    ) -> Result<Pass, Error> {
        let mut context = self.context(batch, step, block, micro);
        context.targets = (block + 1 == self.blocks.len()).then(|| batch.micro[micro].targets.clone());
        // Token ids have no gradient.
        let input =
            if tape.is_recording() && input.dtype().is_float() { tape.input(input) } else { tape.constant(input) };
        let output = self.blocks[block].forward(&input, &self.params[block], &context)?;
        Ok(Pass { tape, input, output })
    }

    /// Backward of each block, last to first, after its forward where that was not kept; returns the loss of each
    /// micro-batch.
    pub(super) fn backward(
        &mut self,
        batch: &Batch,
        step: Step,
        mut starts: Vec<Vec<Start>>,
    ) -> Result<Vec<Tensor>, Error> {
        let last = self.blocks.len() - 1;
        let mut losses = Vec::new();
        let mut upstream: Vec<Option<Tensor>> = vec![None; batch.micro.len()];
        for block in (0..=last).rev() {
            self.fetch_inputs(&mut starts[block.saturating_sub(FETCHED_AHEAD)..=block])?;
            let mut lease = self.lease(block, true)?;
            let start = self.runtime.timeline().now();
            for (micro, begun) in std::mem::take(&mut starts[block]).into_iter().enumerate() {
                let again = |input: Tensor| {
                    let tape = Tape::scaled(&self.compute, self.loss_scale.scale);
                    self.pass(batch, step, (block, micro), input, tape)
                };
                let before = self.warmup.is_measuring().then(|| self.runtime.non_model_live());
                let pass = match begun {
                    Start::Pass(pass) => pass,
                    Start::Input(input) => again(input)?,
                    Start::Coming(coming) => again(self.stash.arrive(coming)?)?,
                    Start::Away(_) => return Err(Error::Model(format!("the input of block {block} was not fetched"))),
                };
                if block == last {
                    losses.push(pass.output.tensor()?);
                } else if let Some(before) = before {
                    self.warmup.pass(before, self.runtime.non_model_live());
                }
                upstream[micro] = pass.tape.backward(&pass.output, upstream[micro].take(), &pass.input)?;
            }
            self.warmup.end_block();
            self.draw(&mut lease, start, "backward", block);
            self.runtime.release_backward(self.end(block, lease))?;
        }
        Ok(losses)
    }

    /// Queues the way back of inputs that wait in host memory, those that are needed first first.
    fn fetch_inputs(&mut self, starts: &mut [Vec<Start>]) -> Result<(), Error> {
        for start in starts.iter_mut().rev().flatten() {
            if let Start::Away(stashed) = start {
                *start = Start::Coming(self.stash.fetch(stashed)?);
            }
        }
        Ok(())
    }
}
