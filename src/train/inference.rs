//! Forward passes without a backward: what the model predicts, and its loss on data that it is not trained on.
//!
//! Blocks are leased at the moments at which a step's forward leases them, so chunks are fetched ahead and budgets kept as
//! there. Nothing but the place of chunks changes: no gradient, no update, no random number.

use candle_core::{DType, Device, Tensor};
use patrickstar_actors::types::Moment;

use super::engine::{Batch, Engine};
use crate::error::Error;
use crate::model::block::Context;
use crate::model::tape::Tape;
use crate::telemetry::alloc;

impl Engine {
    /// Runs the blocks on `input` without training; the last block gives its prediction, in fp32 in host memory.
    pub fn predict(&mut self, input: &Tensor) -> Result<Tensor, Error> {
        let input = self.compute.input(input, self.precision())?;
        let outputs = self.infer(vec![input], None)?;
        let output = outputs.into_iter().next().ok_or_else(|| Error::Model("a model without an output".into()))?;
        Ok(output.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)
    }

    /// Mean loss over the targets of `batch` with the weights after the last step, without dropout. Weights cross the link
    /// once, however many micro-batches there are; activations take less than those of a step of that size. On the host
    /// these are the bits with which a step on `batch` begins; a GPU's kernel that makes no gradients sums in another order.
    pub fn evaluate(&mut self, batch: &Batch) -> Result<f64, Error> {
        let inputs = self.inputs(batch)?;
        alloc::track_this_thread(true);
        let losses = self.infer(inputs, Some(batch));
        alloc::track_this_thread(false);
        let losses = losses?;
        // Read last: reading waits for the device.
        self.compute.sleep_until_done()?;
        losses.iter().map(|loss| Ok(f64::from(loss.to_scalar::<f32>()?))).sum()
    }

    /// What the last block makes of each of `values`: its loss where there is a batch, else its prediction.
    fn infer(&mut self, mut values: Vec<Tensor>, batch: Option<&Batch>) -> Result<Vec<Tensor>, Error> {
        let last = self.blocks.len() - 1;
        for block in 0..=last {
            let chunks = self.program().forward_access(self.runtime.layout(), block);
            let tier = self.program().tiers[block];
            let lease = self.runtime.access_untraced(Moment(block as u32), tier, chunks)?;
            self.bind(&lease, block, false)?;
            let forward = |(micro, value): (usize, Tensor)| -> Result<Tensor, Error> {
                let context = Context {
                    seed: self.config().train.seed,
                    step: self.current_step(),
                    micro,
                    block,
                    training: false,
                    targets: batch.filter(|_| block == last).map(|batch| batch.micro[micro].targets.clone()),
                    target_count: batch.map_or(1, |batch| batch.target_count),
                };
                let input = Tape::forgetting(&self.compute).constant(value);
                Ok(self.blocks[block].forward(&input, &self.params[block], &context)?.tensor()?)
            };
            values = values.into_iter().enumerate().map(forward).collect::<Result<_, _>>()?;
            self.runtime.release_forward(self.end(block, lease))?;
        }
        Ok(values)
    }
}
