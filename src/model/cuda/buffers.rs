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

/// Buffers by type and number of elements.
#[derive(Default)]
pub(super) struct Buffers {
    limit: Bytes,
    held: Bytes,
    by_size: HashMap<(DType, usize), Vec<Tensor>>,
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
    pub fn take(&self, shape: &Shape, dtype: DType) -> Result<Option<Tensor>> {
        let Some(buffers) = self.by_size.get(&(dtype, shape.elem_count())) else { return Ok(None) };
        let Some(free) = buffers.iter().find(|buffer| handles(buffer) == 1) else { return Ok(None) };
        if free.shape() == shape { Ok(Some(free.clone())) } else { free.reshape(shape).map(Some) }
    }

    /// Whether a new buffer of this size would be kept.
    pub fn wants(&self, dtype: DType, elements: usize) -> bool {
        self.held.0 + bytes(dtype, elements) <= self.limit.0
    }

    /// Keeps the memory of `buffer`, a variable that was just made.
    pub fn keep(&mut self, buffer: &Tensor) {
        let (dtype, elements) = (buffer.dtype(), buffer.elem_count());
        self.held.0 += bytes(dtype, elements);
        self.by_size.entry((dtype, elements)).or_default().push(buffer.clone());
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
}
