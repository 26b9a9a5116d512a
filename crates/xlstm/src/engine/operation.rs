//! What an operation is to the engine: shapes, forward, backward, and what backward reads.
//!
//! An operation is written once as a [`Kernel`], generic over the element type; the tape
//! holds it as an [`Operation`], the same thing with the type erased. Gradients are
//! *added* to the buffers that backward gets (a [`Gradient`] clears itself where it is the
//! first), outputs are *written* whole.

use std::fmt::Debug;

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::cuda::{CudaBackward, CudaForward};
use super::{
    narrow::Narrow,
    precision::Precision,
    scalar::Scalar,
    shape::Shape,
    stored::{Slice, Storable},
};
use crate::error::Result;

/// The most inputs, and the most outputs, of one operation.
pub const MAX_SLOTS: usize = 12;

/// Some of an operation's inputs and outputs, as bit sets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slots {
    /// Bit i: input i.
    pub inputs: u32,
    /// Bit i: output i.
    pub outputs: u32,
}

impl Slots {
    /// These inputs and outputs.
    pub fn of(inputs: &[usize], outputs: &[usize]) -> Slots {
        let bits = |indices: &[usize]| indices.iter().fold(0, |set, i| set | 1 << i);
        Slots { inputs: bits(inputs), outputs: bits(outputs) }
    }

    /// Whether input `i` is among them.
    pub fn input(self, i: usize) -> bool {
        self.inputs >> i & 1 == 1
    }

    /// Whether output `i` is among them.
    pub fn output(self, i: usize) -> bool {
        self.outputs >> i & 1 == 1
    }
}

/// The shapes of a node's inputs and outputs.
#[derive(Clone, Debug)]
pub struct NodeShapes {
    /// One an input; None where an optional input is absent.
    pub inputs: Vec<Option<Shape>>,
    /// One an output, results first, then what is saved for backward alone.
    pub outputs: Vec<Shape>,
}

impl NodeShapes {
    /// The shape of an input that is always there.
    pub fn input(&self, i: usize) -> Shape {
        self.inputs[i].unwrap_or_else(|| missing("input", i))
    }
}

#[cold]
fn missing(what: &str, i: usize) -> ! {
    unreachable!("an operation uses {what} {i}, which it did not declare")
}

/// What forward gets.
pub struct Forward<'a, T> {
    /// Input values.
    pub inputs: [Option<&'a [T]>; MAX_SLOTS],
    /// Instead of values, inputs of [`Kernel::storable`] that are stored in fewer bits.
    pub narrow: [Option<Narrow<'a>>; MAX_SLOTS],
    /// Where results go; the previous content is arbitrary, but for [`Kernel::updates`].
    pub outputs: [Option<&'a mut [T]>; MAX_SLOTS],
    /// Integer inputs: token ids, targets, marks, seeds.
    pub ids: [&'a [u32]; 3],
    /// Shapes of all of them.
    pub shapes: &'a NodeShapes,
    /// What operands of products with weights are rounded to, where there are many rows.
    pub precision: Precision,
    /// Work space, grown where an operation needs more; its content is arbitrary.
    pub scratch: &'a mut Vec<T>,
}

impl<'a, T: Scalar> Forward<'a, T> {
    /// Input `i`, which is always there.
    pub fn input(&self, i: usize) -> &'a [T] {
        self.inputs[i].unwrap_or_else(|| missing("input", i))
    }

    /// Input `i` of [`Kernel::storable`], which is always there, as it is stored.
    pub fn weight(&self, i: usize) -> Slice<'a, T> {
        self.narrow[i].map_or_else(|| Slice::Wide(self.input(i)), Slice::Narrow)
    }

    /// Whether input `i` lies in the output that [`Kernel::updates`] names with it.
    pub fn updates(&self, i: usize) -> bool {
        self.shapes.inputs[i].is_some() && self.inputs[i].is_none() && self.narrow[i].is_none()
    }

    /// Takes output `i`.
    pub fn output(&mut self, i: usize) -> &'a mut [T] {
        self.outputs[i].take().unwrap_or_else(|| missing("output", i))
    }
}

