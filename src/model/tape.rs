//! The tape of one block: what its operations did, so that gradients can be taken in reverse.
//!
//! candle's own engine adds each gradient to zeros, keeps the graph alive until the end, and knows no accumulation
//! inside a kernel. Here an operation is told what its input's gradient is so far, and adds to it while it writes: a
//! residual branch costs no pass of its own. Weights are not on the tape; operations add their gradients to chunks.

use std::cell::RefCell;
use std::rc::Rc;

use candle_core::{DType, Device, Result, Shape, Tensor, bail};

use super::compute::Compute;
use super::ops;

type Backward = Box<dyn FnOnce(Tensor, &mut Gradients) -> Result<()>>;
type Thunk = Box<dyn FnOnce() -> Result<Tensor>>;
type Again = Rc<dyn Fn() -> Result<Tensor>>;

/// The operations of one block on one micro-batch. Cheap to clone; lives on the compute thread.
#[derive(Clone)]
pub struct Tape {
    inner: Rc<Inner>,
}

struct Inner {
    compute: Compute,
    recording: bool,
    /// Operations keep how their input comes about, where that is cheap, instead of the input.
    frugal: bool,
    /// Gradients are those of the loss times this.
    loss_scale: f32,
    /// `None` for inputs, whose gradients are what the tape is for.
    nodes: RefCell<Vec<Option<Backward>>>,
}

/// Place of an activation's gradient; `None` for what has no gradient, such as token ids.
pub type Slot = Option<usize>;

/// A tensor on a tape. An operation's result may be computed only when somebody reads it: the last product of a block is
/// never needed to recompute the block.
#[derive(Clone)]
pub struct Activation {
    tape: Tape,
    slot: Slot,
    shape: Shape,
    dtype: DType,
    value: Rc<RefCell<Value>>,
    /// How it comes about from what its operation keeps anyway.
    again: Option<Again>,
}

/// What an operation keeps of an input for its backward.
pub enum Kept {
    /// Its values.
    Values(Tensor),
    /// How they come about: by one pass over memory.
    Again(Again),
}

enum Value {
    Ready(Tensor),
    Deferred(Thunk),
    /// Its computation failed before.
    Failed,
}

/// Gradients of activations while a tape runs in reverse.
pub struct Gradients {
    slots: Vec<Option<Tensor>>,
    compute: Compute,
}

impl Tape {
    /// A tape that forgets: for passes without a backward.
    pub fn forgetting(compute: &Compute) -> Self {
        Self::new(compute, false, false, 1.0)
    }

    /// A tape that records.
    pub fn recording(compute: &Compute) -> Self {
        Self::scaled(compute, 1.0)
    }

    /// A tape whose gradients are those of the loss times `loss_scale`, so that they do not vanish in 16 bits.
    pub fn scaled(compute: &Compute, loss_scale: f32) -> Self {
        Self::new(compute, true, false, loss_scale)
    }

    /// As [`Tape::scaled`], for a tape that waits for its backward: what is cheap to compute again, such as norms, is.
    pub fn frugal(compute: &Compute, loss_scale: f32) -> Self {
        Self::new(compute, true, true, loss_scale)
    }

    fn new(compute: &Compute, recording: bool, frugal: bool, loss_scale: f32) -> Self {
        let inner = Inner { compute: compute.clone(), recording, frugal, loss_scale, nodes: RefCell::default() };
        Tape { inner: Rc::new(inner) }
    }

    /// What the loss is multiplied with before gradients are taken.
    pub fn loss_scale(&self) -> f32 {
        self.inner.loss_scale
    }

    /// Where its operations are computed.
    pub fn compute(&self) -> &Compute {
        &self.inner.compute
    }

    /// Whether a backward will follow.
    pub fn is_recording(&self) -> bool {
        self.inner.recording
    }

    /// An input whose gradient is asked for.
    pub fn input(&self, tensor: Tensor) -> Activation {
        let slot = self.push(None);
        self.activation(tensor, slot)
    }

    /// An input without gradient: token ids, or anything in a pass without a backward.
    pub fn constant(&self, tensor: Tensor) -> Activation {
        self.activation(tensor, None)
    }

    /// The result of an operation. `backward` gets the gradient of the result, and adds to those of its inputs.
    pub fn record(
        &self,
        output: Tensor,
        backward: impl FnOnce(Tensor, &mut Gradients) -> Result<()> + 'static,
    ) -> Activation {
        let slot = self.push_with(backward);
        self.activation(output, slot)
    }

    /// As [`Tape::record`], for an operation whose backward does not need its result. While recording, `compute` waits
    /// until the result is read.
    pub fn record_deferred(
        &self,
        shape: impl Into<Shape>,
        dtype: DType,
        compute: impl FnOnce() -> Result<Tensor> + 'static,
        backward: impl FnOnce(Tensor, &mut Gradients) -> Result<()> + 'static,
    ) -> Result<Activation> {
        if !self.is_recording() {
            return Ok(self.activation(compute()?, None));
        }
        let slot = self.push_with(backward);
        let value = Rc::new(RefCell::new(Value::Deferred(Box::new(compute))));
        Ok(Activation { tape: self.clone(), slot, shape: shape.into(), dtype, value, again: None })
    }

