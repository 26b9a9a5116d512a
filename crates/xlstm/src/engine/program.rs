//! A tape with its buffers on a device, whichever it is: what models run through.

#[cfg(feature = "cuda")]
use super::cuda::{CudaExecutor, CudaParameters, CudaTensors};
use super::device::Device;
use super::executor::{Culprit, Executor};
use super::operation::Element;
use super::profile::OperationTime;
use super::stored::Stored;
use super::tape::{Ids, Tape, Var};
use crate::error::{Error, ErrorKind, Result};

/// A recorded pass, ready to be replayed. On a GPU numbers are f32 inside, whatever T is.
// One a pass: its size does not matter.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
pub enum Program<T> {
    /// On the processor. Whoever replays enters the pool: see [`Device::install`].
    Cpu(Executor<T>),
    /// On a GPU.
    #[cfg(feature = "cuda")]
    Cuda(CudaExecutor),
}

/// A model's parameters where a device reads them.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a, T> {
    /// One buffer a parameter.
    Cpu(&'a [Vec<T>]),
    /// As files store them: for forward alone.
    Stored(&'a [Stored<T>]),
    /// Flat buffers.
    #[cfg(feature = "cuda")]
    Cuda(&'a CudaParameters),
}

/// Parameter gradients where a device adds to them.
#[derive(Debug)]
pub enum Gradients<'a, T> {
    /// One buffer a parameter.
    Cpu(&'a mut [Vec<T>]),
    /// A flat buffer.
    #[cfg(feature = "cuda")]
    Cuda(&'a mut CudaTensors),
}

impl<'a, T> From<&'a [Vec<T>]> for Values<'a, T> {
    fn from(values: &'a [Vec<T>]) -> Self {
        Values::Cpu(values)
    }
}
impl<'a, T> From<&'a Vec<Vec<T>>> for Values<'a, T> {
    fn from(values: &'a Vec<Vec<T>>) -> Self {
        Values::Cpu(values)
    }
}
impl<'a, T> From<&'a mut [Vec<T>]> for Gradients<'a, T> {
    fn from(gradients: &'a mut [Vec<T>]) -> Self {
        Gradients::Cpu(gradients)
    }
}
impl<'a, T> From<&'a mut Vec<Vec<T>>> for Gradients<'a, T> {
    fn from(gradients: &'a mut Vec<Vec<T>>) -> Self {
        Gradients::Cpu(gradients)
    }
}
#[cfg(feature = "cuda")]
impl<'a, T> From<&'a CudaParameters> for Values<'a, T> {
    fn from(parameters: &'a CudaParameters) -> Self {
        Values::Cuda(parameters)
    }
}
#[cfg(feature = "cuda")]
impl<'a, T> From<&'a mut CudaTensors> for Gradients<'a, T> {
    fn from(gradients: &'a mut CudaTensors) -> Self {
        Gradients::Cuda(gradients)
    }
}

#[cfg(feature = "cuda")]
fn narrow<T: Element>(values: &[T]) -> Vec<f32> {
    values.iter().map(|x| x.to_f64() as f32).collect()
}

#[cfg(feature = "cuda")]
fn wide<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|x| T::from_f64(f64::from(*x))).collect()
}

/// The program runs on one device and is given numbers of another, or in a form for inference.
fn elsewhere() -> Error {
    Error::new(ErrorKind::Device, "parameters are on another device or for inference alone")
        .hint("load the weights for this device; training needs parameters of its own")
}

impl<T: Element> Program<T> {
    /// Plans and allocates the buffers of `tape` on `device`, for what leads to values that are kept or
    /// seeded.
    ///
    /// # Errors
    /// When a GPU's memory runs out.
    pub fn new(mut tape: Tape, device: &Device) -> Result<Program<T>> {
        tape.prune();
        match device {
            Device::Cpu(_, precision) => Ok(Program::Cpu(Executor::with_precision(tape, *precision))),
            #[cfg(feature = "cuda")]
            Device::Cuda(gpu, precision) => Ok(Program::Cuda(CudaExecutor::new(tape, *precision, gpu)?)),
        }
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        match self {
            Program::Cpu(executor) => executor.bytes(),
            #[cfg(feature = "cuda")]
            Program::Cuda(executor) => executor.bytes(),
        }
    }

