//! xLSTM language models: sLSTM, mLSTM and their mixes, trained, evaluated and
//! streamed by a small engine of our own.
#![deny(missing_docs)]

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
