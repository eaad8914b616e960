//! Linear head and cross-entropy, some tokens at a time.

#![expect(unsafe_code, reason = "queues products by address")]

use candle_core::{DType, Result, Tensor};
use patrickstar_actors::cuda::{Arg, Grid};

use super::linear::Panel;
use super::matmul::{Operand, Product};
use super::ops::{CudaOps, kernel};
use crate::model::ops::cross_entropy::tokens_per_block;
use crate::model::param::Param;

const THREADS: u32 = 1024;
/// Elements to which a row of logits is padded.
const ROW_MULTIPLE: usize = 8;
/// Pieces of a row that a block keeps in shared memory, of 16 KiB each: as many as a GPU's blocks can have.
const SLOTS: [u32; 2] = [14, 6];
const SLOT_BYTES: u32 = 16 << 10;
/// Shared memory that the kernel needs besides.
const STATIC_BYTES: u32 = 1 << 10;

/// The first `tokens` rows of logits, padded to a multiple of `ROW_MULTIPLE`, and what belongs to them: targets and losses
/// from `first` on.
pub(crate) struct LogitRows<'a> {
    pub logits: &'a Tensor,
    pub targets: &'a Tensor,
    pub losses: &'a Tensor,
    pub first: usize,
    pub tokens: usize,
}

impl CudaOps {
    /// The loss and, with a scale for it, the gradient of `x`; then the gradient of `weight` has been added to as well.
    pub(crate) fn linear_cross_entropy(
        &self,
        x: &Tensor,
        weight: &Param,
        targets: &[i64],
        scale: f32,
        gradient_scale: Option<f32>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (vocabulary, dtype) = (weight.rows(), x.dtype());
        let panels = self.panels(weight)?;
        let block = tokens_per_block(targets.len(), vocabulary);
        // Negative targets keep their bits.
        let bits: Vec<u32> = targets.iter().map(|&target| target as i32 as u32).collect();
        let targets_on_device = self.upload(&bits)?;
        let losses = self.uninitialised(targets.len(), DType::F32)?;
        // Rows that begin aligned are read and written sixteen bytes at a time, whatever the vocabulary.
        let stride = vocabulary.next_multiple_of(ROW_MULTIPLE);
        let logits = self.uninitialised((block, stride), DType::F32)?;
        let dx = gradient_scale.map(|_| self.uninitialised(x.shape(), dtype)).transpose()?;
        for first in (0..targets.len()).step_by(block) {
            let tokens = block.min(targets.len() - first);
            self.write_logits(x, first, tokens, &panels, weight, &logits)?;
            let rows = LogitRows { logits: &logits, targets: &targets_on_device, losses: &losses, first, tokens };
            let Some(dx) = &dx else {
                self.losses_of(&rows, vocabulary, scale)?;
                continue;
            };
            self.differentiate_logits(&rows, vocabulary, gradient_scale.unwrap_or(scale), dtype)?;
            self.head_gradients(x, first, tokens, &panels, weight, &logits, dx)?;
        }
        let loss = self.uninitialised((), DType::F32)?;
        // The kernel above knows one scale, and gradients need theirs. Both differ by a power of two.
        let rest = scale / gradient_scale.unwrap_or(scale);
        let args = [self.pointer(&losses)?, Arg::U64(targets.len() as u64), self.pointer(&loss)?, Arg::F32(rest)];
        self.launch(&self.cross_entropy, "sum_loss_f32", Grid::linear(1, THREADS), &args)?;
        Ok((loss, dx))
    }

    /// Writes the losses of rows, of `scale`, and puts the gradients in `dtype` where the logits were.
    pub(crate) fn differentiate_logits(
        &self,
        rows: &LogitRows,
        vocabulary: usize,
        scale: f32,
        dtype: DType,
    ) -> Result<()> {
        let [most, least] = SLOTS;
        let slots = if most * SLOT_BYTES + STATIC_BYTES <= self.shared_per_block { most } else { least };
        let mut args = self.arguments_of(rows, vocabulary, scale)?;
        args.push(Arg::I32(slots as i32));
        args.extend(self.schedule()?);
        // A block goes from row to row, and nothing else fits beside it.
        let blocks = (rows.tokens as u64).min(self.multiprocessors.into());
        let grid = Grid { shared: slots * SLOT_BYTES, ..Grid::linear(blocks, THREADS) };
        self.launch(&self.cross_entropy, kernel!(dtype, "cross_entropy"), grid, &args)
    }

