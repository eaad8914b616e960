//! Any differentiable candle function as an operation, for what has no kernel of its own here.

use candle_core::{Result, Tensor, Var, bail};

use crate::model::tape::Activation;

/// Applies `function` to `inputs`; its backward is candle's autograd. Convenient rather than fast.
pub fn candle(inputs: &[&Activation], function: impl Fn(&[Tensor]) -> Result<Tensor> + 'static) -> Result<Activation> {
    let Some(first) = inputs.first() else { bail!("candle: an operation needs an input") };
    let tensors = inputs.iter().map(|input| input.tensor()).collect::<Result<Vec<_>>>()?;
    // A copy: the function may give back a view of its input, whose memory belongs to somebody else.
    let output = function(&tensors)?.copy()?.detach();
    let slots: Vec<_> = inputs.iter().map(|input| input.slot()).collect();
    let compute = first.compute().clone();
    Ok(first.tape().record(output, move |dy, gradients| {
        let leaves = tensors.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let tracked: Vec<Tensor> = leaves.iter().map(|leaf| leaf.as_tensor().clone()).collect();
        // The derivative of this sum is `dy` times the function's.
        let result = function(&tracked)?;
        let dy = dy.to_device(result.device())?.to_dtype(result.dtype())?;
        let mut store = (result * dy)?.sum_all()?.backward()?;
        for (leaf, slot) in leaves.iter().zip(slots) {
            let Some(gradient) = store.remove(leaf.as_tensor()).map(|gradient| gradient.detach()) else { continue };
            gradients.add(slot, |before| {
                before.map_or(Ok(gradient.clone()), |before| super::sum(&compute, &before, &gradient))
            })?;
        }
        Ok(())
    }))
}
