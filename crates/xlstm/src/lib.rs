//! xLSTM language models: sLSTM, mLSTM and their mixes, trained, evaluated and
//! streamed by a small engine of our own.
#![deny(missing_docs)]

pub mod cell;
pub mod data;
pub mod engine;
mod error;
pub mod ops;
pub mod rng;
pub mod text;

pub use error::{Error, ErrorKind, Result};
