//! xLSTM language models: sLSTM, mLSTM and their mixes, trained, evaluated and
//! streamed by a small engine of our own.
#![deny(missing_docs)]

pub mod data;
mod error;
pub mod rng;
pub mod text;

pub use error::{Error, ErrorKind, Result};
