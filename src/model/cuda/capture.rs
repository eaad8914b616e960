//! What a call of a library queues, seen by capturing it on a stream on which nothing runs: kernels with their arguments, and
//! memory that is cleared before them.

#![expect(unsafe_code, reason = "calls the driver")]

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;
use std::slice;
use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::sys::CUlaunchAttributeID as Id;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DriverError, result, sys};

use super::ops::message;

/// What decides how blocks run together. A kernel whose launch does not tell these is not understood.
const DECISIVE: [Id; 2] = [Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION];
/// What else a library may ask of a launch; no result depends on it.
const HINTS: [Id; 5] = [
    Id::CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW,
    Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE,
    Id::CU_LAUNCH_ATTRIBUTE_PRIORITY,
    Id::CU_LAUNCH_ATTRIBUTE_MEM_SYNC_DOMAIN_MAP,
    Id::CU_LAUNCH_ATTRIBUTE_MEM_SYNC_DOMAIN,
];
const WORD: usize = size_of::<u64>();

/// One piece of what a call queued. All that may hold an address is in its words.
pub(super) struct Work {
    kind: Kind,
    /// A kernel's arguments, each from a word of its own on, or the address that is cleared.
    pub words: Vec<u64>,
}

#[derive(PartialEq)]
enum Kind {
    Clear { bytes: usize },
    Kernel(Launch),
}

/// A kernel without its arguments.
#[derive(PartialEq)]
struct Launch {
    function: sys::CUfunction,
    blocks: [u32; 3],
    threads: [u32; 3],
    shared: u32,
    attributes: Vec<Attribute>,
    arguments: Arguments,
}

#[derive(PartialEq)]
enum Arguments {
    /// The word where each begins.
    Each(Vec<usize>),
    /// One buffer of so many bytes.
    Packed(usize),
}

/// As the driver wants it: what is queued often is not put together every time.
#[repr(transparent)]
struct Attribute(sys::CUlaunchAttribute);

impl PartialEq for Attribute {
    fn eq(&self, other: &Self) -> bool {
        // SAFETY: every attribute is made from the padding, which is all of the value.
        self.0.id == other.0.id && unsafe { self.0.value.pad == other.0.value.pad }
    }
}

impl Work {
    /// Whether it is the same but for its words.
    pub fn is_like(&self, other: &Work) -> bool {
        self.kind == other.kind && self.words.len() == other.words.len()
    }

    /// Queues it.
    ///
    /// # Safety
    /// The words must be what the call would have put there for memory that is valid until the stream has passed it.
    pub unsafe fn queue(&mut self, stream: &CudaStream) -> Result<()> {
        let (stream, words) = (stream.cu_stream(), &mut self.words);
        match &self.kind {
            // SAFETY: by this function's contract.
            Kind::Clear { bytes } => unsafe { result::memset_d8_async(words[0], 0, *bytes, stream) },
            // SAFETY: as above.
            Kind::Kernel(launch) => unsafe { launch.queue(words, stream) },
        }
        .map_err(message)
    }
}

impl Launch {
    /// # Safety
    /// The words are arguments of the function, which may run now.
    unsafe fn queue(&self, words: &mut [u64], stream: sys::CUstream) -> std::result::Result<(), DriverError> {
        let [[grid_x, grid_y, grid_z], [block_x, block_y, block_z]] = [self.blocks, self.threads];
        let config = sys::CUlaunchConfig {
            gridDimX: grid_x,
            gridDimY: grid_y,
            gridDimZ: grid_z,
            blockDimX: block_x,
            blockDimY: block_y,
            blockDimZ: block_z,
            sharedMemBytes: self.shared,
            hStream: stream,
            // The driver only reads them; an attribute is what it wraps.
            attrs: self.attributes.as_ptr().cast_mut().cast(),
            numAttrs: self.attributes.len() as u32,
        };
        let launch = |each: *mut *mut c_void, packed: *mut *mut c_void| {
            // SAFETY: by this function's contract; the driver copies the arguments before it returns.
            unsafe { sys::cuLaunchKernelEx(&raw const config, self.function, each, packed) }.result()
        };
        match &self.arguments {
            Arguments::Each(starts) => {
                let base = words.as_mut_ptr();
                let mut each: Vec<*mut c_void> = starts.iter().map(|&start| base.wrapping_add(start).cast()).collect();
                launch(each.as_mut_ptr(), ptr::null_mut())
            }
            Arguments::Packed(bytes) => {
                let mut bytes = *bytes;
                let tag = |number: u32| ptr::without_provenance_mut::<c_void>(number as usize);
                let mut packed = [
                    tag(sys::CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT),
                    words.as_mut_ptr().cast(),
                    tag(sys::CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT),
                    (&raw mut bytes).cast(),
                    tag(sys::CU_LAUNCH_PARAM_END_AS_INT),
                ];
                launch(ptr::null_mut(), packed.as_mut_ptr())
            }
        }
    }

