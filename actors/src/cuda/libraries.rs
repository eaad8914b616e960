//! The CUDA libraries, looked for when one of their functions is called first: a program built for GPUs starts where they are
//! missing, does there what needs no GPU, and says in one line what is missing.
//!
//! The bindings that candle brings are linked against the libraries. Each of their functions that the program calls is defined
//! here, as a jump to what the library has by that name; so the linker has nothing left to look for in the libraries, and the
//! loader does not ask for them. A function that is missing below is linked as before: the program then needs its library to
//! start, and nothing else changes. So it is on other processors and systems than Linux on x86-64, whose calls the jumps are
//! written for.

#![expect(unsafe_code, reason = "jumps to functions of libraries that are found while running")]

use std::ffi::CStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::sys::CUDA_VERSION;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};

use crate::memory::MemoryError;

/// A library, and what its functions return where it is missing.
struct Source {
    /// Its file, but for the version.
    file: &'static str,
    version: u32,
    product: &'static str,
    missing: extern "C" fn() -> u32,
    loaded: OnceLock<Result<Library, String>>,
}

impl Source {
    const fn new(file: &'static str, version: u32, product: &'static str, missing: extern "C" fn() -> u32) -> Self {
        Source { file, version, product, missing, loaded: OnceLock::new() }
    }

    fn open(&self) -> &Result<Library, String> {
        let file = || format!("{}.so.{}", self.file, self.version);
        // SAFETY: the libraries of the vendor do nothing when they are loaded that another thread could see.
        let load = || unsafe { Library::open(Some(file()), RTLD_LAZY | RTLD_GLOBAL) };
        self.loaded.get_or_init(|| load().map_err(|error| error.to_string()))
    }

    /// Address of a function, or of one that returns an error.
    fn function(&self, name: &CStr) -> usize {
        let missing = self.missing as *const () as usize;
        let Ok(library) = self.open() else { return missing };
        // SAFETY: only its address is used, by callers that know its type.
        let found = unsafe { library.get::<unsafe extern "C" fn()>(name.to_bytes_with_nul()) };
        found.map_or(missing, |function| *function as *const () as usize)
    }
}

/// `CUDA_ERROR_STUB_LIBRARY` and `cudaErrorStubLibrary`: no driver is behind this function.
extern "C" fn no_driver() -> u32 {
    34
}

/// `CUBLAS_STATUS_NOT_INITIALIZED`.
extern "C" fn no_blas() -> u32 {
    1
}

/// `CURAND_STATUS_NOT_INITIALIZED`.
extern "C" fn no_rand() -> u32 {
    101
}

const TOOLKIT: u32 = CUDA_VERSION / 1000;

static SOURCES: [Source; 5] = [
    Source::new("libcuda", 1, "the NVIDIA driver", no_driver),
    Source::new("libcudart", TOOLKIT, "the CUDA runtime", no_driver),
    Source::new("libcublas", TOOLKIT, "cuBLAS", no_blas),
    Source::new("libcublasLt", TOOLKIT, "cuBLAS", no_blas),
    Source::new("libcurand", 10, "cuRAND", no_rand),
];

/// Tells the first library that is missing, before a call that would only return a number.
pub fn check() -> Result<(), MemoryError> {
    SOURCES.iter().try_for_each(|source| match source.open() {
        Ok(_) => Ok(()),
        Err(reason) => Err(MemoryError::Library { product: source.product, reason: reason.clone() }),
    })
}

/// Defines functions of the libraries as jumps through the targets, which lead to `resolve` until the first call.
macro_rules! functions {
    ($($source:literal: $($name:ident),+;)+) => {
        /// Library and name of each, in the order of the targets.
        const FUNCTIONS: &[(usize, &str)] = &[$($(($source, concat!(stringify!($name), "\0")),)+)+];

        std::arch::global_asm!(
            ".pushsection .data.rel.patrickstar_cuda, \"aw\", @progbits",
            ".balign 8",
            ".globl patrickstar_cuda_targets",
            ".hidden patrickstar_cuda_targets",
            "patrickstar_cuda_targets:",
            $($(concat!(".quad patrickstar_cuda_first_", stringify!($name)),)+)+
            ".popsection",
            ".pushsection .text.patrickstar_cuda, \"ax\", @progbits",
            ".set patrickstar_cuda_index, 0",
            $($(
                concat!(".globl ", stringify!($name)),
                concat!(".type ", stringify!($name), ", @function"),
                concat!(stringify!($name), ":"),
                "jmpq *(patrickstar_cuda_targets + 8 * patrickstar_cuda_index)(%rip)",
                concat!(".size ", stringify!($name), ", . - ", stringify!($name)),
                concat!("patrickstar_cuda_first_", stringify!($name), ":"),
                "movl $patrickstar_cuda_index, %r11d",
                "jmp patrickstar_cuda_resolve",
                ".set patrickstar_cuda_index, patrickstar_cuda_index + 1",
            )+)+
            // What a function gets in registers is kept for it: six numbers, eight vectors, and how many of those there are.
            // Seven words and 128 bytes below a return address the stack is a multiple of 16 again, as a call needs it.
            "patrickstar_cuda_resolve:",
            "pushq %rax", "pushq %rdi", "pushq %rsi", "pushq %rdx", "pushq %rcx", "pushq %r8", "pushq %r9",
            "subq $128, %rsp",
            "movups %xmm0, (%rsp)", "movups %xmm1, 16(%rsp)", "movups %xmm2, 32(%rsp)", "movups %xmm3, 48(%rsp)",
            "movups %xmm4, 64(%rsp)", "movups %xmm5, 80(%rsp)", "movups %xmm6, 96(%rsp)", "movups %xmm7, 112(%rsp)",
            "movl %r11d, %edi",
            "callq {resolve}",
            "movq %rax, %r11",
            "movups (%rsp), %xmm0", "movups 16(%rsp), %xmm1", "movups 32(%rsp), %xmm2", "movups 48(%rsp), %xmm3",
            "movups 64(%rsp), %xmm4", "movups 80(%rsp), %xmm5", "movups 96(%rsp), %xmm6", "movups 112(%rsp), %xmm7",
            "addq $128, %rsp",
            "popq %r9", "popq %r8", "popq %rcx", "popq %rdx", "popq %rsi", "popq %rdi", "popq %rax",
            "jmpq *%r11",
            ".popsection",
            resolve = sym resolve,
            options(att_syntax)
        );
    };
}

