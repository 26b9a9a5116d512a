//! The classic LSTM, a baseline: layers with dense recurrence, one above the other.

pub mod config;
pub mod layer;

pub use config::LstmConfig;
pub use layer::LstmLayer;
