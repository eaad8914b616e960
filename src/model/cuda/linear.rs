//! `y = x Wᵀ + b (+ residual)` and its gradients. A weight that is tiled over chunks is worked panel by panel.

#![expect(unsafe_code, reason = "queues products by address")]

use candle_core::{DType, Result, Tensor, bail};
use patrickstar_actors::cuda::Arg;
use patrickstar_actors::memory::MemoryError;

use super::matmul::{Operand, Product};
use super::ops::{CudaOps, elementwise, message};
use crate::model::param::{Param, ParamTile};

/// One panel of a weight in device memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panel {
    pub weight: u64,
    /// 0 where no gradient is asked for.
    pub gradient: u64,
    pub row: usize,
    pub rows: usize,
}

/// What can go wrong when a product is queued.
enum Queued {
    Product(candle_core::Error),
    Timing(MemoryError),
}

impl From<MemoryError> for Queued {
    fn from(error: MemoryError) -> Self {
        Queued::Timing(error)
    }
}

impl Queued {
    fn into_error(self) -> candle_core::Error {
        match self {
            Queued::Product(error) => error,
            Queued::Timing(error) => message(error),
        }
    }
}

impl CudaOps {
    /// The tiles of a leased parameter.
    pub(super) fn tiles(&self, param: &Param) -> Result<Vec<ParamTile>> {
        let tiles = param.tiles();
        if tiles.is_empty() {
            bail!("parameter `{}` is used outside of its lease: do not keep a block's activations", param.name());
        }
        Ok(tiles)
    }

    /// Address of a weight that is not tiled.
    pub(super) fn weight_address(&self, param: &Param) -> Result<u64> {
        Ok(self.only_tile(param)?.weight as u64)
    }

    /// Address of its gradient, where one is asked for.
    pub(super) fn gradient_address(&self, param: &Param) -> Result<Option<u64>> {
        let address = self.only_tile(param)?.gradient as u64;
        Ok((address != 0).then_some(address))
    }

    fn only_tile(&self, param: &Param) -> Result<ParamTile> {
        match self.tiles(param)?[..] {
            [tile] => Ok(tile),
            _ => bail!("parameter `{}` is tiled, and this operation needs it in one chunk", param.name()),
        }
    }

    /// The panels of a weight, in row order.
    pub(super) fn panels(&self, param: &Param) -> Result<Vec<Panel>> {
        let mut panels = Vec::new();
        let bytes_per_row = param.columns() * if param.precision().is_half() { 2 } else { 4 };
        for tile in self.tiles(param)? {
            for inner in (0..tile.rows).step_by(param.panel_rows().max(1)) {
                let offset = (inner * bytes_per_row) as u64;
                panels.push(Panel {
                    weight: tile.weight as u64 + offset,
                    gradient: if tile.gradient.is_null() { 0 } else { tile.gradient as u64 + offset },
                    row: tile.row_start + inner,
                    rows: param.panel_rows().min(tile.rows - inner),
                });
            }
        }
        Ok(panels)
    }

    /// Queues a product.
    ///
    /// # Safety
    /// As for [`super::matmul::Products::multiply`].
    pub(super) unsafe fn multiply(&self, product: &Product) -> Result<()> {
        let mut products = self.products.lock().map_err(message)?;
        let queued = self.gpu().profile().span("matmul", self.stream(), || {
            // SAFETY: by this function's contract.
            unsafe { products.multiply(product) }.map_err(Queued::Product)
        });
        drop(products);
        queued.map_err(Queued::into_error)?;
        self.queued()
    }

