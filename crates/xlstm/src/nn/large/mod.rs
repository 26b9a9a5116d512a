//! The family of the published 7B model: mLSTM blocks with a gated feed-forward layer each,
//! gates and logits within soft caps; without convolutions, unless they are asked for.

pub mod block;
pub mod config;
mod short_conv;

pub use block::LargeBlock;
pub use config::{Initialization, LargeConfig, WeightMode};