/// What backward gets.
pub struct Backward<'a, T> {
    /// Input values, as far as declared by [`Kernel::reads`].
    pub inputs: [Option<&'a [T]>; MAX_SLOTS],
    /// Output values, as far as declared by [`Kernel::reads`].
    pub outputs: [Option<&'a [T]>; MAX_SLOTS],
    /// Gradients of the outputs; None is a gradient of zero.
    pub output_gradients: [Option<&'a [T]>; MAX_SLOTS],
    /// Gradients of the inputs; None where nobody asks.
    pub input_gradients: [Option<Gradient<'a, T>>; MAX_SLOTS],
    /// Integer inputs.
    pub ids: [&'a [u32]; 3],
    /// Shapes of all of them.
    pub shapes: &'a NodeShapes,
    /// What operands of products with weights are rounded to, where there are many rows.
    pub precision: Precision,
    /// Work space, grown where an operation needs more; its content is arbitrary.
    pub scratch: &'a mut Vec<T>,
}

impl<'a, T: Scalar> Backward<'a, T> {
    /// The value of input `i`, which is always there and declared as read.
    pub fn input(&self, i: usize) -> &'a [T] {
        self.inputs[i].unwrap_or_else(|| missing("input value", i))
    }

    /// The value of output `i`, declared as read.
    pub fn output(&self, i: usize) -> &'a [T] {
        self.outputs[i].unwrap_or_else(|| missing("output value", i))
    }

    /// The gradient of output 0 of an operation that has no other with a gradient.
    pub fn gradient(&self) -> &'a [T] {
        self.output_gradients[0].unwrap_or_else(|| missing("output gradient", 0))
    }

    /// Takes the gradient of input `i`, where it is asked for.
    pub fn input_gradient(&mut self, i: usize) -> Option<Gradient<'a, T>> {
        self.input_gradients[i].take()
    }
}

/// The gradient of an input: a buffer to add to, or, for the first contribution to it in a
/// replay, one whose content is arbitrary. Clearing it where it is about to be written
/// spares a pass over memory.
#[derive(Debug)]
pub struct Gradient<'a, T> {
    data: &'a mut [T],
    first: bool,
}

impl<'a, T: Scalar> Gradient<'a, T> {
    /// A buffer with earlier contributions in it, or the place of the `first`.
    pub(crate) fn new(data: &'a mut [T], first: bool) -> Gradient<'a, T> {
        Gradient { data, first }
    }

    /// The whole buffer, to be added to.
    pub fn cleared(self) -> &'a mut [T] {
        if self.first {
            self.data.par_chunks_mut(1 << 14).for_each(|tile| tile.fill(T::ZERO));
        }
        self.data
    }

    /// Tiles of `size` elements, to be added to, each cleared by the thread that takes it.
    pub fn tiles(self, size: usize) -> impl IndexedParallelIterator<Item = &'a mut [T]> {
        let first = self.first;
        self.data.par_chunks_mut(size).map(move |tile| {
            if first {
                tile.fill(T::ZERO);
            }
            tile
        })
    }

    /// The buffer as it is, and whether to add to it rather than to overwrite all of it.
    pub fn into_parts(self) -> (&'a mut [T], bool) {
        (self.data, !self.first)
    }
}

/// The first `n` elements of the work space, grown if it is smaller.
pub fn scratch<T: Scalar>(space: &mut Vec<T>, n: usize) -> &mut [T] {
    if space.len() < n {
        space.resize(n, T::ZERO);
    }
    &mut space[..n]
}

/// An operation as its author writes it.
pub trait Kernel: Debug + Send + Sync + 'static {
    /// A name for diagnostics.
    fn name(&self) -> &'static str;

    /// Output shapes from input shapes: results first, then what backward alone needs.
    ///
    /// # Errors
    /// When the inputs do not fit together.
    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>>;

    /// Whose values backward reads. All others may be overwritten as soon as the forward pass
    /// is done with them.
    fn reads(&self) -> Slots;

    /// What is f32 on a GPU even where activations are bf16: gate pre-activations, states,
    /// statistics, losses, and parameters that enter no matrix product. The others are stored
    /// in the GPU's precision, and so are gradients, each as its value.
    fn full_precision(&self) -> Slots {
        Slots::default()
    }

    /// An input and an output of its shape that may lie in one place: forward then finds the input's values
    /// in the output, and leaves there what does not change. On the processor the input is absent then
    /// ([`Forward::updates`]), on a GPU both have one address.
    fn updates(&self) -> Option<[usize; 2]> {
        None
    }

    /// The inputs that are weight matrices, as a bit set: on a GPU their gradients are f32 even
    /// where they are read in bf16, so that there they have to be parameters.
    fn weights(&self) -> u32 {
        0
    }

    /// In how few bits forward on the processor reads input `slot`, a weight matrix, from
    /// [`Forward::weight`]. Everything else is widened before it is read.
    fn storable(&self, _slot: usize) -> Storable {
        Storable::Wide
    }

    /// The inputs whose gradients [`backward_cuda`](Kernel::backward_cuda) writes whole instead of adding
    /// to them where it is the first to reach them ([`CudaBackward::is_fresh`]). The others are
    /// cleared before it.
    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::default()
    }

    /// Whether [`forward_cuda`](Kernel::forward_cuda) begins with products of input 0, for which it may
    /// make that input itself: see [`Next`](crate::engine::cuda::Next).
    #[cfg(feature = "cuda")]
    fn multiplies(&self) -> bool {
        false
    }

    /// Writes every output.
    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>);

    /// Adds to every input gradient that is there.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>);

    /// [`forward`](Kernel::forward) on a GPU: queues kernels.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()>;

    /// [`backward`](Kernel::backward) on a GPU: queues kernels.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()>;
}

