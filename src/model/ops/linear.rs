//! `y = x Wᵀ + b`, and its backward: `dx = dy W`, `dW += dyᵀ x`, `db += Σ dy`.

use candle_core::{Result, bail};

use super::gelu::Gelu;
use crate::model::param::Param;
use crate::model::tape::{Activation, Gradients};

/// Applies `weight` (out, in) and `bias` (out) to the last dimension of `x` (.., in).
pub fn linear(x: &Activation, weight: &Param, bias: Option<&Param>) -> Result<Activation> {
    apply(x, weight, bias, None)
}

/// `residual + linear(x)` in one pass.
pub fn linear_add(x: &Activation, weight: &Param, bias: Option<&Param>, residual: &Activation) -> Result<Activation> {
    apply(x, weight, bias, Some(residual))
}

/// The prediction of a head without bias: `x Wᵀ`.
pub fn logits(x: &Activation, weight: &Param) -> Result<Activation> {
    linear(x, weight, None)
}

/// `gelu(linear(x))`, which takes the bias's gradient on the way through GELU's: one pass less than the two operations.
pub fn linear_gelu(x: &Activation, weight: &Param, bias: &Param, form: Gelu) -> Result<Activation> {
    let dims = checked_dims(x, weight, Some(bias))?;
    let (compute, input) = (x.compute().clone(), x.keep()?);
    let up = on!(&compute, linear_forward(&x.tensor()?, weight, Some(bias), None))?.reshape(dims)?;
    let output = on!(&compute, gelu_forward(&up, form))?;
    let again = {
        let (compute, up) = (compute.clone(), up.clone());
        move || on!(&compute, gelu_forward(&up, form))
    };
    let (into_x, weight, bias) = (x.slot(), weight.clone(), bias.clone());
    let backward = move |dy, gradients: &mut Gradients| {
        let dup = on!(&compute, gelu_backward_bias(&dy, &up, form, &bias))?;
        gradients.add(into_x, |before| on!(&compute, linear_backward_input(&dup, &weight, before)))?;
        on!(&compute, linear_backward_weight(&dup, &input.tensor()?, &weight, None))
    };
    Ok(x.tape().record(output, backward).comes_again(again))
}

/// The shape of `linear(x)`, if the shapes fit.
fn checked_dims(x: &Activation, weight: &Param, bias: Option<&Param>) -> Result<Vec<usize>> {
    if weight.shape().len() != 2 || x.width() != weight.columns() {
        bail!("linear: input {:?} does not fit `{}` of shape {:?}", x.dims(), weight.name(), weight.shape());
    }
    if let Some(bias) = bias
        && bias.shape() != [weight.rows()]
    {
        bail!("linear: bias `{}` has shape {:?}, expected [{}]", bias.name(), bias.shape(), weight.rows());
    }
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = weight.rows();
    }
    Ok(dims)
}

fn apply(x: &Activation, weight: &Param, bias: Option<&Param>, residual: Option<&Activation>) -> Result<Activation> {
    let dims = checked_dims(x, weight, bias)?;
    if let Some(residual) = residual
        && residual.dims() != dims
    {
        bail!("linear_add: the residual has shape {:?}, the result {dims:?}", residual.dims());
    }
    let (compute, input) = (x.compute().clone(), x.keep()?);
    let forward = {
        let (compute, x, weight, bias) = (compute.clone(), x.clone(), weight.clone(), bias.cloned());
        let residual = residual.cloned();
        move || {
            let residual = residual.map(|residual| residual.tensor()).transpose()?;
            on!(&compute, linear_forward(&x.tensor()?, &weight, bias.as_ref(), residual.as_ref()))
        }
    };
    let (into_x, into_residual) = (x.slot(), residual.and_then(Activation::slot));
    let (weight, bias) = (weight.clone(), bias.cloned());
    x.tape().record_deferred(dims, x.dtype(), forward, move |dy, gradients| {
        gradients.add(into_x, |before| on!(&compute, linear_backward_input(&dy, &weight, before)))?;
        on!(&compute, linear_backward_weight(&dy, &input.tensor()?, &weight, bias.as_ref()))?;
        gradients.pass(into_residual, &dy)
    })
}
