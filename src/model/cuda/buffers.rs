//! Memory of activations that are gone, kept for the next one of the same size: asking the driver costs as much as a launch.
//!
//! candle frees a tensor's memory with its last handle and has no hook for that. So the cache holds a handle of its own, and
//! a buffer is free when that is the only one left. Buffers are handed out as variables: a view of a variable holds it, as
//! it would for candle's own autograd, so that views count too. Work is queued on one stream, so memory may be handed on
//! while work on it is still queued.

#![expect(unsafe_code, reason = "counts the handles of a tensor")]

use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use candle_core::{DType, Result, Shape, Tensor};
use patrickstar_actors::types::Bytes;

/// A size that has not come while so many others did will not come soon: those of several steps.
const STALE: u64 = 20_000;

/// Buffers by type and number of elements.
#[derive(Default)]
pub(super) struct Buffers {
    limit: Bytes,
    held: Bytes,
    by_size: HashMap<Size, Kept>,
    /// Counts what is asked for.
    clock: u64,
}

type Size = (DType, usize);

/// The buffers of a size.
#[derive(Default)]
struct Kept {
    buffers: Vec<Tensor>,
    last_used: u64,
}

fn bytes(dtype: DType, elements: usize) -> u64 {
    (elements * dtype.size_in_bytes()) as u64
}

/// Handles to a tensor: clones, and views where it is a variable.
fn handles(tensor: &Tensor) -> usize {
    fn count<T>(inside: &T) -> usize {
        // SAFETY: a tensor is a counted pointer to what it dereferences to (the test below would show another candle), so the
        // reference points into an allocation of `Arc`. The count is read and the pointer is not dropped.
        let pointer = ManuallyDrop::new(unsafe { Arc::from_raw(inside) });
        Arc::strong_count(&pointer)
    }
    count(&**tensor)
}

impl Buffers {
    /// Keeps so many bytes at most from now on, and nothing of what was kept before.
    pub fn restart(&mut self, limit: Bytes) {
        // What is in use lives on with its last handle.
        *self = Buffers { limit, ..Buffers::default() };
    }

    /// Keeps nothing of what was kept so far: memory is short.
    pub fn clear(&mut self) {
        self.restart(self.limit);
    }

    /// A buffer that nobody uses any more.
    pub fn take(&mut self, shape: &Shape, dtype: DType) -> Result<Option<Tensor>> {
        let Some(kept) = self.by_size.get_mut(&(dtype, shape.elem_count())) else { return Ok(None) };
        let Some(free) = kept.buffers.iter().find(|buffer| handles(buffer) == 1) else { return Ok(None) };
        self.clock += 1;
        kept.last_used = self.clock;
        if free.shape() == shape { Ok(Some(free.clone())) } else { free.reshape(shape).map(Some) }
    }

    /// Whether a new buffer of this size would be kept. Those that nobody uses make room for it if their sizes do not come any
    /// more: a text that grows has each size once.
    pub fn wants(&mut self, dtype: DType, elements: usize) -> bool {
        let need = bytes(dtype, elements);
        self.clock += 1;
        while self.held.0 + need > self.limit.0 {
            let is_stale = |kept: &Kept| {
                self.clock - kept.last_used > STALE && kept.buffers.iter().any(|buffer| handles(buffer) == 1)
            };
            let stale = self.by_size.iter().find(|(_, kept)| is_stale(kept)).map(|(&size, _)| size);
            let Some(stale) = stale else { return false };
            self.forget(stale);
        }
        true
    }

    /// Lets go of the buffers of a size that nobody uses.
    fn forget(&mut self, size: Size) {
        let Some(kept) = self.by_size.get_mut(&size) else { return };
        let before = kept.buffers.len();
        kept.buffers.retain(|buffer| handles(buffer) > 1);
        let forgotten = (before - kept.buffers.len()) as u64;
        self.held.0 -= forgotten * bytes(size.0, size.1);
        if kept.buffers.is_empty() {
            self.by_size.remove(&size);
        }
    }

