//! Layers with parameters, made of operations and cells, up to the residual blocks.

pub mod block;
pub mod config;
pub mod feed_forward;
pub mod large;
pub mod lstm;
pub mod mlstm_layer;
pub mod original;
pub mod parameters;
pub mod residual;
pub mod slstm_at;
pub mod slstm_layer;
pub mod transformer;
pub mod weights;

pub use block::Block;
pub use config::{BlockKind, Family, ModelConfig};
pub use parameters::{Builder, Init, Parameter, ParameterSpec, Parameters, Role};
pub use residual::Residual;
pub use weights::Weights;

use crate::engine::{Ids, Mode, Tape, Var};
use crate::error::Result;
use crate::ops::dropout::dropout;

/// What the layers of one forward pass share besides the residual stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct Context {
    /// Resets and pads of every token (batch x length).
    pub marks: Option<Ids>,
    /// Seed low, seed high, step, micro-batch: what dropout counts from.
    pub seed: Option<Ids>,
    /// Dropout sites recorded so far.
    sites: u32,
}

impl Context {
    /// A pass over tokens with these marks; training with dropout needs the seed.
    pub fn new(marks: Option<Ids>, seed: Option<Ids>) -> Context {
        Context { marks, seed, sites: 0 }
    }

    /// Dropout at the next site; the identity outside training.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn dropout(&mut self, tape: &mut Tape, x: Var, rate: f64) -> Result<Var> {
        self.sites += 1;
        match self.seed {
            Some(seed) if tape.mode() == Mode::Train && rate > 0.0 => {
                dropout(tape, x, rate, seed, self.sites)
            }
            _ => Ok(x),
        }
    }
}