    /// A kernel's node, with its arguments in words.
    ///
    /// # Safety
    /// The parameters are those of a live graph's node, which is a kernel.
    unsafe fn read(
        node: sys::CUgraphNode,
        parameters: &sys::CUDA_KERNEL_NODE_PARAMS,
    ) -> std::result::Result<Option<(Launch, Vec<u64>)>, DriverError> {
        let function = if parameters.func.is_null() {
            // SAFETY: the kernel of a live node.
            unsafe { written(|place| sys::cuKernelGetFunction(place, parameters.kern)) }?
        } else {
            parameters.func
        };
        // SAFETY: by this function's contract.
        let decisive = DECISIVE.map(|id| unsafe { attribute(node, id) });
        if decisive.iter().any(std::result::Result::is_err) {
            return Ok(None);
        }
        // SAFETY: as above.
        let all = decisive.into_iter().chain(HINTS.map(|id| unsafe { attribute(node, id) }));
        let attributes = all.filter_map(|attribute| attribute.ok().flatten()).collect();
        // SAFETY: as above.
        let Some((arguments, words)) = (unsafe { arguments(function, parameters) }) else { return Ok(None) };
        let launch = Launch {
            function,
            blocks: [parameters.gridDimX, parameters.gridDimY, parameters.gridDimZ],
            threads: [parameters.blockDimX, parameters.blockDimY, parameters.blockDimZ],
            shared: parameters.sharedMemBytes,
            attributes,
            arguments,
        };
        Ok(Some((launch, words)))
    }
}

/// The arguments of a kernel in one of the two forms that there are.
///
/// # Safety
/// The parameters are those of a live graph's node, for this function.
unsafe fn arguments(
    function: sys::CUfunction,
    parameters: &sys::CUDA_KERNEL_NODE_PARAMS,
) -> Option<(Arguments, Vec<u64>)> {
    let mut words = Vec::new();
    if !parameters.kernelParams.is_null() {
        let mut starts = Vec::new();
        loop {
            let (mut offset, mut bytes) = (0, 0);
            // SAFETY: both are places for one number; an index past the end is an error, which ends the list.
            let status = unsafe { sys::cuFuncGetParamInfo(function, starts.len(), &raw mut offset, &raw mut bytes) };
            match status {
                sys::CUresult::CUDA_SUCCESS => {}
                sys::CUresult::CUDA_ERROR_INVALID_VALUE if !starts.is_empty() => {
                    return Some((Arguments::Each(starts), words));
                }
                _ => return None,
            }
            // SAFETY: the node has a pointer to each argument, whose size the function tells.
            let from = unsafe { parameters.kernelParams.add(starts.len()).read() };
            starts.push(words.len());
            // SAFETY: as above.
            unsafe { append(&mut words, from, bytes) };
        }
    }
    // Tags, each before what it is of.
    let (mut next, mut buffer, mut bytes) = (parameters.extra, ptr::null_mut(), 0);
    while !next.is_null() {
        // SAFETY: the list ends with a tag that is read before anything behind it.
        let tag = unsafe { next.read() };
        if tag.addr() == sys::CU_LAUNCH_PARAM_END_AS_INT as usize {
            break;
        }
        // SAFETY: every other tag has a value behind it, and another tag behind that.
        let value = unsafe { next.add(1).read() };
        match tag.addr() as u32 {
            sys::CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT => buffer = value,
            // SAFETY: the value is a place of the size.
            sys::CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT => bytes = unsafe { value.cast::<usize>().read() },
            _ => return None,
        }
        // SAFETY: as above.
        next = unsafe { next.add(2) };
    }
    if buffer.is_null() {
        return None;
    }
    // SAFETY: the buffer has as many bytes as the list says.
    unsafe { append(&mut words, buffer, bytes) };
    Some((Arguments::Packed(bytes), words))
}

/// # Safety
/// So many bytes can be read.
unsafe fn append(words: &mut Vec<u64>, from: *const c_void, bytes: usize) {
    // SAFETY: by this function's contract.
    let bytes = unsafe { slice::from_raw_parts(from.cast::<u8>(), bytes) };
    words.extend(bytes.chunks(WORD).map(|bytes| {
        let mut word = [0; WORD];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_ne_bytes(word)
    }));
}

/// A graph that was captured.
struct Graph(sys::CUgraph);

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: ended by the capture that made it, and used by nobody else.
        let _ = unsafe { result::graph::destroy(self.0) };
    }
}