    fn losses_of(&self, rows: &LogitRows, vocabulary: usize, scale: f32) -> Result<()> {
        let args = self.arguments_of(rows, vocabulary, scale)?;
        let grid = Grid::linear(rows.tokens as u64, THREADS);
        self.launch(&self.cross_entropy, "cross_entropy_loss_f32", grid, &args)
    }

    fn arguments_of(&self, rows: &LogitRows, vocabulary: usize, scale: f32) -> Result<Vec<Arg>> {
        let at =
            |tensor: &Tensor| Ok::<_, candle_core::Error>(Arg::Pointer(self.address(tensor)? + 4 * rows.first as u64));
        Ok(vec![
            self.pointer(rows.logits)?,
            Arg::U64(rows.logits.dim(1)? as u64),
            at(rows.targets)?,
            at(rows.losses)?,
            Arg::U64(rows.tokens as u64),
            Arg::I32(vocabulary as i32),
            Arg::F32(scale),
        ])
    }

    fn write_logits(
        &self,
        x: &Tensor,
        first: usize,
        tokens: usize,
        panels: &[Panel],
        weight: &Param,
        logits: &Tensor,
    ) -> Result<()> {
        let (width, dtype) = (weight.columns(), x.dtype());
        for panel in panels {
            let product = Product {
                shape: (tokens, panel.rows, width),
                a: Operand::new(self.address(x)? + (first * width * dtype.size_in_bytes()) as u64, width),
                b: Operand::new(panel.weight, width).t(),
                out: (self.address(logits)? + 4 * panel.row as u64, logits.dim(1)?),
                add: None,
                bias: None,
                dtype,
                out_dtype: DType::F32,
            };
            // SAFETY: `tokens` rows of `x` from `first` on, the leased panel, and its columns of the logits.
            unsafe { self.multiply(&product)? };
        }
        Ok(())
    }

    /// Gradients of input and weight, from gradients that lie where the logits were.
    #[expect(clippy::too_many_arguments, reason = "the range of tokens and the tensors of the loop above")]
    fn head_gradients(
        &self,
        x: &Tensor,
        first: usize,
        tokens: usize,
        panels: &[Panel],
        weight: &Param,
        logits: &Tensor,
        dx: &Tensor,
    ) -> Result<()> {
        let (width, dtype) = (weight.columns(), x.dtype());
        let size = dtype.size_in_bytes();
        let offset = (first * width * size) as u64;
        let stride = logits.dim(1)? * 4 / size;
        let several = panels.len() > 1;
        let sums = if several { Some(self.zeros((tokens, width), DType::F32)?) } else { None };
        for &panel in panels {
            let dlogits = self.address(logits)? + (panel.row * size) as u64;
            let product = Product {
                shape: (tokens, width, panel.rows),
                a: Operand::new(dlogits, stride),
                b: Operand::new(panel.weight, width),
                out: (sums.as_ref().map_or(Ok(self.address(dx)? + offset), |sums| self.address(sums))?, width),
                add: sums.as_ref().map(|sums| self.address(sums)).transpose()?,
                bias: None,
                dtype,
                out_dtype: if several { DType::F32 } else { dtype },
            };
            // SAFETY: the panel's columns of `tokens` rows of gradients, the leased panel, and rows of `dx`.
            unsafe { self.multiply(&product)? };
            if panel.gradient != 0 {
                let x = (self.address(x)? + offset, width);
                // SAFETY: as above, into the leased gradient of the panel.
                unsafe { self.add_weight_gradient(panel, (dlogits, stride), x, tokens, dtype)? };
            }
        }
        if let Some(sums) = sums {
            let rows = dx.reshape(((), width))?.narrow(0, first, tokens)?;
            self.write_narrowed(&sums, &rows)?;
        }
        Ok(())
    }
}
