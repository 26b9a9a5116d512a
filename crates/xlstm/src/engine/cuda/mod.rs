//! The engine on an NVIDIA GPU: the same tape, replayed by kernels.
//!
//! Memory: the plan's slots lie in one arena; parameters, their gradients and the optimizer's
//! moments are flat f32 buffers of one [`Layout`], beside which bf16 has a copy of the parameters
//! that matrix products read. Every reduction has a fixed order and no
//! float is added atomically, so a step gives the same bits every time. Everything that
//! changes between steps lies in device memory, so a step is captured once as a CUDA graph.

mod algorithms;
pub(crate) mod blas;
pub mod compiler;
pub(crate) mod context;
pub(crate) mod event;
pub mod executor;
pub(crate) mod few_rows;
pub(crate) mod graph;
pub(crate) mod launch;
pub(crate) mod measure;
pub mod parameters;

pub use compiler::Source;
pub use context::Gpu;
pub use executor::CudaExecutor;
pub use few_rows::Next;
pub use launch::{CudaBackward, CudaForward};
pub use parameters::{CudaParameters, CudaTensors, Layout};

use super::precision::{Precision, from_bf16, to_bf16};
