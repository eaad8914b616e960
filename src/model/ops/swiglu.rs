//! The gate of SwiGLU (Shazeer, 2020), on the result of one product for both halves.

use candle_core::{Result, Tensor, bail};

use crate::model::tape::{Activation, Gradients};

/// `silu(gate) * up` for `gate_up` (.., 2 * width), each row's gate before its up, into (.., width).
pub fn swiglu(gate_up: &Activation) -> Result<Activation> {
    let packed = gate_up.width();
    if gate_up.dims().is_empty() || packed == 0 || !packed.is_multiple_of(2) {
        bail!("swiglu: the last dimension of {:?} cannot be split into gate and up", gate_up.dims());
    }
    let (compute, input, into_x) = (gate_up.compute().clone(), gate_up.tensor()?, gate_up.slot());
    let output = on!(&compute, swiglu_forward(&input))?;
    let again = {
        let (compute, input) = (compute.clone(), input.clone());
        move || on!(&compute, swiglu_forward(&input))
    };
    let backward = move |dy: Tensor, gradients: &mut Gradients| {
        gradients.add(into_x, |before| on!(&compute, swiglu_backward(&dy, &input, before)))
    };
    Ok(gate_up.tape().record(output, backward).comes_again(again))
}

/// The shape of the result for an input of shape `dims`.
pub(crate) fn halved(dims: &[usize]) -> Vec<usize> {
    let mut dims = dims.to_vec();
    if let Some(last) = dims.last_mut() {
        *last /= 2;
    }
    dims
}