functions! {
    0:
        cuCtxDestroy_v2, cuCtxGetCurrent, cuCtxSetCurrent, cuCtxSynchronize, cuDeviceGet, cuDeviceGetAttribute,
        cuDeviceGetDefaultMemPool, cuDeviceGetName, cuDeviceGetUuid_v2, cuDevicePrimaryCtxRelease_v2,
        cuDevicePrimaryCtxRetain, cuDeviceSetMemPool, cuEventCreate, cuEventDestroy_v2, cuEventElapsedTime_v2,
        cuEventQuery, cuEventRecord, cuEventSynchronize, cuFuncGetParamInfo, cuFuncSetAttribute, cuGetErrorString,
        cuGraphDestroy, cuGraphGetNodes, cuGraphGetRootNodes, cuGraphKernelNodeGetAttribute,
        cuGraphKernelNodeGetParams_v2, cuGraphMemsetNodeGetParams, cuGraphNodeGetType, cuInit, cuKernelGetFunction,
        cuLaunchHostFunc, cuLaunchKernel, cuLaunchKernelEx, cuMemAddressFree, cuMemAddressReserve, cuMemAllocAsync,
        cuMemAlloc_v2, cuMemCreate, cuMemFreeAsync, cuMemFreeHost, cuMemFree_v2, cuMemGetAllocationGranularity,
        cuMemGetInfo_v2, cuMemHostAlloc, cuMemHostRegister_v2, cuMemHostUnregister, cuMemMap, cuMemPoolCreate,
        cuMemPoolDestroy, cuMemPoolGetAttribute, cuMemPoolSetAttribute, cuMemPoolTrimTo, cuMemRelease,
        cuMemSetAccess, cuMemUnmap, cuMemcpyAsync, cuMemcpyDtoDAsync_v2, cuMemcpyDtoHAsync_v2, cuMemcpyHtoDAsync_v2,
        cuMemcpyPeerAsync, cuMemsetD8Async, cuModuleGetFunction, cuModuleLoad, cuModuleLoadData, cuModuleUnload,
        cuStreamBeginCapture_v2, cuStreamCreate, cuStreamDestroy_v2, cuStreamEndCapture, cuStreamIsCapturing,
        cuStreamSynchronize, cuStreamWaitEvent, cuTensorMapEncodeTiled;
    1:
        __cudaGetKernel, __cudaLaunchKernel_ptsz, __cudaPopCallConfiguration, __cudaPushCallConfiguration,
        __cudaRegisterFatBinary, __cudaRegisterFatBinaryEnd, __cudaRegisterFunction, __cudaRegisterVar,
        __cudaUnregisterFatBinary, cudaFuncSetAttribute, cudaGetDevice;
    2:
        cublasCreate_v2, cublasDestroy_v2, cublasDgemmStridedBatched, cublasGemmStridedBatchedEx, cublasSetStream_v2;
    3:
        cublasLtCreate, cublasLtDestroy, cublasLtMatmul, cublasLtMatmulAlgoGetHeuristic, cublasLtMatmulDescCreate,
        cublasLtMatmulDescDestroy, cublasLtMatmulDescSetAttribute, cublasLtMatmulPreferenceCreate,
        cublasLtMatmulPreferenceDestroy, cublasLtMatmulPreferenceSetAttribute, cublasLtMatrixLayoutCreate,
        cublasLtMatrixLayoutDestroy;
    4:
        curandCreateGenerator, curandDestroyGenerator, curandGenerateNormal, curandGenerateNormalDouble,
        curandSetPseudoRandomGeneratorSeed, curandSetStream;
}

unsafe extern "C" {
    /// Where each function's jump goes.
    #[link_name = "patrickstar_cuda_targets"]
    static TARGETS: [AtomicUsize; FUNCTIONS.len()];
}

/// Finds a function when it is called first. Two threads may find it at once: both find the same.
extern "C" fn resolve(index: u32) -> usize {
    let (source, name) = FUNCTIONS[index as usize];
    let name = CStr::from_bytes_with_nul(name.as_bytes()).unwrap_or_default();
    let function = SOURCES[source].function(name);
    // SAFETY: defined above, as long as the list, and only ever stored to as a whole.
    unsafe { TARGETS[index as usize].store(function, Ordering::Relaxed) };
    function
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_of_missing_libraries_return_errors_and_are_named() {
        let absent = Source::new("libpatrickstar-absent", 7, "nothing", no_blas);
        let reason = absent.open().as_ref().expect_err("no such library");
        assert!(reason.contains("libpatrickstar-absent.so.7"), "{reason}");
        assert_eq!(absent.function(c"cublasCreate_v2"), no_blas as *const () as usize);
        // Whatever this machine has: of the C library there is one function by that name.
        let present = Source::new("libc", 6, "the C library", no_driver);
        assert_eq!(present.function(c"getpid"), libc::getpid as *const () as usize);
        assert_eq!(present.function(c"patrickstar_absent"), no_driver as *const () as usize);
    }
}