    /// `x Wᵀ + bias + residual`.
    pub(crate) fn linear_forward(
        &self,
        x: &Tensor,
        weight: &Param,
        bias: Option<&Param>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (out, inner, dtype) = (weight.rows(), weight.columns(), x.dtype());
        let tokens = x.elem_count() / inner;
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = out;
        }
        let y = self.uninitialised(dims, dtype)?;
        let (from, to) = (self.address(x)?, self.address(&y)?);
        let bias = bias.map(|bias| self.weight_address(bias)).transpose()?;
        let add = residual.map(|residual| self.address(residual)).transpose()?;
        for panel in self.panels(weight)? {
            let columns = (panel.row * dtype.size_in_bytes()) as u64;
            let product = Product {
                shape: (tokens, panel.rows, inner),
                a: Operand::new(from, inner),
                b: Operand::new(panel.weight, inner).t(),
                out: (to + columns, out),
                add: add.map(|add| add + columns),
                bias: bias.map(|bias| bias + columns),
                dtype,
                out_dtype: dtype,
            };
            // SAFETY: columns [row, row + rows) of the tokens x out tensors; the weight is leased.
            unsafe { self.multiply(&product)? };
        }
        Ok(y)
    }

    /// `dy W + before`.
    pub(crate) fn linear_backward_input(&self, dy: &Tensor, weight: &Param, before: Option<Tensor>) -> Result<Tensor> {
        let (out, inner, dtype) = (weight.rows(), weight.columns(), dy.dtype());
        let tokens = dy.elem_count() / out;
        let panels = self.panels(weight)?;
        let mut dims = dy.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = inner;
        }
        let dx = self.uninitialised(dims, dtype)?;
        // Sums over several panels stay in fp32 until the last.
        let sums = if panels.len() > 1 { Some(self.zeros((tokens, inner), DType::F32)?) } else { None };
        let target = sums.as_ref().unwrap_or(&dx);
        for panel in &panels {
            let product = Product {
                shape: (tokens, inner, panel.rows),
                a: Operand::new(self.address(dy)? + (panel.row * dtype.size_in_bytes()) as u64, out),
                b: Operand::new(panel.weight, inner),
                out: (self.address(target)?, inner),
                add: match (&sums, &before) {
                    (Some(sums), _) => Some(self.address(sums)?),
                    (None, Some(before)) => Some(self.address(before)?),
                    (None, None) => None,
                },
                bias: None,
                dtype,
                out_dtype: target.dtype(),
            };
            // SAFETY: the panel's columns of `dy` times the leased panel, into tokens x inner.
            unsafe { self.multiply(&product)? };
        }
        let Some(sums) = sums else { return Ok(dx) };
        self.write_narrowed(&sums, &dx)?;
        before.map_or(Ok(dx.clone()), |before| self.sum(&before, &dx))
    }

    /// Writes fp32 `sums` to `out` in its own type.
    pub(super) fn write_narrowed(&self, sums: &Tensor, out: &Tensor) -> Result<()> {
        let n = out.elem_count();
        let args = [self.pointer(sums)?, self.pointer(out)?, Arg::U64(n as u64)];
        let name = match out.dtype() {
            DType::F32 => "cast_f32_to_f32",
            DType::BF16 => "cast_f32_to_bf16",
            _ => "cast_f32_to_f16",
        };
        self.launch(&self.cast, name, elementwise(n), &args)
    }

    /// Adds `dyᵀ x` to the gradient of `weight` and the sum of `dy` to that of `bias`.
    pub(crate) fn linear_backward_weight(
        &self,
        dy: &Tensor,
        x: &Tensor,
        weight: &Param,
        bias: Option<&Param>,
    ) -> Result<()> {
        let (out, inner, dtype) = (weight.rows(), weight.columns(), dy.dtype());
        let tokens = dy.elem_count() / out;
        for panel in self.panels(weight)?.into_iter().filter(|panel| panel.gradient != 0) {
            let dy = self.address(dy)? + (panel.row * dtype.size_in_bytes()) as u64;
            // SAFETY: the panel's columns of `dy`, `x`, and the leased gradient of the panel.
            unsafe { self.add_weight_gradient(panel, (dy, out), (self.address(x)?, inner), tokens, dtype)? };
        }
        match bias {
            Some(bias) => self.add_column_sums(dy, bias),
            None => Ok(()),
        }
    }

    /// `gradient += dyᵀ x`, where `dy` is tokens x the panel's rows and `x` tokens x the panel's columns.
    ///
    /// # Safety
    /// The addresses must be valid for these dimensions and strides until the stream has passed the product.
    pub(super) unsafe fn add_weight_gradient(
        &self,
        panel: Panel,
        dy: (u64, usize),
        x: (u64, usize),
        tokens: usize,
        dtype: DType,
    ) -> Result<()> {
        let product = Product {
            shape: (panel.rows, x.1, tokens),
            a: Operand::new(dy.0, dy.1).t(),
            b: Operand::new(x.0, x.1),
            out: (panel.gradient, x.1),
            add: Some(panel.gradient),
            bias: None,
            dtype,
            out_dtype: dtype,
        };
        // SAFETY: by this function's contract.
        unsafe { self.multiply(&product) }
    }
}
