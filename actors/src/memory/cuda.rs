//! The device tier in the memory of an NVIDIA GPU: a slab outside of candle's pool, streams of one context, registered
//! host memory.

#![expect(unsafe_code, reason = "calls the driver")]

use std::any::Any;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys};

use super::backend::{Backend, DeviceEvent, DeviceMath, DeviceRoom, Event, Slab, Stream};
use super::cuda_slab::RegionSlab;
use super::registered::{PART, RegisteredArena, Registrar};
use super::{Arena, MemoryError};
use crate::cuda::{Gpu, device_error};
use crate::types::Bytes;

/// A GPU as a device tier. `compute` is the stream on which the model's kernels are queued.
pub struct CudaBackend {
    gpu: Arc<Gpu>,
    compute: Arc<CudaStream>,
    events: Arc<Events>,
}

/// Events that nobody holds any more, for the next ones: making and destroying one costs more than recording it, and every
/// lease has two.
#[derive(Default)]
struct Events(Mutex<Vec<CudaEvent>>);

struct CudaDeviceEvent {
    event: ManuallyDrop<CudaEvent>,
    events: Arc<Events>,
}

struct CudaCopyStream {
    stream: Arc<CudaStream>,
    events: Arc<Events>,
}

/// Pins host memory, from which and to which the GPU then copies without staging.
struct Pinning(Arc<CudaContext>);

impl CudaBackend {
    /// A backend on `gpu`, beside the model on `compute`.
    pub fn new(gpu: Arc<Gpu>, compute: Arc<CudaStream>) -> Self {
        CudaBackend { gpu, compute, events: Arc::default() }
    }
}