    fn activation(&self, tensor: Tensor, slot: Slot) -> Activation {
        let (shape, dtype) = (tensor.shape().clone(), tensor.dtype());
        let value = Rc::new(RefCell::new(Value::Ready(tensor)));
        Activation { tape: self.clone(), slot, shape, dtype, value, again: None }
    }

    fn push_with(&self, backward: impl FnOnce(Tensor, &mut Gradients) -> Result<()> + 'static) -> Slot {
        if self.is_recording() { self.push(Some(Box::new(backward))) } else { None }
    }

    fn push(&self, node: Option<Backward>) -> Slot {
        let mut nodes = self.inner.nodes.borrow_mut();
        nodes.push(node);
        Some(nodes.len() - 1)
    }

    /// Runs in reverse from `output`, whose gradient is `upstream` (`None`: `output` is the loss), and returns the
    /// gradient of `input`. Everything the operations kept is freed on the way.
    pub fn backward(
        &self,
        output: &Activation,
        upstream: Option<Tensor>,
        input: &Activation,
    ) -> Result<Option<Tensor>> {
        let Some(last) = output.slot.filter(|_| Rc::ptr_eq(&output.tape.inner, &self.inner)) else {
            bail!("a block's output must come from the operations in `ops`, applied to its input")
        };
        let seed = match upstream {
            Some(gradient) => gradient,
            None => Tensor::full(self.inner.loss_scale, &output.shape, &Device::Cpu)?,
        };
        let mut nodes = std::mem::take(&mut *self.inner.nodes.borrow_mut());
        let mut gradients =
            Gradients { slots: (0..nodes.len()).map(|_| None).collect(), compute: self.inner.compute.clone() };
        gradients.slots[last] = Some(seed);
        while let Some(node) = nodes.pop() {
            // A result that nothing depends on has no gradient.
            if let Some(backward) = node
                && let Some(gradient) = gradients.slots[nodes.len()].take()
            {
                backward(gradient, &mut gradients)?;
            }
        }
        Ok(input.slot.and_then(|slot| gradients.slots[slot].take()))
    }
}

impl Activation {
    /// Its values, computed now if they were not before.
    pub fn tensor(&self) -> Result<Tensor> {
        let mut value = self.value.borrow_mut();
        if let Value::Ready(tensor) = &*value {
            return Ok(tensor.clone());
        }
        let Value::Deferred(thunk) = std::mem::replace(&mut *value, Value::Failed) else {
            bail!("an activation is read whose computation failed")
        };
        let tensor = thunk()?;
        *value = Value::Ready(tensor.clone());
        Ok(tensor)
    }

    /// The same, which comes about again by `again` from what its operation keeps for its own backward.
    pub fn comes_again(self, again: impl Fn() -> Result<Tensor> + 'static) -> Self {
        Activation { again: Some(Rc::new(again)), ..self }
    }

    /// What an operation keeps of it for its backward.
    pub fn keep(&self) -> Result<Kept> {
        match &self.again {
            Some(again) if self.tape.inner.frugal => Ok(Kept::Again(Rc::clone(again))),
            _ => Ok(Kept::Values(self.tensor()?)),
        }
    }

    /// Its shape.
    pub fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    /// Elements of the last dimension.
    pub fn width(&self) -> usize {
        self.dims().last().copied().unwrap_or(1)
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.elem_count()
    }

    /// Its element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The tape it lies on.
    pub fn tape(&self) -> &Tape {
        &self.tape
    }

    /// Where its gradient lies.
    pub fn slot(&self) -> Slot {
        self.slot
    }

    /// Where operations on it are computed.
    pub fn compute(&self) -> &Compute {
        self.tape.compute()
    }
}

impl Kept {
    /// The values.
    pub fn tensor(self) -> Result<Tensor> {
        match self {
            Kept::Values(tensor) => Ok(tensor),
            Kept::Again(again) => again(),
        }
    }
}

impl Gradients {
    /// Adds to the gradient of `slot`: `compute` gets what is there so far and returns the sum. Not called where no
    /// gradient is asked for.
    pub fn add(&mut self, slot: Slot, compute: impl FnOnce(Option<Tensor>) -> Result<Tensor>) -> Result<()> {
        if let Some(slot) = slot {
            self.slots[slot] = Some(compute(self.slots[slot].take())?);
        }
        Ok(())
    }

    /// Adds `gradient` itself; shares it where it is the first.
    pub fn pass(&mut self, slot: Slot, gradient: &Tensor) -> Result<()> {
        let compute = self.compute.clone();
        self.add(slot, |before| match before {
            Some(before) => ops::sum(&compute, &before, gradient),
            None => Ok(gradient.clone()),
        })
    }
}
