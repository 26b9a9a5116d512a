//! The engine on an NVIDIA GPU: the same tape, replayed by kernels.
//!
//! Memory: the plan's slots lie in one arena; parameters, their gradients and the optimizer's
//! moments are flat f32 buffers of one [`Layout`]. Every reduction has a fixed order and no
//! float is added atomically, so a step gives the same bits every time. Everything that
//! changes between steps lies in device memory, so a step is captured once as a CUDA graph.

pub(crate) mod blas;
pub mod compiler;
pub(crate) mod context;
pub mod executor;
pub(crate) mod launch;
pub mod parameters;

pub use compiler::Source;
pub use context::Gpu;
pub use executor::CudaExecutor;
pub use launch::{CudaBackward, CudaForward};
pub use parameters::{CudaTensors, Layout};

/// What activations and their gradients are stored in. Gate pre-activations, states, norm
/// statistics, losses and parameter gradients are f32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 throughout, without TF32.
    F32,
}

impl Precision {
    /// Bytes of an activation.
    pub fn bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
        }
    }
}
