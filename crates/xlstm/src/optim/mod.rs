//! Optimisation: how a step changes the parameters.
pub mod schedule;

pub use schedule::{Decay, Schedule};
