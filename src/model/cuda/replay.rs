//! Calls of a library that come again with the same addresses: from then on the kernels that they came to are queued without
//! it. What the library works out in every call, from a plan to the arguments of its kernels, takes the host longer than queuing
//! them.
//!
//! What is queued are the very kernels and arguments of the call, so results have the same bits.

#![expect(unsafe_code, reason = "calls the driver")]

use std::collections::HashMap;
use std::hash::Hash;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::sys::CUlaunchAttributeID as Id;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DriverError, result, sys};

use super::ops::message;

/// A call is recorded when it has come this often: where chunks travel many addresses come once, and recording costs as much
/// as several calls.
const SIGHTINGS: u32 = 2;
/// New calls after which those that have not come since as many were new are forgotten: more than a step has. What is known of
/// one takes a few KiB of host memory.
const GENERATION: usize = 4096;
/// What decides how blocks run together. A kernel whose launch does not tell these is not recorded.
const DECISIVE: [Id; 2] = [Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION];
/// What else a library may ask of a launch; no result depends on it.
const HINTS: [Id; 5] = [
    Id::CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW,
    Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE,
    Id::CU_LAUNCH_ATTRIBUTE_PRIORITY,
    Id::CU_LAUNCH_ATTRIBUTE_MEM_SYNC_DOMAIN_MAP,
    Id::CU_LAUNCH_ATTRIBUTE_MEM_SYNC_DOMAIN,
];

/// What a call queued.
pub(super) struct Recording {
    /// Owns what the kernels' arguments point to.
    graph: sys::CUgraph,
    work: Vec<Work>,
}

enum Work {
    Clear {
        address: u64,
        bytes: usize,
    },
    Kernel {
        function: sys::CUfunction,
        parameters: sys::CUDA_KERNEL_NODE_PARAMS,
        attributes: Vec<sys::CUlaunchAttribute>,
    },
}

impl Recording {
    /// Queues the same again.
    ///
    /// # Safety
    /// As for the call.
    pub unsafe fn queue(&mut self, stream: &CudaStream) -> Result<()> {
        let stream = stream.cu_stream();
        for work in &mut self.work {
            // SAFETY: what the call queued, whose arguments live with the graph; the caller vouches for the addresses.
            unsafe {
                match work {
                    Work::Clear { address, bytes } => result::memset_d8_async(*address, 0, *bytes, stream),
                    Work::Kernel { function, parameters, attributes } => {
                        launch(*function, parameters, attributes, stream)
                    }
                }
            }
            .map_err(message)?;
        }
        Ok(())
    }
}

/// # Safety
/// The function and its parameters as a graph has them.
unsafe fn launch(
    function: sys::CUfunction,
    parameters: &sys::CUDA_KERNEL_NODE_PARAMS,
    attributes: &mut [sys::CUlaunchAttribute],
    stream: sys::CUstream,
) -> std::result::Result<(), DriverError> {
    let config = sys::CUlaunchConfig {
        gridDimX: parameters.gridDimX,
        gridDimY: parameters.gridDimY,
        gridDimZ: parameters.gridDimZ,
        blockDimX: parameters.blockDimX,
        blockDimY: parameters.blockDimY,
        blockDimZ: parameters.blockDimZ,
        sharedMemBytes: parameters.sharedMemBytes,
        hStream: stream,
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    };
    // One of the two forms of arguments is null.
    let (each, all) = (parameters.kernelParams, parameters.extra);
    // SAFETY: by this function's contract.
    unsafe {
        sys::cuLaunchKernelEx(&raw const config, function, each, if each.is_null() { all } else { ptr::null_mut() })
    }
    .result()
}

impl Drop for Recording {
    fn drop(&mut self) {
        // SAFETY: made by `record` and used by nobody else. The driver has copied the arguments of what is queued.
        let _ = unsafe { result::graph::destroy(self.graph) };
    }
}

/// What is known of a call.
enum Known<G> {
    Seen(u32),
    Recorded(G),
    /// It is more than is understood here.
    Unrecorded,
}

/// How a call is to be queued.
pub(super) enum Way<'a, G> {
    /// As it was recorded.
    Again(&'a mut G),
    /// By the library, and it is to be recorded.
    ToRecord,
    /// By the library.
    Anew,
}

