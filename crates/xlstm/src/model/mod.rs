//! Models: blocks stacked into features -> features, the models of words and of other sequences
//! around them, and their recorded passes: training and scoring ([`Objective`]), and running
//! ([`Runner`]).

pub mod backbone;
pub mod block_stack;
pub mod feature_model;
pub mod interface;
pub mod language_model;
mod large;
mod lstm;
pub mod objective;
pub mod original;
pub mod runner;
pub mod stack;
mod transformer;

pub use crate::nn::config::{BlockKind, Family, ModelConfig};
pub use crate::nn::original::{BlockForm, LstmType, OriginalConfig};
pub use crate::nn::slstm_at::SlstmAt;
pub use backbone::Backbone;
pub use block_stack::BlockStack;
pub use feature_model::{FeatureConfig, FeatureModel, Head, Pooling};
pub use interface::{Inputs, Model};
pub use language_model::LanguageModel;
pub use objective::Objective;
pub use original::OriginalStack;
pub use runner::{Draw, Logits, Runner, storable_parameters};
pub use stack::Stack;