/// Captures calls on a stream of its own, on which nothing ever runs.
pub(super) struct Recorder {
    stream: Arc<CudaStream>,
}

impl Recorder {
    /// Beside `stream`.
    pub fn new(stream: &CudaStream) -> Result<Self> {
        let stream = stream.context().new_stream().map_err(message)?;
        Ok(Recorder { stream })
    }

    /// What `call` queues on the stream that it gets, in order; `None` if that is more than one or two kernels and clearings.
    pub fn record(&self, call: impl FnOnce(&CudaStream) -> Result<()>) -> Result<Option<Vec<Work>>> {
        let stream = self.stream.cu_stream();
        // Other threads allocate and register memory meanwhile, which has nothing to do with what is recorded.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: a live stream that only this function uses.
        unsafe { result::stream::begin_capture(stream, mode) }.map_err(message)?;
        let called = call(&self.stream);
        // SAFETY: as above; a capture ends whatever came of the call.
        let graph = unsafe { result::stream::end_capture(stream) }.map(Graph).map_err(message);
        called?;
        let graph = graph?;
        let nodes = nodes(graph.0).map_err(message)?;
        let work =
            nodes.into_iter().map(work).collect::<std::result::Result<Option<Vec<Work>>, _>>().map_err(message)?;
        Ok(work.filter(|work| !work.is_empty()))
    }
}

/// The nodes of a graph of one or two, in their order; none of any other.
fn nodes(graph: sys::CUgraph) -> std::result::Result<Vec<sys::CUgraphNode>, DriverError> {
    let (mut count, mut root_count) = (0, 0);
    // SAFETY: a graph that was just captured; with no place for nodes only their number is told.
    unsafe {
        sys::cuGraphGetNodes(graph, ptr::null_mut(), &raw mut count).result()?;
        sys::cuGraphGetRootNodes(graph, ptr::null_mut(), &raw mut root_count).result()?;
    }
    if root_count != 1 || !(1..=2).contains(&count) {
        return Ok(Vec::new());
    }
    let (mut nodes, mut root) = (vec![ptr::null_mut(); count], [ptr::null_mut()]);
    // SAFETY: as above, with a place for each.
    unsafe {
        sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &raw mut count).result()?;
        sys::cuGraphGetRootNodes(graph, root.as_mut_ptr(), &raw mut root_count).result()?;
    }
    // Everything that is queued on one stream depends on what was before it.
    nodes.sort_by_key(|&node| node != root[0]);
    Ok(nodes)
}

/// What a node does; `None` if that is not understood here.
fn work(node: sys::CUgraphNode) -> std::result::Result<Option<Work>, DriverError> {
    // SAFETY: a node of a live graph; each call writes what it is asked for, and a node is asked for what is its own.
    unsafe {
        match written(|place| sys::cuGraphNodeGetType(node, place))? {
            sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET => {
                let memset = written(|place| sys::cuGraphMemsetNodeGetParams(node, place))?;
                let bytes = memset.width * memset.elementSize as usize;
                let clears = memset.value == 0 && memset.height == 1;
                Ok(clears.then(|| Work { kind: Kind::Clear { bytes }, words: vec![memset.dst] }))
            }
            sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL => {
                let parameters = written(|place| sys::cuGraphKernelNodeGetParams_v2(node, place))?;
                let read = Launch::read(node, &parameters)?;
                Ok(read.map(|(launch, words)| Work { kind: Kind::Kernel(launch), words }))
            }
            _ => Ok(None),
        }
    }
}

/// An attribute of a kernel's launch, if it is not all zeros.
///
/// # Safety
/// A node of a live graph that is a kernel.
unsafe fn attribute(node: sys::CUgraphNode, id: Id) -> std::result::Result<Option<Attribute>, DriverError> {
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    // SAFETY: by this function's contract; every bit pattern is a value of the padding.
    let is_set = unsafe {
        sys::cuGraphKernelNodeGetAttribute(node, id, &raw mut value).result()?;
        value.pad.iter().any(|&byte| byte != 0)
    };
    Ok(is_set.then_some(Attribute(sys::CUlaunchAttribute { id, pad: [0; 4], value })))
}

/// What `call` writes to the place that it gets.
///
/// # Safety
/// Where it succeeds it writes all of it.
unsafe fn written<T>(call: impl FnOnce(*mut T) -> sys::CUresult) -> std::result::Result<T, DriverError> {
    let mut place = MaybeUninit::zeroed();
    call(place.as_mut_ptr()).result()?;
    // SAFETY: by this function's contract.
    Ok(unsafe { place.assume_init() })
}
