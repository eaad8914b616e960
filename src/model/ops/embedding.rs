//! Token and position embeddings, with gradients in a fixed order: tokens of one row are summed in order of position.

use std::sync::Arc;

use candle_core::{DType, Result, bail};

use super::later::Later;
use super::lookup::ByToken;
use crate::model::param::Param;
use crate::model::tape::Activation;

/// Rows of `table` (vocabulary, hidden) for `ids` (.., u32), which lie in host memory on every backend.
pub fn embedding(ids: &Activation, table: &Param) -> Result<Activation> {
    let values = ids.tensor()?.flatten_all()?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
    if let Some(id) = values.iter().find(|&&id| id as usize >= table.rows()) {
        bail!("embedding: token {id} is outside of `{}` with {} rows: check the tokenizer", table.name(), table.rows());
    }
    let (compute, values, table): (_, Arc<[u32]>, _) = (ids.compute().clone(), values.into(), table.clone());
    let dims = [ids.dims(), &[table.columns()]].concat();
    let forward = {
        // The first of a block's operations: a block that is computed again for its backward does without.
        let (compute, values, dims, table) = (compute.clone(), Arc::clone(&values), ids.dims().to_vec(), table.clone());
        move || on!(&compute, embedding_forward(&values, &dims, &table))
    };
    let dtype = compute.activation_dtype(table.precision());
    // Another thread works it out: this one queues the device's work, or waits while much of that is queued.
    let by_token = ids.tape().is_recording().then(|| Later::new(move || ByToken::new(values)));
    ids.tape().record_deferred(dims, dtype, forward, move |dy, _| match by_token.and_then(Later::get) {
        Some(by_token) => on!(&compute, embedding_backward(&dy, &by_token, &table)),
        None => bail!("embedding: the positions of tokens were not worked out: please report this"),
    })
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
    let (compute, into_x, table) = (x.compute().clone(), x.slot(), table.clone());
    let forward = {
        let (compute, x, table) = (compute.clone(), x.clone(), table.clone());
        move || on!(&compute, positions_forward(&x.tensor()?, &table))
    };
    x.tape().record_deferred(x.dims(), x.dtype(), forward, move |dy, gradients| {
        on!(&compute, positions_backward(&dy, &table))?;
        gradients.pass(into_x, &dy)
    })
}

#[cfg(test)]
mod tests {
    #![expect(unsafe_code, reason = "binds a parameter by address")]

    use candle_core::{Device, Tensor};
    use patrickstar_actors::types::Precision;

    use super::*;
    use crate::model::compute::Compute;
    use crate::model::param::ParamTile;
    use crate::model::tape::Tape;

    #[test]
    fn rows_are_looked_up_for_who_reads_them_and_not_for_their_gradients() {
        let weights: Vec<f32> = (0..8).map(|i| i as f32).collect();
        let mut gradients = [0f32; 8];
        let gradient = gradients.as_mut_ptr();
        let table = Param::new("w", &[4, 2], Precision::Fp32, None);
        let bind = || {
            let tile = ParamTile { row_start: 0, rows: 4, weight: weights.as_ptr().cast(), gradient: gradient.cast() };
            // SAFETY: the arrays outlive the binding.
            unsafe { table.bind(vec![tile]) };
        };
        let ids = Tensor::new(&[[3u32, 1], [1, 0]], &Device::Cpu).unwrap();
        let pass = |tape: &Tape| {
            let ids = tape.constant(ids.clone());
            let rows = positional_embedding(&embedding(&ids, &table).unwrap(), &table).unwrap();
            (ids, rows)
        };
        let tape = Tape::recording(&Compute::Cpu);
        bind();
        let (_, rows) = pass(&tape);
        assert_eq!(
            rows.tensor().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            [6.0, 8.0, 4.0, 6.0, 2.0, 4.0, 2.0, 4.0]
        );
        let tape = Tape::recording(&Compute::Cpu);
        let (_, rows) = pass(&tape);
        table.release();
        assert!(rows.tensor().is_err(), "the rows were there before anybody read them");
        let (_, again) = {
            bind();
            let tape = Tape::recording(&Compute::Cpu);
            let pass = pass(&tape);
            let upstream = Tensor::ones((2, 2, 2), DType::F32, &Device::Cpu).unwrap();
            assert!(tape.backward(&pass.1, Some(upstream), &pass.0).unwrap().is_none());
            pass
        };
        table.release();
        assert!(again.tensor().is_err(), "a backward pass read the rows");
        // Tokens 0 and 3 once, 1 twice, and each of the two positions in two sequences.
        assert_eq!(gradients, [3.0, 3.0, 4.0, 4.0, 0.0, 0.0, 1.0, 1.0]);
    }
}
