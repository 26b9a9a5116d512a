//! The family of the published 7B model: mLSTM blocks with a gated feed-forward layer each,
//! without convolutions, gates and logits within soft caps.

pub mod block;
pub mod config;

pub use block::LargeBlock;
pub use config::{Initialization, LargeConfig, WeightMode};