impl Events {
    /// The end of what is queued on `stream`.
    fn record(self: &Arc<Self>, stream: &CudaStream) -> Result<Event, MemoryError> {
        let failed = |error| device_error("record an event", error);
        let unused = self.lock().pop();
        let event = match unused {
            Some(event) => event,
            // Whoever waits for it sleeps: cores are for the optimizer.
            None => {
                let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC;
                stream.context().new_event(Some(flags)).map_err(failed)?
            }
        };
        event.record(stream).map_err(failed)?;
        Ok(Arc::new(CudaDeviceEvent { event: ManuallyDrop::new(event), events: Arc::clone(self) }))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<CudaEvent>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for CudaDeviceEvent {
    fn drop(&mut self) {
        // SAFETY: taken here only, once.
        let event = unsafe { ManuallyDrop::take(&mut self.event) };
        self.events.lock().push(event);
    }
}

impl DeviceEvent for CudaDeviceEvent {
    fn is_complete(&self) -> Result<bool, MemoryError> {
        self.event.try_is_complete().map_err(|error| device_error("ask for the end of its work", error))
    }

    fn synchronize(&self) -> Result<(), MemoryError> {
        self.event.synchronize().map_err(|error| device_error("finish its work", error))
    }

    fn elapsed_since(&self, earlier: &Event) -> Result<Option<Duration>, MemoryError> {
        let earlier: &dyn Any = earlier.as_ref();
        let Some(earlier) = earlier.downcast_ref::<CudaDeviceEvent>() else { return Ok(None) };
        let ms = earlier.event.elapsed_ms(&self.event).map_err(|error| device_error("time its work", error))?;
        Ok(Some(Duration::from_secs_f64(f64::from(ms.max(0.0)) / 1e3)))
    }
}

fn wait(stream: &CudaStream, event: &Event) -> Result<(), MemoryError> {
    let event: &dyn Any = event.as_ref();
    match event.downcast_ref::<CudaDeviceEvent>() {
        Some(event) => stream.wait(&event.event).map_err(|error| device_error("order two streams", error)),
        // Work of the host is done when its event exists.
        None => Ok(()),
    }
}

impl Stream for CudaCopyStream {
    unsafe fn copy(&mut self, src: *const u8, dst: *mut u8, bytes: usize) -> Result<(), MemoryError> {
        self.bind()?;
        // SAFETY: the caller vouches for both ranges; one address space tells the driver where they lie.
        unsafe { sys::cuMemcpyAsync(dst as u64, src as u64, bytes, self.stream.cu_stream()) }
            .result()
            .map_err(|error| device_error("copy a chunk", error))
    }

    unsafe fn zero(&mut self, dst: *mut u8, bytes: usize) -> Result<(), MemoryError> {
        self.bind()?;
        // SAFETY: the caller vouches for the range.
        unsafe { result::memset_d8_async(dst as u64, 0, bytes, self.stream.cu_stream()) }
            .map_err(|error| device_error("clear a chunk", error))
    }

    fn wait(&mut self, event: &Event) -> Result<(), MemoryError> {
        wait(&self.stream, event)
    }

    fn record(&mut self) -> Result<Event, MemoryError> {
        self.events.record(&self.stream)
    }

    fn on_complete(&mut self, callback: Box<dyn FnOnce() + Send>) -> Result<(), MemoryError> {
        unsafe extern "C" fn call(argument: *mut std::ffi::c_void) {
            // SAFETY: the pointer made below, given to exactly one call.
            let callback = unsafe { Box::from_raw(argument.cast::<Box<dyn FnOnce() + Send>>()) };
            callback();
        }
        self.bind()?;
        let argument = Box::into_raw(Box::new(callback));
        // SAFETY: `call` takes what `into_raw` gave, once.
        unsafe { result::stream::launch_host_function(self.stream.cu_stream(), call, argument.cast()) }
            .map_err(|error| device_error("call back", error))
    }
}

impl CudaCopyStream {
    fn bind(&self) -> Result<(), MemoryError> {
        self.stream.context().bind_to_thread().map_err(|error| device_error("use the GPU from this thread", error))
    }
}

impl Registrar for Pinning {
    unsafe fn register(&self, start: NonNull<u8>, bytes: usize) -> Result<(), MemoryError> {
        self.0.bind_to_thread().map_err(|error| device_error("use the GPU from this thread", error))?;
        // SAFETY: the caller vouches for the range.
        unsafe { sys::cuMemHostRegister_v2(start.as_ptr().cast(), bytes, sys::CU_MEMHOSTREGISTER_PORTABLE) }
            .result()
            .map_err(|error| device_error("register host memory", error))
    }

    unsafe fn unregister(&self, start: NonNull<u8>) {
        let bound = self.0.bind_to_thread();
        // SAFETY: the caller vouches that it was registered.
        let outcome = bound.and_then(|()| unsafe { sys::cuMemHostUnregister(start.as_ptr().cast()) }.result());
        if let Err(error) = outcome {
            // After an error of the device the driver refuses everything; the process is about to end.
            tracing::debug!(%error, "host memory stays registered");
        }
    }
}

impl Backend for CudaBackend {
    fn new_stream(&self, _name: &str) -> Result<Box<dyn Stream>, MemoryError> {
        let stream = self.gpu.context().new_stream().map_err(|error| device_error("make a stream", error))?;
        Ok(Box::new(CudaCopyStream { stream, events: Arc::clone(&self.events) }))
    }

    fn device_slab(&self, slots: u32, slot_bytes: Bytes) -> Result<Box<dyn Slab>, MemoryError> {
        let context = Arc::clone(self.gpu.context());
        context.bind_to_thread().map_err(|error| device_error("use the GPU from this thread", error))?;
        let need = u64::from(slots) * slot_bytes.0;
        let (free, _) = context.mem_get_info().map_err(|error| device_error("measure its memory", error))?;
        if need > free as u64 {
            return Err(self.gpu.insufficient(Bytes(need), Bytes(free as u64)));
        }
        Ok(Box::new(RegionSlab::new(context, slots, slot_bytes)?))
    }

    fn host_slab(&self, arena: Arena) -> Result<Box<dyn Slab>, MemoryError> {
        Ok(Box::new(RegisteredArena::new(Pinning(Arc::clone(self.gpu.context())), arena, PART)?))
    }

    fn separates_non_model(&self) -> bool {
        true
    }

    fn cap_non_model(&self, limit: Bytes) -> Result<(), MemoryError> {
        self.gpu.cap_pool(limit)
    }

    fn trim_non_model(&self, keep: Bytes) -> Result<(), MemoryError> {
        self.gpu.trim_pool(keep)
    }

    fn room(&self) -> Result<Option<DeviceRoom>, MemoryError> {
        let context = self.gpu.context();
        context.bind_to_thread().map_err(|error| device_error("use the GPU from this thread", error))?;
        let (free, _) = context.mem_get_info().map_err(|error| device_error("measure its memory", error))?;
        Ok(Some(DeviceRoom { free: Bytes(free as u64), pool: self.gpu.pool_use()?.reserved }))
    }

    fn compute_event(&self) -> Result<Option<Event>, MemoryError> {
        self.events.record(&self.compute).map(Some)
    }

    fn hold_compute(&self, event: &Event) -> Result<(), MemoryError> {
        wait(&self.compute, event)
    }

    fn math(&self) -> Result<Option<Box<dyn DeviceMath>>, MemoryError> {
        Ok(Some(Box::new(crate::cuda::ChunkMath::new(Arc::clone(&self.gpu))?)))
    }
}
