//! Calls of a library that come again with the same addresses, queued as graphs from then on: what the library works out in
//! every call, from a plan to the arguments of its kernels, takes the host several times as long as queuing them.
//!
//! A graph holds the very kernels and arguments of the call that it was recorded from, so results have the same bits.

#![expect(unsafe_code, reason = "calls the driver")]

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, result, sys};

use super::ops::message;

/// A call is recorded when it has come this often: where chunks travel many addresses come once or twice, and recording costs
/// as much as several calls.
const SIGHTINGS: u32 = 3;
/// Calls of a generation: those of a few steps.
const GENERATION: usize = 2048;

/// A recorded call.
pub(super) struct Graph(sys::CUgraphExec);

impl Graph {
    /// Queues the call again.
    ///
    /// # Safety
    /// As for the call.
    pub unsafe fn launch(&self, stream: &CudaStream) -> Result<()> {
        // SAFETY: made by `record`; the caller vouches for the rest.
        unsafe { result::graph::launch(self.0, stream.cu_stream()) }.map_err(message)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `record` and used by nobody else. What is queued of it is done before the driver lets go of it.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

/// What is known of a call.
enum Known<G> {
    Seen(u32),
    Recorded(G),
}

/// How a call is to be queued.
pub(super) enum Way<'a, G> {
    /// As it was recorded.
    Again(&'a G),
    /// By the library, and it is to be recorded.
    ToRecord,
    /// By the library.
    Anew,
}

/// The calls of late. When there are too many of them those that have not come since there were too many the last time are
/// forgotten.
pub(super) struct Calls<K, G> {
    recent: HashMap<K, Known<G>>,
    earlier: HashMap<K, Known<G>>,
    generation: usize,
}

impl<K: Eq + Hash + Clone, G> Calls<K, G> {
    pub fn new(generation: usize) -> Self {
        Calls { recent: HashMap::new(), earlier: HashMap::new(), generation }
    }

    /// Counts a sighting of `call`.
    pub fn way(&mut self, call: &K) -> Way<'_, G> {
        if !self.recent.contains_key(call) {
            let known = self.earlier.remove(call).unwrap_or(Known::Seen(0));
            if self.recent.len() >= self.generation {
                self.earlier = std::mem::take(&mut self.recent);
            }
            self.recent.insert(call.clone(), known);
        }
        match self.recent.get_mut(call) {
            Some(Known::Recorded(graph)) => Way::Again(graph),
            Some(Known::Seen(count)) => {
                *count = count.saturating_add(1);
                if *count >= SIGHTINGS { Way::ToRecord } else { Way::Anew }
            }
            None => Way::Anew,
        }
    }

    /// Keeps what was recorded of `call`.
    pub fn keep(&mut self, call: &K, graph: G) {
        self.recent.insert(call.clone(), Known::Recorded(graph));
    }

    /// Calls that are recorded.
    pub fn recorded(&self) -> usize {
        let all = self.recent.values().chain(self.earlier.values());
        all.filter(|known| matches!(known, Known::Recorded(_))).count()
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

    /// What `call` queues on the stream that it gets.
    pub fn record(&self, call: impl FnOnce(&CudaStream) -> Result<()>) -> Result<Graph> {
        let stream = self.stream.cu_stream();
        // Other threads allocate and register memory meanwhile, which has nothing to do with what is recorded.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: a live stream that only this function uses.
        unsafe { result::stream::begin_capture(stream, mode) }.map_err(message)?;
        let called = call(&self.stream);
        // SAFETY: as above; a capture ends whatever came of the call.
        let graph = unsafe { result::stream::end_capture(stream) }.map_err(message);
        called?;
        let graph = graph?;
        // SAFETY: made above; an executable graph does not need it any more.
        unsafe {
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            result::graph::destroy(graph).map_err(message)?;
            executable.map(Graph).map_err(message)
        }
    }
}

/// Calls of the library, and what is recorded of them.
pub(super) struct Replays<K> {
    calls: Calls<K, Graph>,
    /// Gone where the library does not let itself be recorded.
    recorder: Option<Recorder>,
}

impl<K: Eq + Hash + Clone> Replays<K> {
    /// For `stream`.
    pub fn new(stream: &CudaStream) -> Result<Self> {
        Ok(Replays { calls: Calls::new(GENERATION), recorder: Some(Recorder::new(stream)?) })
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
            // SAFETY: by this function's contract.
            Way::Again(graph) => return unsafe { graph.launch(stream) },
            Way::Anew => return anew(stream),
            Way::ToRecord => {}
        }
        match recorder.record(&mut anew) {
            Ok(graph) => {
                // SAFETY: as above.
                let queued = unsafe { graph.launch(stream) };
                self.calls.keep(call, graph);
                queued
            }
            Err(error) => {
                tracing::warn!("matrix products are not recorded, so queuing a step takes longer: {error}");
                self.recorder = None;
                anew(stream)
            }
        }
    }

    /// Calls that are recorded.
    pub fn recorded(&self) -> usize {
        self.calls.recorded()
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
        calls.keep(&call, 10 * call);
    }

    #[test]
    fn what_came_often_is_recorded_and_kept_while_it_comes() {
        let mut calls = Calls::new(4);
        record(&mut calls, 1);
        record(&mut calls, 2);
        assert_eq!(calls.recorded(), 2);
        // Two generations of calls that come once; 1 comes in each.
        for once in 100..110 {
            assert!(matches!(calls.way(&once), Way::Anew));
            if once % 2 == 0 {
                assert!(matches!(calls.way(&1), Way::Again(&10)));
            }
        }
        assert_eq!(calls.recorded(), 1, "2 has not come since");
        assert!(matches!(calls.way(&2), Way::Anew));
        assert!(calls.recent.len() + calls.earlier.len() <= 8);
    }
}