/// The calls of late. When a generation of new ones has come, those are forgotten that have not come since the last time.
pub(super) struct Calls<K, G> {
    recent: HashMap<K, Known<G>>,
    earlier: HashMap<K, Known<G>>,
    /// New ones among the recent. Those that come again do not count: they would drive each other out where a step has more
    /// than a generation.
    new: usize,
    generation: usize,
}

impl<K: Eq + Hash + Clone, G> Calls<K, G> {
    pub fn new(generation: usize) -> Self {
        Calls { recent: HashMap::new(), earlier: HashMap::new(), new: 0, generation }
    }

    /// Counts a sighting of `call`.
    pub fn way(&mut self, call: &K) -> Way<'_, G> {
        if !self.recent.contains_key(call) {
            let known = self.earlier.remove(call).unwrap_or_else(|| {
                self.new += 1;
                Known::Seen(0)
            });
            if self.new > self.generation {
                self.earlier = std::mem::take(&mut self.recent);
                self.new = 1;
            }
            self.recent.insert(call.clone(), known);
        }
        match self.recent.get_mut(call) {
            Some(Known::Recorded(recording)) => Way::Again(recording),
            Some(Known::Seen(count)) => {
                *count = count.saturating_add(1);
                if *count >= SIGHTINGS { Way::ToRecord } else { Way::Anew }
            }
            Some(Known::Unrecorded) | None => Way::Anew,
        }
    }

    /// Keeps what was recorded of `call`, if anything was.
    pub fn keep(&mut self, call: &K, recording: Option<G>) {
        self.recent.insert(call.clone(), recording.map_or(Known::Unrecorded, Known::Recorded));
    }
}

/// Records calls on a stream of its own, on which nothing ever runs.
pub(super) struct Recorder {
    stream: Arc<CudaStream>,
}

impl Recorder {
    /// Beside `stream`.
    pub fn new(stream: &CudaStream) -> Result<Self> {
        let stream = stream.context().new_stream().map_err(message)?;
        Ok(Recorder { stream })
    }

    /// What `call` queues on the stream that it gets; `None` if that is more than one or two kernels
    /// and clearings.
    pub fn record(&self, call: impl FnOnce(&CudaStream) -> Result<()>) -> Result<Option<Recording>> {
        let stream = self.stream.cu_stream();
        // Other threads allocate and register memory meanwhile, which has nothing to do with what is recorded.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: a live stream that only this function uses.
        unsafe { result::stream::begin_capture(stream, mode) }.map_err(message)?;
        let called = call(&self.stream);
        // SAFETY: as above; a capture ends whatever came of the call.
        let graph = unsafe { result::stream::end_capture(stream) }.map_err(message);
        // Owned from here on: a call that fails has its graph as well.
        let recording = graph.map(|graph| Recording { graph, work: Vec::new() });
        called?;
        let mut recording = recording?;
        for node in nodes(recording.graph).map_err(message)? {
            match work(node).map_err(message)? {
                Some(work) => recording.work.push(work),
                None => return Ok(None),
            }
        }
        Ok(if recording.work.is_empty() { None } else { Some(recording) })
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
        let kind = written(|place| sys::cuGraphNodeGetType(node, place))?;
        match kind {
            sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET => {
                let memset = written(|place| sys::cuGraphMemsetNodeGetParams(node, place))?;
                let bytes = memset.width * memset.elementSize as usize;
                let clears = memset.value == 0 && memset.height == 1;
                Ok(clears.then_some(Work::Clear { address: memset.dst, bytes }))
            }
            sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL => {
                let parameters = written(|place| sys::cuGraphKernelNodeGetParams_v2(node, place))?;
                let function = if parameters.func.is_null() {
                    written(|place| sys::cuKernelGetFunction(place, parameters.kern))?
                } else {
                    parameters.func
                };
                let decisive = DECISIVE.map(|id| attribute(node, id));
                if decisive.iter().any(std::result::Result::is_err) {
                    return Ok(None);
                }
                let all = decisive.into_iter().chain(HINTS.map(|id| attribute(node, id)));
                let attributes = all.filter_map(|attribute| attribute.ok().flatten()).collect();
                Ok(Some(Work::Kernel { function, parameters, attributes }))
            }
            _ => Ok(None),
        }
    }
}

