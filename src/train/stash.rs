//! Inputs of blocks that wait in host memory for the backward pass, where device memory is short of them.
//!
//! Two streams of their own carry them, ordered against the model by events alone: a copy out begins when the block before
//! has written the input, and the model frees its memory behind the copy; a copy back is queued a few blocks ahead, and the
//! block that needs it waits for it on the device. No thread waits for either.

#![expect(unsafe_code, reason = "copies activations by address")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Shape, Tensor};
use patrickstar_actors::error::RuntimeError;
use patrickstar_actors::memory::{Arena, Backend, Event, MemoryError, Slab, SlotIndex, Stream};
use patrickstar_actors::timeline::{Timeline, Track};
use patrickstar_actors::types::{Bytes, Tier};

use crate::error::Error;
use crate::model::compute::Compute;

/// Copies out that the model runs ahead of before it waits for the oldest: their inputs still take device memory.
const LEAVING: usize = 2;
/// Places start on a cache line.
const PLACE_MULTIPLE: u64 = 64;

/// An input in host memory.
pub(super) struct Stashed {
    place: usize,
    shape: Shape,
    dtype: DType,
}

/// An input on its way back.
pub(super) struct Coming {
    tensor: Tensor,
    /// When it has arrived; `None` where it is there already.
    arrived: Option<Event>,
}

struct Place {
    memory: Box<dyn Slab>,
    /// The end of the last copy from or to it.
    free_after: Option<Event>,
}

/// Host memory for inputs, made as they come: every step needs the same.
pub(super) struct Stash {
    compute: Compute,
    backend: Arc<dyn Backend>,
    out: Box<dyn Stream>,
    /// A tensor in host memory is made with its values.
    #[cfg(feature = "cuda")]
    back: Box<dyn Stream>,
    places: Vec<Place>,
    free: Vec<usize>,
    leaving: VecDeque<(Tensor, Event)>,
    timeline: Arc<Timeline>,
    moved: Moved,
}

/// Bytes that crossed between device and host memory so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// To host memory.
    pub out: Bytes,
    /// Back.
    pub back: Bytes,
}

fn of_memory(error: MemoryError) -> Error {
    RuntimeError::from(error).into()
}

/// What a copy is called in a trace.
const NAME: &str = "input";

/// The beginning of a copy that is drawn: now, and in a device's time.
fn begin(
    timeline: &Timeline,
    compute: &Compute,
    stream: &mut Box<dyn Stream>,
) -> Result<(Duration, Option<Event>), Error> {
    let on_device = timeline.is_enabled() && !matches!(compute, Compute::Cpu);
    Ok((timeline.now(), on_device.then(|| stream.record()).transpose().map_err(of_memory)?))
}

/// Draws a copy; one by the host is done already.
fn draw(
    timeline: &Timeline,
    track: Track,
    bytes: Bytes,
    start: Duration,
    began: Option<Event>,
    done: &Event,
) -> Result<(), Error> {
    match began {
        Some(began) => {
            timeline.queued_span(track, NAME.to_owned(), bytes, began, Event::clone(done)).map_err(of_memory)?;
        }
        None => timeline.span(track, start, None, bytes, || NAME.to_owned()),
    }
    Ok(())
}

impl Stash {
    pub fn new(compute: Compute, backend: Arc<dyn Backend>, timeline: Arc<Timeline>) -> Result<Self, Error> {
        let stream = |name| backend.new_stream(name).map_err(of_memory);
        Ok(Stash {
            out: stream("activations out")?,
            #[cfg(feature = "cuda")]
            back: stream("activations back")?,
            compute,
            backend,
            places: Vec::new(),
            free: Vec::new(),
            leaving: VecDeque::new(),
            timeline,
            moved: Moved::default(),
        })
    }

    /// Queues the way of `input` to host memory.
    pub fn put(&mut self, input: Tensor) -> Result<Stashed, Error> {
        let input = input.contiguous()?;
        let bytes = input.elem_count() * input.dtype().size_in_bytes();
        let index = self.place(bytes as u64)?;
        let place = &mut self.places[index];
        for event in [place.free_after.take(), self.backend.compute_event().map_err(of_memory)?].iter().flatten() {
            self.out.wait(event).map_err(of_memory)?;
        }
        let (start, began) = begin(&self.timeline, &self.compute, &mut self.out)?;
        // SAFETY: the place has room for the bytes and nobody else has it; the tensor is kept until the model is behind the
        // copy.
        unsafe { self.out.copy(self.compute.address(&input)?, place.memory.slot(SlotIndex(0)).as_ptr(), bytes) }
            .map_err(of_memory)?;
        let done = self.out.record().map_err(of_memory)?;
        place.free_after = Some(Event::clone(&done));
        let bytes = Bytes(bytes as u64);
        self.moved.out.0 += bytes.0;
        let stashed = Stashed { place: index, shape: input.shape().clone(), dtype: input.dtype() };
        self.leaving.push_back((input, Event::clone(&done)));
        while self.leaving.len() > LEAVING {
            self.let_go()?;
        }
        draw(&self.timeline, Track::ActivationsOut, bytes, start, began, &done)?;
        Ok(stashed)
    }

    /// Frees the memory of the oldest input on its way out, behind its copy.
    fn let_go(&mut self) -> Result<(), Error> {
        match self.leaving.pop_front() {
            Some((_input, copied)) => self.backend.hold_compute(&copied).map_err(of_memory),
            None => Ok(()),
        }
    }

