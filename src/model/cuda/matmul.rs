//! Matrix products through cuBLASLt, each shape planned once.
//!
//! The plan is the heuristic's first choice, never a timing: the choice of an algorithm decides the order of a sum, and two
//! runs must have the same bits.

#![expect(unsafe_code, reason = "calls cuBLASLt")]

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cublaslt::result::CublasError;
use candle_core::cuda_backend::cudarc::cublaslt::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use candle_core::{DType, Result, bail};

use super::ops::message;
use super::replay::{BEST_ALIGNMENT, Replays};

/// Scratch of the library; what its documentation advises for this architecture.
const WORKSPACE: usize = 32 << 20;

/// A row-major matrix in device memory, or the transpose of one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    pub address: u64,
    /// Elements from one row to the next, as it lies in memory.
    pub stride: usize,
    pub transposed: bool,
}

impl Operand {
    pub fn new(address: u64, stride: usize) -> Self {
        Operand { address, stride, transposed: false }
    }

    pub fn t(self) -> Self {
        Operand { transposed: !self.transposed, ..self }
    }
}

/// `out = a b (+ add) (+ bias to every row)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    /// Rows of `out`, columns of `out`, and the length of the sums.
    pub shape: (usize, usize, usize),
    pub a: Operand,
    pub b: Operand,
    /// Address and row stride.
    pub out: (u64, usize),
    /// What is added, with the stride of `out`; may be `out` itself.
    pub add: Option<u64>,
    pub bias: Option<u64>,
    /// Element type of `a`, `b` and `bias`.
    pub dtype: DType,
    /// Element type of `out` and `add`.
    pub out_dtype: DType,
}

/// Everything that decides a plan, and what a product queues but its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    shape: (usize, usize, usize),
    strides: [usize; 3],
    transposed: [bool; 2],
    types: [DType; 2],
    adds: bool,
    bias: bool,
    alignments: [u32; 4],
}

/// `a`, `b`, `out`, `add` and `bias`; 0 for what there is not.
type Addresses = [u64; 5];

impl Product {
    fn key(&self) -> Key {
        let add = self.add.unwrap_or(self.out.0);
        Key {
            shape: self.shape,
            strides: [self.a.stride, self.b.stride, self.out.1],
            transposed: [self.a.transposed, self.b.transposed],
            types: [self.dtype, self.out_dtype],
            adds: self.add.is_some(),
            bias: self.bias.is_some(),
            alignments: [self.a.address, self.b.address, add, self.out.0].map(alignment),
        }
    }

    fn addresses(&self) -> Addresses {
        let optional = |address: Option<u64>| address.unwrap_or_default();
        [self.a.address, self.b.address, self.out.0, optional(self.add), optional(self.bias)]
    }
}

struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// cuBLASLt on one stream.
pub(super) struct Products {
    library: Library,
    replays: Replays<Key, 5>,
    stream: Arc<CudaStream>,
}

/// The library with its plans.
struct Library {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    plans: HashMap<Key, Plan>,
}

// SAFETY: the handles are used under the lock of `CudaOps` only.
unsafe impl Send for Products {}

fn failed(action: &str, error: CublasError) -> candle_core::Error {
    candle_core::Error::Msg(format!("cuBLASLt could not {action}: {error:?}"))
}

fn data_type(dtype: DType) -> Result<sys::cudaDataType_t> {
    Ok(match dtype {
        DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
        other => bail!("no matrix product of {other:?} on a GPU"),
    })
}

fn alignment(address: u64) -> u32 {
    if address == 0 {
        BEST_ALIGNMENT as u32
    } else {
        1 << address.trailing_zeros().min(BEST_ALIGNMENT.trailing_zeros())
    }
}

impl Products {
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let handle = result::create_handle().map_err(|error| failed("start", error))?;
        // SAFETY: scratch; every product writes before it reads.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE) }.map_err(message)?;
        let library = Library { handle, workspace, plans: HashMap::new() };
        Ok(Products { library, replays: Replays::new(stream)?, stream: Arc::clone(stream) })
    }

    /// Products that were queued without the library.
    pub fn replayed(&self) -> u64 {
        self.replays.replayed()
    }

    /// Queues a product.
    ///
    /// # Safety
    /// The addresses must be valid for the dimensions and strides until the stream has passed the product.
    pub unsafe fn multiply(&mut self, product: &Product) -> Result<()> {
        let (m, n, _) = product.shape;
        if m == 0 || n == 0 {
            return Ok(());
        }
        let Products { library, replays, stream } = self;
        let key = product.key();
        // SAFETY: a key says everything of a call but its addresses and the scratch, which is always the same; the library only
        // hands addresses on. The caller vouches for those of the product; at others nothing runs.
        unsafe {
            replays
                .queue(&key, product.addresses(), stream, |addresses, stream| library.multiply(&key, addresses, stream))
        }
    }
}