/// An attribute of a kernel's launch, if it is not all zeros.
///
/// # Safety
/// A node of a live graph that is a kernel.
unsafe fn attribute(
    node: sys::CUgraphNode,
    id: Id,
) -> std::result::Result<Option<sys::CUlaunchAttribute>, DriverError> {
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    // SAFETY: by this function's contract; every bit pattern is a value of the padding.
    let is_set = unsafe {
        sys::cuGraphKernelNodeGetAttribute(node, id, &raw mut value).result()?;
        value.pad.iter().any(|&byte| byte != 0)
    };
    Ok(is_set.then_some(sys::CUlaunchAttribute { id, pad: [0; 4], value }))
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

/// Calls of the library, and what is recorded of them.
pub(super) struct Replays<K> {
    calls: Calls<K, Recording>,
    /// Gone where the library does not let itself be recorded.
    recorder: Option<Recorder>,
    replayed: u64,
}

impl<K: Eq + Hash + Clone> Replays<K> {
    /// For `stream`.
    pub fn new(stream: &CudaStream) -> Result<Self> {
        Ok(Replays { calls: Calls::new(GENERATION), recorder: Some(Recorder::new(stream)?), replayed: 0 })
    }

    /// Queues `call` on `stream`, by `anew` or as it was recorded.
    ///
    /// # Safety
    /// Calls that are equal queue the same work, which may be queued now.
    pub unsafe fn queue(
        &mut self,
        call: &K,
        stream: &CudaStream,
        mut anew: impl FnMut(&CudaStream) -> Result<()>,
    ) -> Result<()> {
        let Some(recorder) = &self.recorder else { return anew(stream) };
        match self.calls.way(call) {
            Way::Again(recording) => {
                self.replayed += 1;
                // SAFETY: by this function's contract.
                return unsafe { recording.queue(stream) };
            }
            Way::Anew => return anew(stream),
            Way::ToRecord => {}
        }
        match recorder.record(&mut anew) {
            Ok(recording) => self.calls.keep(call, recording),
            Err(error) => {
                tracing::warn!("matrix products are not recorded, so queuing a step takes longer: {error}");
                self.recorder = None;
                self.calls = Calls::new(GENERATION);
            }
        }
        anew(stream)
    }

    /// How often a recorded call was queued without the library.
    pub fn replayed(&self) -> u64 {
        self.replayed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(calls: &mut Calls<u32, u32>, call: u32) {
        for _ in 1..SIGHTINGS {
            assert!(matches!(calls.way(&call), Way::Anew));
        }
        assert!(matches!(calls.way(&call), Way::ToRecord));
        calls.keep(&call, Some(10 * call));
    }

    fn is_recorded(calls: &mut Calls<u32, u32>, call: u32) -> bool {
        matches!(calls.way(&call), Way::Again(&mut recording) if recording == 10 * call)
    }

    #[test]
    fn what_came_often_is_recorded_and_kept_while_it_comes() {
        let mut calls = Calls::new(4);
        record(&mut calls, 1);
        record(&mut calls, 2);
        // Two generations of calls that come once; 1 comes in each.
        for once in 100..110 {
            assert!(matches!(calls.way(&once), Way::Anew));
            if once % 2 == 0 {
                assert!(is_recorded(&mut calls, 1));
            }
        }
        assert!(matches!(calls.way(&2), Way::Anew), "2 has not come since");
        assert!(calls.recent.len() + calls.earlier.len() <= 4 * 4);
        calls.keep(&2, None);
        assert!(matches!(calls.way(&2), Way::Anew), "it was not understood");
    }

    #[test]
    fn a_step_of_more_calls_than_a_generation_has_all_of_them_recorded() {
        let mut calls = Calls::new(8);
        for _ in 0..3 {
            for call in 0..12 {
                if matches!(calls.way(&call), Way::ToRecord) {
                    calls.keep(&call, Some(10 * call));
                }
            }
        }
        assert!((0..12).all(|call| is_recorded(&mut calls, call)));
    }
}