    /// Queues the way back.
    pub fn fetch(&mut self, stashed: &Stashed) -> Result<Coming, Error> {
        // What has not left yet has its memory: the way back begins behind it all the same.
        while !self.leaving.is_empty() {
            self.let_go()?;
        }
        let bytes = stashed.shape.elem_count() * stashed.dtype.size_in_bytes();
        let coming = match &self.compute {
            Compute::Cpu => {
                let start = self.timeline.now();
                let address = self.places[stashed.place].memory.slot(SlotIndex(0)).as_ptr();
                // SAFETY: `put` wrote as many bytes there, and the streams of the host are done when they return.
                let values = unsafe { std::slice::from_raw_parts(address, bytes) };
                let device = self.compute.device();
                let tensor = Tensor::from_raw_buffer(values, stashed.dtype, stashed.shape.dims(), &device)?;
                self.timeline.span(Track::ActivationsBack, start, None, Bytes(bytes as u64), || NAME.to_owned());
                Coming { tensor, arrived: None }
            }
            #[cfg(feature = "cuda")]
            Compute::Cuda(ops) => {
                let tensor = ops.uninitialised(stashed.shape.clone(), stashed.dtype)?;
                let target = ops.address(&tensor)? as *mut u8;
                let place = &mut self.places[stashed.place];
                // Its memory is the model's to give: behind what is queued so far.
                for event in
                    [place.free_after.take(), self.backend.compute_event().map_err(of_memory)?].iter().flatten()
                {
                    self.back.wait(event).map_err(of_memory)?;
                }
                let (start, began) = begin(&self.timeline, &self.compute, &mut self.back)?;
                // SAFETY: both have room for the bytes; the block that reads them waits for the event below.
                unsafe { self.back.copy(place.memory.slot(SlotIndex(0)).as_ptr(), target, bytes) }
                    .map_err(of_memory)?;
                let arrived = self.back.record().map_err(of_memory)?;
                place.free_after = Some(Event::clone(&arrived));
                let coming = Coming { tensor, arrived: Some(Event::clone(&arrived)) };
                if let Err(error) =
                    draw(&self.timeline, Track::ActivationsBack, Bytes(bytes as u64), start, began, &arrived)
                {
                    // Its memory is not the pool's again before the copy has ended.
                    self.arrive(coming)?;
                    return Err(error);
                }
                coming
            }
        };
        self.moved.back.0 += bytes as u64;
        self.free.push(stashed.place);
        Ok(coming)
    }

    /// The input for what is queued from now on.
    pub fn arrive(&self, coming: Coming) -> Result<Tensor, Error> {
        coming.arrived.map_or(Ok(()), |event| self.backend.hold_compute(&event)).map_err(of_memory)?;
        Ok(coming.tensor)
    }

    /// A free place of at least `bytes`.
    fn place(&mut self, bytes: u64) -> Result<usize, Error> {
        if let Some(position) = self.free.iter().position(|&index| self.places[index].memory.slot_bytes().0 >= bytes) {
            return Ok(self.free.swap_remove(position));
        }
        let arena = Arena::new(Tier::Host, 1, Bytes(bytes.next_multiple_of(PLACE_MULTIPLE))).map_err(of_memory)?;
        self.places.push(Place { memory: self.backend.host_slab(arena).map_err(of_memory)?, free_after: None });
        Ok(self.places.len() - 1)
    }

    /// What crossed so far.
    pub fn moved(&self) -> Moved {
        self.moved
    }

    /// Host memory in use.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.places.iter().map(|place| place.memory.slot_bytes().0).sum())
    }
}

impl Drop for Stash {
    fn drop(&mut self) {
        // A step that failed may have left copies under way.
        for place in &self.places {
            if let Some(Err(error)) = place.free_after.as_ref().map(|event| event.synchronize()) {
                tracing::debug!(%error, "copies of activations did not end");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use patrickstar_actors::memory::CpuBackend;

    use super::*;

    #[test]
    fn inputs_come_back_as_they_left_and_places_are_used_again() {
        let timeline = Arc::new(Timeline::default());
        timeline.set_enabled(true);
        let mut stash = Stash::new(Compute::Cpu, Arc::new(CpuBackend), Arc::clone(&timeline)).unwrap();
        let input = |step: usize, index: usize| {
            let values: Vec<f32> = (0..60).map(|i| (step * 1000 + index * 100 + i) as f32).collect();
            Tensor::from_vec(values, (3, 4, 5), &Device::Cpu).unwrap()
        };
        for step in 0..3 {
            let stashed: Vec<Stashed> = (0..4).map(|index| stash.put(input(step, index)).unwrap()).collect();
            for (index, stashed) in stashed.iter().enumerate().rev() {
                let coming = stash.fetch(stashed).unwrap();
                let (back, sent) = (stash.arrive(coming).unwrap(), input(step, index));
                let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!((back.dims(), values(&back)), (sent.dims(), values(&sent)));
            }
            assert_eq!(stash.bytes(), Bytes(4 * 256), "step {step} made places anew");
        }
        let each = Bytes(3 * 4 * 240);
        assert_eq!(stash.moved(), Moved { out: each, back: each });
        let (spans, _) = timeline.take().unwrap();
        for track in [Track::ActivationsOut, Track::ActivationsBack] {
            let drawn: Vec<Bytes> = spans.iter().filter(|span| span.track == track).map(|span| span.bytes).collect();
            assert_eq!(drawn, [Bytes(240); 12], "{track:?}");
        }
    }
}
