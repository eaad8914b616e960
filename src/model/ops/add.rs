//! Sums of activations.

use candle_core::{Result, Tensor, bail};

use crate::model::compute::Compute;
use crate::model::tape::Activation;

/// `a + b`, of the same shape. Where one of them is the result of a linear layer, [`super::linear_add`] saves a pass.
pub fn add(a: &Activation, b: &Activation) -> Result<Activation> {
    if a.dims() != b.dims() {
        bail!("add: {:?} and {:?} differ in shape", a.dims(), b.dims());
    }
    let (left, right) = (a.clone(), b.clone());
    let (into_a, into_b) = (a.slot(), b.slot());
    let compute = a.compute().clone();
    a.tape().record_deferred(
        a.dims(),
        a.dtype(),
        move || sum(&compute, &left.tensor()?, &right.tensor()?),
        move |dy, gradients| {
            gradients.pass(into_a, &dy)?;
            gradients.pass(into_b, &dy)
        },
    )
}

/// `a + b` as tensors.
pub(crate) fn sum(compute: &Compute, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    on!(compute, sum(a, b))
}
