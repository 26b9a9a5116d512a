//! Models: their configuration and how blocks are stacked.
pub mod config;
pub mod slstm_at;

pub use config::{
    Activation, BiasInit, BlockKind, FeedforwardConfig, Gate, MlstmConfig, ModelConfig, RecurrentWeightInit,
    SlstmConfig, SlstmFunction,
};
pub use slstm_at::SlstmAt;