/// A [`Kernel`] with its element type erased, as the tape holds it.
pub trait Operation: Debug + Send + Sync {
    /// See [`Kernel::name`].
    fn name(&self) -> &'static str;
    /// See [`Kernel::outputs`].
    ///
    /// # Errors
    /// When the inputs do not fit together.
    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>>;
    /// See [`Kernel::reads`].
    fn reads(&self) -> Slots;
    /// See [`Kernel::full_precision`].
    fn full_precision(&self) -> Slots;
    /// See [`Kernel::updates`].
    fn updates(&self) -> Option<[usize; 2]>;
    /// See [`Kernel::weights`].
    fn weights(&self) -> u32;
    /// See [`Kernel::storable`].
    fn storable(&self, slot: usize) -> Storable;
    /// See [`Kernel::overwrites`].
    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots;
    /// See [`Kernel::multiplies`].
    #[cfg(feature = "cuda")]
    fn multiplies(&self) -> bool;
    /// [`Kernel::forward`] in f32.
    fn forward_f32(&self, io: &mut Forward<'_, f32>);
    /// [`Kernel::forward`] in f64.
    fn forward_f64(&self, io: &mut Forward<'_, f64>);
    /// [`Kernel::backward`] in f32.
    fn backward_f32(&self, io: &mut Backward<'_, f32>);
    /// [`Kernel::backward`] in f64.
    fn backward_f64(&self, io: &mut Backward<'_, f64>);
    /// See [`Kernel::forward_cuda`].
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    #[cfg(feature = "cuda")]
    fn forward_on_gpu(&self, io: &mut CudaForward<'_>) -> Result<()>;
    /// See [`Kernel::backward_cuda`].
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    #[cfg(feature = "cuda")]
    fn backward_on_gpu(&self, io: &mut CudaBackward<'_>) -> Result<()>;
}

impl<K: Kernel> Operation for K {
    fn name(&self) -> &'static str {
        Kernel::name(self)
    }
    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        Kernel::outputs(self, inputs)
    }
    fn reads(&self) -> Slots {
        Kernel::reads(self)
    }
    fn full_precision(&self) -> Slots {
        Kernel::full_precision(self)
    }
    fn updates(&self) -> Option<[usize; 2]> {
        Kernel::updates(self)
    }
    fn weights(&self) -> u32 {
        Kernel::weights(self)
    }
    fn storable(&self, slot: usize) -> Storable {
        Kernel::storable(self, slot)
    }
    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Kernel::overwrites(self)
    }
    #[cfg(feature = "cuda")]
    fn multiplies(&self) -> bool {
        Kernel::multiplies(self)
    }
    fn forward_f32(&self, io: &mut Forward<'_, f32>) {
        self.forward(io);
    }
    fn forward_f64(&self, io: &mut Forward<'_, f64>) {
        self.forward(io);
    }
    fn backward_f32(&self, io: &mut Backward<'_, f32>) {
        self.backward(io);
    }
    fn backward_f64(&self, io: &mut Backward<'_, f64>) {
        self.backward(io);
    }
    #[cfg(feature = "cuda")]
    fn forward_on_gpu(&self, io: &mut CudaForward<'_>) -> Result<()> {
        self.forward_cuda(io)
    }
    #[cfg(feature = "cuda")]
    fn backward_on_gpu(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        self.backward_cuda(io)
    }
}

/// The element types for which an [`Operation`] can be run: the bridge from a generic
/// executor to the erased methods.
pub trait Element: Scalar {
    /// Calls the forward of this type.
    fn forward(operation: &dyn Operation, io: &mut Forward<'_, Self>);
    /// Calls the backward of this type.
    fn backward(operation: &dyn Operation, io: &mut Backward<'_, Self>);
}

impl Element for f32 {
    fn forward(operation: &dyn Operation, io: &mut Forward<'_, f32>) {
        operation.forward_f32(io);
    }
    fn backward(operation: &dyn Operation, io: &mut Backward<'_, f32>) {
        operation.backward_f32(io);
    }
}

impl Element for f64 {
    fn forward(operation: &dyn Operation, io: &mut Forward<'_, f64>) {
        operation.forward_f64(io);
    }
    fn backward(operation: &dyn Operation, io: &mut Backward<'_, f64>) {
        operation.backward_f64(io);
    }
}