    /// Keeps the memory of `buffer`, a variable that was just made.
    pub fn keep(&mut self, buffer: &Tensor) {
        let (dtype, elements) = (buffer.dtype(), buffer.elem_count());
        self.held.0 += bytes(dtype, elements);
        self.clock += 1;
        let kept = self.by_size.entry((dtype, elements)).or_default();
        kept.buffers.push(buffer.clone());
        kept.last_used = self.clock;
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_core::op::BackpropOp;

    use super::*;

    fn variable(shape: (usize, usize)) -> Tensor {
        let plain = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let (storage, _) = plain.storage_and_layout();
        let storage = storage.try_clone(plain.layout()).unwrap();
        Tensor::from_storage(storage, shape, BackpropOp::none(), true)
    }

    #[test]
    fn clones_and_views_of_views_count_as_handles() {
        let tensor = variable((4, 6));
        assert_eq!(handles(&tensor), 1);
        let clone = tensor.clone();
        assert_eq!(handles(&tensor), 2);
        let view = tensor.narrow(0, 1, 2).unwrap().reshape((3, 4)).unwrap().t().unwrap();
        assert_eq!(handles(&tensor), 3);
        drop(clone);
        assert_eq!(handles(&tensor), 2, "the view holds it");
        drop(view);
        assert_eq!(handles(&tensor), 1);
    }

    #[test]
    fn memory_is_handed_on_when_its_last_user_is_gone_and_no_more_is_held_than_allowed() {
        let mut buffers = Buffers::default();
        assert!(!buffers.wants(DType::F32, 1), "without a limit nothing is kept");
        buffers.restart(Bytes(100));
        assert!(buffers.wants(DType::F32, 24) && !buffers.wants(DType::F32, 26));
        let first = variable((4, 6));
        buffers.keep(&first);
        assert!(!buffers.wants(DType::F32, 2));
        let shape = Shape::from((8, 3));
        assert!(buffers.take(&shape, DType::F32).unwrap().is_none(), "it is in use");
        let view = first.narrow(1, 0, 2).unwrap();
        drop(first);
        assert!(buffers.take(&shape, DType::F32).unwrap().is_none(), "a view of it is in use");
        drop(view);
        let again = buffers.take(&shape, DType::F32).unwrap().unwrap();
        assert_eq!(again.dims(), [8, 3]);
        assert!(buffers.take(&shape, DType::F32).unwrap().is_none(), "it is in use again");
        assert!(buffers.take(&shape, DType::F16).unwrap().is_none());
    }

    #[test]
    fn sizes_that_do_not_come_any_more_make_room_for_new_ones() {
        let mut buffers = Buffers::default();
        buffers.restart(Bytes(250));
        let keep = |buffers: &mut Buffers, shape| {
            let buffer = variable(shape);
            assert!(buffers.wants(DType::F32, buffer.elem_count()));
            buffers.keep(&buffer);
            buffer
        };
        let in_use = keep(&mut buffers, (4, 6));
        drop(keep(&mut buffers, (4, 5)));
        drop(keep(&mut buffers, (3, 5)));
        assert!(!buffers.wants(DType::F32, 10), "all sizes come");
        buffers.clock += STALE;
        assert!(buffers.take(&Shape::from((4, 5)), DType::F32).unwrap().is_some());
        drop(keep(&mut buffers, (2, 5)));
        assert!(buffers.take(&Shape::from((3, 5)), DType::F32).unwrap().is_none(), "it went for the last");
        assert!(buffers.take(&Shape::from((4, 5)), DType::F32).unwrap().is_some());
        buffers.clock += STALE + 1;
        assert!(!buffers.wants(DType::F32, 60), "what is in use stays");
        drop(in_use);
        assert!(buffers.wants(DType::F32, 60));
        assert_eq!(buffers.held, Bytes(0));
    }
}
