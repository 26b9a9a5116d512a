//! The optimizer and its learning rate over time.
pub mod adamw;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod schedule;

pub use adamw::{AdamW, AdamWOptions, global_norm};
pub use schedule::{Decay, Schedule};
