//! Loading and launching of kernels that were compiled ahead, so that no start waits for a compiler.

#![expect(unsafe_code, reason = "calls the driver")]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::sys::cuFuncGetParamInfo;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, sys};
use cudarc::nvrtc::Ptx;

use super::context::device_error;
use super::profile::Profile;
use crate::memory::MemoryError;

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// An address in device memory; 0 for none.
    Pointer(u64),
    /// `uint64_t` or `int64_t`.
    U64(u64),
    /// `int`.
    I32(i32),
    /// `float`.
    F32(f32),
    /// `CUtensorMap`, by value.
    Map(TensorMap),
}

/// A tensor map as the driver encodes it, for kernels that copy by whole boxes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct TensorMap(pub [u64; 16]);

/// Blocks, threads a block, and bytes of dynamic shared memory a block.
#[derive(Clone, Copy, Debug, Default)]
pub struct Grid {
    /// Blocks in x, y and z.
    pub blocks: [u32; 3],
    /// Threads a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Whether blocks may come while the kernel before ends, for which the kernel waits itself.
    pub overlaps: bool,
}

impl Arg {
    fn bytes(&self) -> usize {
        match self {
            Arg::Pointer(_) | Arg::U64(_) => 8,
            Arg::I32(_) | Arg::F32(_) => 4,
            Arg::Map(_) => size_of::<TensorMap>(),
        }
    }

    /// Where the value lies.
    fn place(&self) -> *mut c_void {
        match self {
            Arg::Pointer(value) | Arg::U64(value) => (&raw const *value).cast_mut().cast(),
            Arg::I32(value) => (&raw const *value).cast_mut().cast(),
            Arg::F32(value) => (&raw const *value).cast_mut().cast(),
            Arg::Map(value) => (&raw const *value).cast_mut().cast(),
        }
    }
}

/// Bytes of each parameter of a loaded kernel.
fn parameters(function: &CudaFunction) -> Arc<[usize]> {
    (0..)
        .map_while(|index| {
            let (mut offset, mut bytes) = (0, 0);
            // SAFETY: both are places for one number; an index past the end is an error, which ends the list.
            let status = unsafe { cuFuncGetParamInfo(function.cu_function(), index, &raw mut offset, &raw mut bytes) };
            status.result().ok().map(|()| bytes)
        })
        .collect()
}

impl Grid {
    /// A one-dimensional grid without dynamic shared memory.
    pub fn linear(blocks: u64, threads: u32) -> Self {
        Grid { blocks: [u32::try_from(blocks).unwrap_or(u32::MAX), 1, 1], threads, ..Grid::default() }
    }

    /// For a kernel that waits for the one before it, and may be launched before that has ended.
    pub fn overlapping(self) -> Self {
        Grid { overlaps: true, ..self }
    }
}

/// More dynamic shared memory than this has to be asked for, once a function.
const DEFAULT_SHARED: u32 = 48 << 10;

/// The compute capability from which on kernels may wait for the one before them themselves.
const OVERLAPPING: i32 = 9;

/// The kernels of one compiled source.
pub struct Kernels {
    class: &'static str,
    module: Arc<CudaModule>,
    profile: Arc<Profile>,
    /// Whether the GPU lets kernels come before the one before them has ended.
    overlaps: bool,
    functions: Mutex<HashMap<&'static str, Function>>,
}

#[derive(Clone)]
struct Function {
    function: CudaFunction,
    /// Bytes of each parameter, as it was compiled.
    parameters: Arc<[usize]>,
}

impl Kernels {
    /// Loads the compiled source `name`, whose kernels `profile` counts as one class.
    pub fn load(
        context: &Arc<CudaContext>,
        profile: &Arc<Profile>,
        name: &'static str,
        cubin: &[u8],
    ) -> Result<Self, MemoryError> {
        let module = context
            .load_module(Ptx::from_binary(cubin.to_vec()))
            .map_err(|error| MemoryError::Kernels { name, reason: error.to_string() })?;
        let major = context
            .attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
            .map_err(|error| device_error("tell its compute capability", error))?;
        let (profile, functions) = (Arc::clone(profile), Mutex::default());
        Ok(Kernels { class: name, module, profile, overlaps: major >= OVERLAPPING, functions })
    }

    /// Queues `name` on `stream`.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, and every address must stay valid until the stream has passed it. With an
    /// overlapping grid the kernel must wait for the one before it ahead of all accesses to memory.
    pub unsafe fn launch(
        &self,
        stream: &Arc<CudaStream>,
        name: &'static str,
        grid: Grid,
        args: &[Arg],
    ) -> Result<(), MemoryError> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let Function { function, parameters } = self.function(name, grid.shared)?;
        // The driver would read what is missing from wherever the list of arguments ends.
        if !args.iter().map(|arg| arg.bytes()).eq(parameters.iter().copied()) {
            return Err(MemoryError::Device {
                action: name,
                reason: format!("the kernel takes {parameters:?} bytes, the call gives {args:?}; please report this"),
            });
        }
        let mut places: Vec<*mut c_void> = args.iter().map(Arg::place).collect();
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid.blocks[0],
            gridDimY: grid.blocks[1],
            gridDimZ: grid.blocks[2],
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            hStream: stream.cu_stream(),
            attrs: &raw mut overlap,
            numAttrs: u32::from(grid.overlaps && self.overlaps),
        };
        let failed = |error| device_error(name, error);
        stream.context().bind_to_thread().map_err(failed)?;
        self.profile.span(self.class, stream, || {
            // SAFETY: the caller vouches for the arguments, which the driver copies.
            unsafe {
                sys::cuLaunchKernelEx(
                    &raw const config,
                    function.cu_function(),
                    places.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            }
            .result()
            .map_err(failed)
        })
    }

    fn function(&self, name: &'static str, shared: u32) -> Result<Function, MemoryError> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(function.clone());
        }
        let function = self.module.load_function(name).map_err(|error| device_error(name, error))?;
        if shared > DEFAULT_SHARED {
            // A kernel asks for the same amount in every launch: its name tells the tile sizes.
            function
                .set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared as i32)
                .map_err(|error| device_error(name, error))?;
        }
        let function = Function { parameters: parameters(&function), function };
        functions.insert(name, function.clone());
        Ok(function)
    }
}
