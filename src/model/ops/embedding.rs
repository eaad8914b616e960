//! Token and position embeddings, with gradients in a fixed order: tokens of one row are summed in order of position.

use candle_core::{DType, Result, bail};

use crate::model::param::Param;
use crate::model::tape::Activation;

/// Rows of `table` (vocabulary, hidden) for `ids` (.., u32), which lie in host memory on every backend.
pub fn embedding(ids: &Activation, table: &Param) -> Result<Activation> {
    let values = ids.tensor()?.flatten_all()?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
    if let Some(id) = values.iter().find(|&&id| id as usize >= table.rows()) {
        bail!("embedding: token {id} is outside of `{}` with {} rows: check the tokenizer", table.name(), table.rows());
    }
    let compute = ids.compute().clone();
    let output = on!(&compute, embedding_forward(&values, ids.dims(), table))?;
    let table = table.clone();
    Ok(ids.tape().record(output, move |dy, _| on!(&compute, embedding_backward(&dy, &values, &table))))
}

/// Adds row `t` of `table` (positions, hidden) to `x[.., t, ..]` (batch, time, hidden).
pub fn positional_embedding(x: &Activation, table: &Param) -> Result<Activation> {
    let fits = matches!(x.dims(), &[_, time, width] if time <= table.rows() && width == table.columns());
    if !fits {
        bail!(
            "positional_embedding: input {:?} does not fit `{}` of shape {:?}",
            x.dims(),
            table.name(),
            table.shape()
        );
    }
    let (compute, into_x) = (x.compute().clone(), x.slot());
    let output = on!(&compute, positions_forward(&x.tensor()?, table))?;
    let table = table.clone();
    Ok(x.tape().record(output, move |dy, gradients| {
        on!(&compute, positions_backward(&dy, &table))?;
        gradients.pass(into_x, &dy)
    }))
}

/// Positions ordered by their token, those of one token in order.
pub(crate) fn sorted_positions(ids: &[u32]) -> Vec<u32> {
    let mut keys: Vec<u64> = ids.iter().zip(0u64..).map(|(&id, position)| u64::from(id) << 32 | position).collect();
    keys.sort_unstable();
    keys.into_iter().map(|key| key as u32).collect()
}
