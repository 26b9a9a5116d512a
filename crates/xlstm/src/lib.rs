//! xLSTM language models: sLSTM, mLSTM and their mixes, trained, evaluated and
//! streamed by a small engine of our own.
#![deny(missing_docs)]

mod error;
pub mod text;
pub mod data;

pub use error::{Error, ErrorKind, Result};
