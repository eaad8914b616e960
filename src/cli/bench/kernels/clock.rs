//! Times by events of the GPU, and the two rates that floors are made of.

#![expect(unsafe_code, reason = "calls the driver")]

use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Tensor};
use cudarc::driver::result::memcpy_dtod_async;
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{CudaEvent, DriverError};

use crate::Error;
use crate::model::cuda::CudaOps;

const WARM_UP: usize = 3;
/// Timed calls, of which the median counts.
const CALLS: usize = 15;
/// What a copy moves that measures the rate: far more than any cache holds.
const COPIED: usize = 2 << 30;
/// What is copied before each call. It fills the queue, so that the next kernels are there before it ends, and the cache
/// with other data, as the kernels between two uses do in a training. A scan after it leaves nothing in the cache that is
/// still to be written: a kernel answers for its own bytes.
const AHEAD: usize = 512 << 20;
/// No GPU copies that much faster than this.
const LEAST_AHEAD_S: f64 = 2.0 * AHEAD as f64 / 8e12;
/// For how long products run: a card is faster in its first moments than it stays.
const SUSTAINED_S: f64 = 1.2;

/// Times calls on the stream of the operations.
pub struct Clock {
    pub ops: Arc<CudaOps>,
    from: Tensor,
    to: Tensor,
    scan: Option<Scan>,
}

/// Queues a kernel that reads more than a cache holds and writes little.
pub type Scan = Box<dyn Fn(&CudaOps) -> candle_core::Result<()>>;

fn failed(error: DriverError) -> Error {
    Error::Failed(format!("the GPU cannot be timed: {error}; see nvidia-smi"))
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Clock {
    pub fn new(ops: Arc<CudaOps>) -> Result<Self, Error> {
        let zeros = || Tensor::zeros(COPIED / 4, DType::F32, ops.device());
        let (from, to) = (zeros()?, zeros()?);
        Ok(Clock { ops, from, to, scan: None })
    }

    pub fn set_scan(&mut self, scan: Scan) {
        self.scan = Some(scan);
    }

    /// Leaves the cache without anything of the next kernel and without anything to write. Keeps the GPU busy for `seconds`
    /// at least.
    fn clear_cache(&self, seconds: f64) -> Result<(), Error> {
        let copies = 1 + (seconds / LEAST_AHEAD_S).ceil() as usize;
        (0..copies).try_for_each(|_| self.copy(AHEAD))?;
        Ok(self.scan.as_ref().map_or(Ok(()), |scan| scan(&self.ops))?)
    }

    /// The end of what is queued on the stream.
    pub fn event(&self) -> Result<CudaEvent, Error> {
        self.ops.stream().record_event(Some(CU_EVENT_DEFAULT)).map_err(failed)
    }

    fn copy(&self, bytes: usize) -> Result<(), Error> {
        let (from, to) = (self.ops.address(&self.from)?, self.ops.address(&self.to)?);
        // SAFETY: both tensors have at least that many bytes, and live until the stream has passed the copy: their memory
        // is freed in its order.
        unsafe { memcpy_dtod_async(to, from, bytes, self.ops.stream().cu_stream()) }.map_err(failed)
    }

    /// Seconds of `work`, which queues kernels on the stream and does not wait.
    pub fn around(&self, mut work: impl FnMut() -> candle_core::Result<()>) -> Result<f64, Error> {
        self.timed(|| Ok(work()?))
    }

    fn timed(&self, mut work: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
        (0..WARM_UP).try_for_each(|_| work())?;
        let mut spans = Vec::with_capacity(CALLS);
        for _ in 0..CALLS {
            self.clear_cache(0.0)?;
            let start = self.event()?;
            work()?;
            spans.push((start, self.event()?));
        }
        let seconds = |(start, end): (CudaEvent, CudaEvent)| {
            // Waits for both.
            start.elapsed_ms(&end).map(|ms| f64::from(ms) / 1e3).map_err(failed)
        };
        Ok(median(spans.into_iter().map(seconds).collect::<Result<_, _>>()?))
    }

    /// Seconds of the kernels of `class` in a call of `work`, which may do other things beside. The GPU is busy until all of
    /// them are queued: it would wait for each to be launched otherwise, and that is not a kernel's time.
    pub fn class<E: Into<Error>>(
        &self,
        class: &'static str,
        mut work: impl FnMut() -> Result<(), E>,
    ) -> Result<f64, Error> {
        let profile = self.ops.gpu().profile();
        let timing = |error| Error::from(patrickstar_actors::error::RuntimeError::from(error));
        let mut seconds = Vec::with_capacity(CALLS);
        let mut host_s = 0.0;
        for _ in 0..WARM_UP {
            self.ops.stream().synchronize().map_err(failed)?;
            let began = Instant::now();
            work().map_err(Into::into)?;
            host_s = began.elapsed().as_secs_f64();
        }
        for _ in 0..CALLS {
            self.ops.stream().synchronize().map_err(failed)?;
            self.clear_cache(host_s)?;
            profile.set_enabled(true);
            let worked = work().map_err(Into::into);
            profile.set_enabled(false);
            let times = profile.take().map_err(timing)?;
            worked?;
            let Some(time) = times.get(class) else {
                return Err(Error::Failed(format!("no kernel of class {class} ran; please report this")));
            };
            seconds.push(time.time.as_secs_f64());
        }
        Ok(median(seconds))
    }

    /// Seconds of a large copy, and the bytes that it reads and writes.
    pub fn large_copy(&self) -> Result<(f64, f64), Error> {
        let bytes = 2.0 * COPIED as f64;
        Ok((self.moved(bytes)?, bytes))
    }

    /// Seconds of a copy that reads and writes so many bytes together; beyond the largest at its rate.
    pub fn moved(&self, bytes: f64) -> Result<f64, Error> {
        let copied = ((bytes / 2.0) as usize).clamp(1, COPIED);
        let seconds = self.timed(|| self.copy(copied))?;
        Ok(seconds * (bytes / 2.0 / copied as f64).max(1.0))
    }

    /// Seconds of a call of `product`, over more than a second without a break.
    pub fn sustained(&self, mut product: impl FnMut() -> candle_core::Result<()>) -> Result<f64, Error> {
        /// Products queued before anybody looks at the clock.
        const QUEUED: usize = 20;
        let mut run = |seconds: f64| -> Result<f64, Error> {
            let (began, mut calls) = (Instant::now(), 0);
            let start = self.event()?;
            while began.elapsed().as_secs_f64() < seconds {
                (0..QUEUED).try_for_each(|_| product())?;
                calls += QUEUED;
                self.ops.stream().synchronize().map_err(failed)?;
            }
            let end = self.event()?;
            Ok(f64::from(start.elapsed_ms(&end).map_err(failed)?) / 1e3 / calls as f64)
        };
        run(SUSTAINED_S / 4.0)?;
        run(SUSTAINED_S)
    }
}