impl Library {
    /// # Safety
    /// As for [`Products::multiply`], which only this is for.
    unsafe fn multiply(&mut self, key: &Key, addresses: Addresses, stream: &CudaStream) -> Result<()> {
        let [a, b, target, add, bias] = addresses;
        let add = if key.adds { add } else { target };
        if !self.plans.contains_key(key) {
            let plan = self.plan(key, bias)?;
            self.plans.insert(*key, plan);
        }
        let Some(plan) = self.plans.get(key) else { bail!("a plan that was just made is missing") };
        if key.bias {
            set(plan.description, sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
        }
        let (alpha, beta) = (1f32, if key.adds { 1f32 } else { 0f32 });
        let [first, second, out] = plan.layouts;
        let workspace = self.workspace.device_ptr(stream).0;
        // Column-major `outᵀ = bᵀ aᵀ` is row-major `out = a b`.
        // SAFETY: by this function's contract; the plan was made for these dimensions and alignments.
        unsafe {
            result::matmul(
                self.handle,
                plan.description,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                b as *const _,
                first,
                a as *const _,
                second,
                add as *const _,
                out,
                target as *mut _,
                out,
                &raw const plan.algorithm,
                workspace as *mut _,
                WORKSPACE,
                stream.cu_stream().cast(),
            )
        }
        .map_err(|error| failed("multiply", error))
    }

    fn plan(&self, key: &Key, bias: u64) -> Result<Plan> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let (m, n, k) = key.shape;
        let [a_transposed, b_transposed] = key.transposed;
        let [a_stride, b_stride, out_stride] = key.strides;
        let (input, output) = (data_type(key.types[0])?, data_type(key.types[1])?);
        let layout = |kind, rows: usize, columns: usize, stride: usize| {
            result::create_matrix_layout(kind, rows as u64, columns as u64, stride as i64)
                .map_err(|error| failed("describe a matrix", error))
        };
        let (b_rows, b_columns) = if b_transposed { (k, n) } else { (n, k) };
        let (a_rows, a_columns) = if a_transposed { (m, k) } else { (k, m) };
        let layouts = [
            layout(input, b_rows, b_columns, b_stride)?,
            layout(input, a_rows, a_columns, a_stride)?,
            layout(output, n, m, out_stride)?,
        ];
        let description =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)
                .map_err(|error| failed("describe a product", error))?;
        set(description, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, i32::from(b_transposed))?;
        set(description, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, i32::from(a_transposed))?;
        if key.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            set(description, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue)?;
            set(description, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
            set(description, Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, input as u32)?;
        }
        let algorithm = self
            .choose(description, layouts, key)
            .map_err(|error| candle_core::Error::Msg(format!("cuBLASLt has no product for {key:?}: {error:?}")))?;
        Ok(Plan { description, layouts, algorithm })
    }

    fn choose(
        &self,
        description: sys::cublasLtMatmulDesc_t,
        [first, second, out]: [sys::cublasLtMatrixLayout_t; 3],
        key: &Key,
    ) -> std::result::Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let preference = result::create_matmul_pref()?;
        let [a, b, add, target] = key.alignments;
        let numbers = [
            // The library's first operand is our second.
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, add),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, target),
        ];
        // SAFETY: handles made above; each attribute is read with its own size.
        let chosen = unsafe {
            let workspace = WORKSPACE;
            result::set_matmul_pref_attribute(
                preference,
                Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                numbers.iter().try_for_each(|(attribute, value)| {
                    result::set_matmul_pref_attribute(
                        preference,
                        *attribute,
                        (&raw const *value).cast(),
                        size_of::<u32>(),
                    )
                })
            })
            .and_then(|()| {
                result::get_matmul_algo_heuristic(self.handle, description, first, second, out, out, preference)
            })
        };
        // SAFETY: made above and not used any more.
        unsafe { result::destroy_matmul_pref(preference) }?;
        chosen.map(|chosen| chosen.algo)
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        for plan in self.plans.values() {
            // SAFETY: made by `plan` and used by nobody else. What is still queued has its own copy.
            unsafe {
                let _ = result::destroy_matmul_desc(plan.description);
                for layout in plan.layouts {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
        }
        // SAFETY: as above.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn set<T: Copy>(
    description: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: T,
) -> Result<()> {
    // SAFETY: callers pass a value of the attribute's type.
    unsafe { result::set_matmul_desc_attribute(description, attribute, (&raw const value).cast(), size_of::<T>()) }
        .map_err(|error| failed("describe a product", error))
}
