//! RMS normalisation over the last dimension (Zhang and Sennrich, 2019).

use candle_core::{Result, Tensor, bail};

use crate::model::param::Param;
use crate::model::tape::{Activation, Gradients};

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension, for `x` (.., hidden) and `weight` (hidden).
pub fn rms_norm(x: &Activation, weight: &Param, eps: f64) -> Result<Activation> {
    if weight.shape() != [x.width()] {
        bail!(
            "rms_norm: `{}` has shape {:?}, the input's last dimension is {}",
            weight.name(),
            weight.shape(),
            x.width()
        );
    }
    let (compute, input) = (x.compute().clone(), x.tensor()?);
    let (output, stats) = on!(&compute, rms_norm_forward(&input, weight, eps as f32))?;
    let again = {
        let (compute, input, weight) = (compute.clone(), input.clone(), weight.clone());
        move || on!(&compute, rms_norm_forward(&input, &weight, eps as f32)).map(|(output, _)| output)
    };
    let (into_x, weight) = (x.slot(), weight.clone());
    let backward = move |dy: Tensor, gradients: &mut Gradients| {
        gradients.add(into_x, |before| on!(&compute, rms_norm_backward(&dy, &input, &stats, &weight, before)))
    };
    Ok(x.tape().record(output, backward).comes_again(again))
}
