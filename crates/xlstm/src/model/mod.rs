//! Models: blocks stacked into features -> features, the language model around them, and
//! its recorded passes: training and scoring ([`Objective`]), and running ([`Runner`]).

pub mod language_model;
pub mod objective;
pub mod runner;
pub mod stack;

pub use crate::nn::config::{BlockKind, ModelConfig};
pub use crate::nn::slstm_at::SlstmAt;
pub use language_model::LanguageModel;
pub use objective::Objective;
pub use runner::{Logits, Runner, narrow_parameters};
pub use stack::Stack;