    /// Fills every buffer that the caller does not own with NaN.
    ///
    /// # Errors
    /// When a GPU refuses.
    pub fn poison(&mut self) -> Result<()> {
        match self {
            Program::Cpu(executor) => {
                executor.poison();
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Program::Cuda(executor) => executor.poison(),
        }
    }

    /// Sets integers before a replay.
    ///
    /// # Errors
    /// When a copy to a GPU fails.
    pub fn set_ids(&mut self, ids: Ids, values: &[u32]) -> Result<()> {
        match self {
            Program::Cpu(executor) => {
                executor.ids_mut(ids).copy_from_slice(values);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Program::Cuda(executor) => executor.set_ids(ids, values),
        }
    }

    /// Sets an input before a replay.
    ///
    /// # Errors
    /// When a copy to a GPU fails.
    pub fn set_input(&mut self, var: Var, values: &[T]) -> Result<()> {
        match self {
            Program::Cpu(executor) => {
                executor.input_mut(var).copy_from_slice(values);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Program::Cuda(executor) => executor.set_input(var, &narrow(values)),
        }
    }

    /// Sets the gradient that backward starts from, of a value marked by `seed_gradient`.
    ///
    /// # Errors
    /// When a copy to a GPU fails.
    pub fn set_seed(&mut self, var: Var, values: &[T]) -> Result<()> {
        match self {
            Program::Cpu(executor) => {
                executor.seed_mut(var).copy_from_slice(values);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Program::Cuda(executor) => executor.set_seed(var, &narrow(values)),
        }
    }

    /// A kept value or an input, after a replay.
    ///
    /// # Errors
    /// When a copy from a GPU, or work before it, fails.
    pub fn value(&self, var: Var) -> Result<Vec<T>> {
        match self {
            Program::Cpu(executor) => Ok(executor.value(var).to_vec()),
            #[cfg(feature = "cuda")]
            Program::Cuda(executor) => Ok(wide(&executor.value(var)?)),
        }
    }

    /// The gradient of an input, after backward. Empty where no gradient flows.
    ///
    /// # Errors
    /// When a copy from a GPU, or work before it, fails.
    pub fn gradient(&self, var: Var) -> Result<Vec<T>> {
        match self {
            Program::Cpu(executor) => Ok(executor.gradient(var).to_vec()),
            #[cfg(feature = "cuda")]
            Program::Cuda(executor) => Ok(wide(&executor.gradient(var)?)),
        }
    }

    /// Makes a kept value the next replay's input. The value itself is arbitrary afterwards.
    ///
    /// # Errors
    /// When a GPU refuses the copy.
    pub fn feed_back(&mut self, value: Var, input: Var) -> Result<()> {
        match self {
            Program::Cpu(executor) => {
                executor.feed_back(value, input);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Program::Cuda(executor) => executor.feed_back(value, input),
        }
    }

    /// Copies an input of another program on the same device into one of this one.
    ///
    /// # Errors
    /// When the programs are on different devices, or a GPU refuses the copy.
    pub fn copy_input(&mut self, to: Var, other: &Program<T>, from: Var) -> Result<()> {
        match (self, other) {
            (Program::Cpu(executor), Program::Cpu(other)) => {
                executor.input_mut(to).copy_from_slice(other.value(from));
                Ok(())
            }
            #[cfg(feature = "cuda")]
            (Program::Cuda(executor), Program::Cuda(other)) => executor.copy_input(to, other, from),
            #[cfg(feature = "cuda")]
            _ => Err(elsewhere()),
        }
    }

    /// Runs every node in order. `parameters` are those that the tape was recorded over.
    ///
    /// # Errors
    /// When they are on another device, or a kernel cannot be compiled or launched.
    pub fn forward<'a>(&mut self, parameters: impl Into<Values<'a, T>>) -> Result<()>
    where
        T: 'a,
    {
        self.forward_feeding(parameters, &[])
    }

    /// Runs every node in order, and then feeds back each pair in `fed`, which is always the
    /// same: see [`feed_back`](Program::feed_back). On a GPU all of it is one graph.
    ///
    /// # Errors
    /// As [`forward`](Program::forward).
    pub fn forward_feeding<'a>(
        &mut self,
        parameters: impl Into<Values<'a, T>>,
        fed: &[(Var, Var)],
    ) -> Result<()>
    where
        T: 'a,
    {
        match (self, parameters.into()) {
            (Program::Cpu(executor), Values::Cpu(parameters)) => {
                executor.forward(parameters);
                fed.iter().for_each(|&(value, input)| executor.feed_back(value, input));
                Ok(())
            }
            (Program::Cpu(executor), Values::Stored(parameters)) => {
                executor.forward_stored(parameters);
                fed.iter().for_each(|&(value, input)| executor.feed_back(value, input));
                Ok(())
            }
            #[cfg(feature = "cuda")]
            (Program::Cuda(executor), Values::Cuda(parameters)) => executor.forward(parameters, fed),
            #[cfg(feature = "cuda")]
            _ => Err(elsewhere()),
        }
    }

    /// Runs every node backward, adding to `gradients`.
    ///
    /// # Errors
    /// When those are on another device, or a kernel cannot be compiled or launched.
    pub fn backward<'a>(
        &mut self,
        parameters: impl Into<Values<'a, T>>,
        gradients: impl Into<Gradients<'a, T>>,
    ) -> Result<()>
    where
        T: 'a,
    {
        match (self, parameters.into(), gradients.into()) {
            (Program::Cpu(executor), Values::Cpu(parameters), Gradients::Cpu(gradients)) => {
                executor.backward(parameters, gradients);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            (Program::Cuda(executor), Values::Cuda(parameters), Gradients::Cuda(gradients)) => {
                executor.backward(parameters, gradients)
            }
            _ => Err(elsewhere()),
        }
    }

    /// Replays forward and backward node by node; returns the time of each operation, the most
    /// expensive first.
    ///
    /// # Errors
    /// As [`backward`](Program::backward).
    pub fn profile<'a>(
        &mut self,
        parameters: impl Into<Values<'a, T>>,
        gradients: impl Into<Gradients<'a, T>>,
    ) -> Result<Vec<OperationTime>>
    where
        T: 'a,
    {
        match (self, parameters.into(), gradients.into()) {
            (Program::Cpu(executor), Values::Cpu(parameters), Gradients::Cpu(gradients)) => {
                Ok(executor.profile(parameters, gradients))
            }
            #[cfg(feature = "cuda")]
            (Program::Cuda(executor), Values::Cuda(parameters), Gradients::Cuda(gradients)) => {
                executor.profile(parameters, gradients)
            }
            _ => Err(elsewhere()),
        }
    }

    /// After a replay that was not finite: the first operation to blame, as far as it is
    /// found. The processor replays to find it, a GPU has taken notes in every replay.
    ///
    /// # Errors
    /// When those are on another device, or a copy from a GPU fails.
    pub fn find_non_finite<'a>(
        &mut self,
        parameters: impl Into<Values<'a, T>>,
        gradients: impl Into<Gradients<'a, T>>,
    ) -> Result<Option<Culprit>>
    where
        T: 'a,
    {
        match (self, parameters.into(), gradients.into()) {
            (Program::Cpu(executor), Values::Cpu(parameters), Gradients::Cpu(gradients)) => {
                Ok(executor.find_non_finite(parameters, Some(gradients)))
            }
            #[cfg(feature = "cuda")]
            (Program::Cuda(executor), ..) => executor.find_non_finite(),
            _ => Err(elsewhere()),
        }
    }
}
