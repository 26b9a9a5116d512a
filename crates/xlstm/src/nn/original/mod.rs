//! The model of the Python original: blocks of one or several cells, before or after a projection
//! up, with the paper's cells in them.

pub mod block;
pub mod cells;
pub mod config;

pub use block::OriginalBlock;
pub use config::{BlockForm, LstmType, OriginalConfig};
