//! xLSTM language models: sLSTM, mLSTM and their mixes, trained, evaluated and
//! streamed by a small engine of our own.
//!
//! ```
//! use std::sync::Arc;
//! use xlstm::engine::Device;
//! use xlstm::model::{LanguageModel, Logits, ModelConfig, Runner, SlstmAt};
//! use xlstm::nn::{Parameters, Weights};
//!
//! # fn main() -> xlstm::Result<()> {
//! // Three mLSTM blocks and an sLSTM block, with the first values of seed 1.
//! let config =
//!     ModelConfig { vocab_size: 256, slstm_at: SlstmAt::Positions(vec![1]), ..ModelConfig::default() };
//! let model = Arc::new(LanguageModel::new(&config)?);
//! let parameters = Arc::new(Parameters::<f32>::initialize(model.specs(), 1));
//! let device = Device::cpu(0)?;
//! let mut runner = Runner::new(model, Weights::new(parameters, &device)?, device);
//!
//! // The state after a prompt is a value: what was read once can be continued many times.
//! let logits = runner.read(b"To be, or not".map(u32::from).as_slice(), Logits::Last)?;
//! let state = runner.state()?;
//! let yes = runner.read(&[32, 116, 111], Logits::Last)?;
//! runner.set_state(&state)?;
//! let no = runner.read(&[46], Logits::Last)?;
//! assert_eq!((logits.len(), yes.len(), no.len()), (256, 256, 256));
//! # Ok(())
//! # }
//! ```
//!
//! Equations use the symbols of [`notation`]; errors are one type, [`Error`].
#![deny(missing_docs)]

pub mod bench;
pub mod cell;
pub mod checkpoint;
pub mod data;
pub mod engine;
mod error;
pub mod eval;
pub mod files;
pub mod folder;
pub mod generate;
pub mod marks;
pub mod model;
pub mod nn;
pub mod notation;
pub mod ops;
pub mod optim;
pub mod rng;
pub mod state;
pub mod text;
pub mod train;

pub use error::{Error, ErrorKind, Result};
