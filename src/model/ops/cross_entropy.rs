//! Linear head and cross-entropy in one operation that never holds all logits.

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::model::block::Context;
use crate::model::param::Param;
use crate::model::tape::Activation;

/// Targets with this value do not count, as in PyTorch.
pub const IGNORE_INDEX: i64 = -100;

/// Logits that exist at once on a GPU: enough tokens for products at full speed, whatever the vocabulary.
const LOGITS: usize = 128 << 20;
/// Tokens are taken in multiples of the products' tiles.
const TOKEN_TILE: usize = 128;

/// Tokens whose logits exist at once on a GPU.
pub(crate) fn tokens_per_block(tokens: usize, vocabulary: usize) -> usize {
    ((LOGITS / vocabulary / TOKEN_TILE).max(1) * TOKEN_TILE).min(tokens)
}

/// Sum over the counted targets of `-log softmax(x Wᵀ)[target]`, divided by `ctx.target_count`. `x` is (.., hidden),
/// `weight` (vocabulary, hidden), `targets` (..) of u32 or i64 in host memory, where -100 does not count.
///
/// Must be the last operation of the model: gradients are taken as soon as the logits of a few tokens are there, for a
/// loss that nothing scales.
pub fn linear_cross_entropy(x: &Activation, weight: &Param, targets: &Tensor, ctx: &Context) -> Result<Activation> {
    let targets = targets.flatten_all()?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let width = x.width();
    if width != weight.columns() || x.elements() != targets.len() * width {
        bail!(
            "linear_cross_entropy: input {:?} and {} targets do not fit `{}` of shape {:?}",
            x.dims(),
            targets.len(),
            weight.name(),
            weight.shape()
        );
    }
    if let Some(target) = targets.iter().find(|&&t| t != IGNORE_INDEX && !(0..weight.rows() as i64).contains(&t)) {
        bail!("linear_cross_entropy: target {target} is outside of {} classes: check the tokenizer", weight.rows());
    }
    let scale = 1.0 / ctx.target_count.max(1) as f32;
    let loss_scale = x.tape().loss_scale();
    let gradient_scale = x.tape().is_recording().then_some(scale * loss_scale);
    let (loss, dx) = on!(x.compute(), linear_cross_entropy(&x.tensor()?, weight, &targets, scale, gradient_scale))?;
    let (into_x, compute) = (x.slot(), x.compute().clone());
    Ok(x.tape().record(loss, move |upstream, gradients| {
        // The seed of a tape lies in host memory: anything else went through another operation.
        if !matches!(upstream.device(), Device::Cpu) || upstream.flatten_all()?.to_vec1::<f32>()? != [loss_scale] {
            bail!("linear_cross_entropy must be the last operation of the model, with nothing applied to its loss")
        }
        let Some(dx) = dx else { return Ok(()) };
        gradients.add(into_x, |before| before.map_or(Ok(dx.clone()), |before| super::sum(&compute, &before, &dx)))
    }))
}
