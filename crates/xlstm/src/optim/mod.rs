//! The optimizer and its learning rate over time.
pub mod adamw;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "cuda")]
mod cuda_muon;
pub mod muon;
pub mod optimizer;
pub mod schedule;

pub use adamw::AdamWOptions;
pub use muon::MuonOptions;
pub use optimizer::{MatrixUpdate, Optimizer, OptimizerOptions, global_norm};
pub use schedule::{Decay, Schedule};
