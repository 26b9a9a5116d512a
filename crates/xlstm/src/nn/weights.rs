//! A model's parameters, ready to be read on a device.
//!
//! Training owns them in f32; inference on the processor can also read them as files store them.

use std::sync::Arc;

use super::parameters::Parameters;
#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaParameters, Layout};
use crate::engine::{Device, Scalar, Stored, Values};
use crate::error::Result;

/// Parameters where a device reads them. A clone shares the numbers.
#[derive(Clone, Debug)]
pub enum Weights<T> {
    /// In memory.
    Cpu(Arc<Parameters<T>>),
    /// As files store them, mapped where they can be; for inference alone.
    Stored(Arc<[Stored<T>]>),
    /// On a GPU.
    #[cfg(feature = "cuda")]
    Cuda(Arc<CudaParameters>),
}

impl<T: Scalar> Weights<T> {
    /// The parameters on `device`: copied where that is a GPU, shared where it is not.
    ///
    /// # Errors
    /// When a GPU's memory runs out.
    pub fn new(parameters: Arc<Parameters<T>>, device: &Device) -> Result<Weights<T>> {
        match device {
            Device::Cpu(..) => Ok(Weights::Cpu(parameters)),
            #[cfg(feature = "cuda")]
            Device::Cuda(gpu, precision) => {
                let layout = Layout::new(parameters.values.iter().map(Vec::len));
                let placed = CudaParameters::zeros(gpu, &layout, *precision)?;
                let values = parameters.values.iter();
                let narrow = |x: &Vec<T>| x.iter().map(|x| x.to_f64() as f32).collect::<Vec<f32>>();
                placed.upload(&values.map(narrow).collect::<Vec<_>>())?;
                Ok(Weights::Cuda(Arc::new(placed)))
            }
        }
    }

    /// What a program reads.
    pub fn values(&self) -> Values<'_, T> {
        match self {
            Weights::Cpu(parameters) => Values::Cpu(&parameters.values),
            Weights::Stored(parameters) => Values::Stored(parameters),
            #[cfg(feature = "cuda")]
            Weights::Cuda(parameters) => Values::Cuda(parameters),
        }
    }
}
