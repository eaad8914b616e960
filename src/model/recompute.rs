//! Autograd inside one block: the only leaf is the block's input.
//!
//! candle's `backward` starts from ones and has no place for a gradient from outside, so the output goes through an
//! operation whose backward returns that gradient.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, Var};

struct InjectGradient(Tensor);

impl CustomOp1 for InjectGradient {
    fn name(&self) -> &'static str {
        "inject-gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// A tracked copy of `t`: the leaf of a block's graph.
pub fn into_leaf(t: &Tensor) -> Result<Tensor> {
    Ok(Var::from_tensor(t)?.into_inner())
}

/// Runs the graph from `output` back to `leaf`. `upstream` is the gradient of the loss with respect to `output`, absent
/// when `output` is the loss. Returns the gradient of `leaf`; `None` for a leaf that only anchors the graph.
pub fn backward_with(output: &Tensor, upstream: Option<&Tensor>, leaf: &Tensor) -> Result<Option<Tensor>> {
    let mut gradients = match upstream {
        Some(gradient) => output.apply_op1(InjectGradient(gradient.clone()))?.backward()?,
        None => output.backward()?,
    };
    // The store's tensors keep the graph alive: detach what is needed and drop the rest.
    Ok(gradients.remove(leaf).map(|gradient| gradient.detach()))
}
