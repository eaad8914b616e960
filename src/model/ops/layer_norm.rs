//! Layer normalisation over the last dimension (Ba et al., 2016).

use candle_core::{Result, Tensor, bail};

use crate::model::param::Param;
use crate::model::tape::{Activation, Gradients};

/// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension.
pub fn layer_norm(x: &Activation, weight: &Param, bias: &Param, eps: f64) -> Result<Activation> {
    for param in [weight, bias] {
        if param.shape() != [x.width()] {
            bail!(
                "layer_norm: `{}` has shape {:?}, the input's last dimension is {}",
                param.name(),
                param.shape(),
                x.width()
            );
        }
    }
    let (compute, input) = (x.compute().clone(), x.tensor()?);
    let (output, stats) = on!(&compute, layer_norm_forward(&input, weight, bias, eps as f32))?;
    let again = {
        let (compute, input, weight, bias) = (compute.clone(), input.clone(), weight.clone(), bias.clone());
        move || on!(&compute, layer_norm_forward(&input, &weight, &bias, eps as f32)).map(|(output, _)| output)
    };
    let (into_x, weight, bias) = (x.slot(), weight.clone(), bias.clone());
    let backward = move |dy: Tensor, gradients: &mut Gradients| {
        gradients.add(into_x, |before| on!(&compute, layer_norm_backward(&dy, &input, &stats, &weight, &bias, before)))
    };
    Ok(x.tape().record(output, backward).comes_again(again))
}
