//! Tensor maps: how kernels address boxes of a packed buffer of heads when they copy through the tensor memory unit.

#![expect(unsafe_code, reason = "calls the driver")]

use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{DType, Result, bail};
use patrickstar_actors::cuda::TensorMap;

/// What one copy takes. Rows of 128 bytes are what the kernels' swizzle wants: narrower ones lie as far apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct MapBox {
    pub columns: u32,
    pub rows: u32,
}

/// A slice of a packed buffer: `heads` heads of `head_dim` elements, for every token of every sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    /// Address of the first head of the first token.
    pub address: u64,
    /// Elements from one token to the next.
    pub stride: usize,
    pub heads: usize,
}

/// The map of a slice, as `attention_forward.cu` describes it.
pub(super) fn encode(
    heads: Heads,
    (batch, time, head_dim): (usize, usize, usize),
    dtype: DType,
    of: MapBox,
) -> Result<TensorMap> {
    let kind = match dtype {
        DType::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        other => bail!("no tensor map of {other:?}"),
    };
    let size = dtype.size_in_bytes() as u64;
    let sizes = [head_dim as u64, time as u64, heads.heads as u64, batch as u64];
    let token = heads.stride as u64 * size;
    let strides = [token, head_dim as u64 * size, time as u64 * token];
    let (copied, steps) = ([of.columns, of.rows, 1, 1], [1u32; 4]);
    let mut map = TensorMap([0; 16]);
    // SAFETY: the arrays have the length of the rank, and the map the size and alignment of the driver's type.
    let status = unsafe {
        sys::cuTensorMapEncodeTiled(
            (&raw mut map).cast(),
            kind,
            sizes.len() as u32,
            heads.address as *mut _,
            sizes.as_ptr(),
            strides.as_ptr(),
            copied.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    match status {
        sys::CUresult::CUDA_SUCCESS => Ok(map),
        other => bail!("attention: {heads:?} of {head_dim} elements cannot be mapped: {other:?}"),
    }
}
