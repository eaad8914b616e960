//! Causal self-attention on packed queries, keys and values (Vaswani et al., 2017); scores are never kept.

use candle_core::{Result, bail};

use crate::model::tape::Activation;

/// `softmax(Q Kᵀ / sqrt(d) + causal mask) V` for `qkv` (batch, time, 3 * hidden) into (batch, time, hidden).
pub fn causal_attention(qkv: &Activation, heads: usize) -> Result<Activation> {
    let &[_, _, packed] = qkv.dims() else {
        bail!("causal_attention: {:?} is not (batch, time, 3 * hidden)", qkv.dims())
    };
    if heads == 0 || packed % (3 * heads) != 0 {
        bail!("causal_attention: {packed} columns cannot be split into 3 x {heads} heads");
    }
    let (compute, input, into_qkv) = (qkv.compute().clone(), qkv.tensor()?, qkv.slot());
    let (output, log_sum_exp) = on!(&compute, attention_forward(&input, heads))?;
    let kept = output.clone();
    Ok(qkv.tape().record(output, move |dy, gradients| {
        gradients.add(into_qkv, |before| {
            let gradient = on!(&compute, attention_backward(&dy, &input, &kept, log_sum_exp.as_ref(), heads))?;
            before.map_or(Ok(gradient.clone()), |before| super::sum(&compute, &before, &gradient))
        })
    }))
}
