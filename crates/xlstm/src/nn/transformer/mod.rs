//! The GPT-style Transformer, a baseline: pre-norm blocks of causal attention and a feed-forward
//! layer.

pub mod block;
pub mod config;

pub use block::TransformerBlock;
pub use config::{PositionKind, TransformerConfig};

/// Standard deviation of the first weights, as in GPT-2.
pub(crate) const GPT_DEVIATION: f64 = 0.02;
