//! GELU (Hendrycks and Gimpel, 2016): the tanh form of GPT-2 and the exact erf form.

use candle_core::Result;

use crate::model::tape::Activation;

/// Which function is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// By a cubic in a tanh, as GPT-2 does.
    Tanh,
    /// Exact.
    Erf,
}

/// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x³)))`, which Hugging Face calls `gelu_new`.
pub fn gelu_tanh(x: &Activation) -> Result<Activation> {
    gelu(x, Gelu::Tanh)
}

/// `x/2 (1 + erf(x / sqrt(2)))`.
pub fn gelu_erf(x: &Activation) -> Result<Activation> {
    gelu(x, Gelu::Erf)
}

fn gelu(x: &Activation, form: Gelu) -> Result<Activation> {
    let (compute, input, into_x) = (x.compute().clone(), x.tensor()?, x.slot());
    let output = on!(&compute, gelu_forward(&input, form))?;
    Ok(x.tape().record(output, move |dy, gradients| {
        gradients.add(into_x, |before| on!(&compute, gelu_backward(&dy, &input, form, before)))
    }))
}
