//! What recorded passes need of a model, whatever it reads: token ids or features.
//!
//! All that enters a pass is integers, so that a step uploads them in one piece: a token is one,
//! a row of features the bits of its f32 numbers.

use std::fmt::Debug;
use std::sync::Arc;

use super::Logits;
use crate::engine::{Ids, Shape, Tape, Var};
use crate::error::{Error, Result};
use crate::nn::{Context, ParameterSpec};

/// What a model reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inputs {
    /// Token ids.
    Tokens {
        /// How many there are.
        vocabulary: usize,
    },
    /// Rows of features.
    Features {
        /// Features of a row.
        width: usize,
    },
}

impl Inputs {
    /// Integers of one place in a sequence.
    pub fn width(self) -> usize {
        match self {
            Inputs::Tokens { .. } => 1,
            Inputs::Features { width } => width,
        }
    }

    /// Refuses token ids outside the vocabulary, and features that are not finite numbers.
    ///
    /// # Errors
    /// A data error that says which and where.
    pub fn check(self, inputs: &[u32]) -> Result<()> {
        match self {
            Inputs::Tokens { vocabulary } => {
                let Some(at) = inputs.iter().position(|&token| token as usize >= vocabulary) else {
                    return Ok(());
                };
                let token = inputs[at];
                Err(Error::data(format!(
                    "token {token} at position {at} lies outside the model's vocabulary of {vocabulary}"
                ))
                .hint("the tokenizer does not belong to this model"))
            }
            Inputs::Features { width } => {
                let number = |bits: &u32| f32::from_bits(*bits);
                let Some(at) = inputs.iter().position(|bits| !number(bits).is_finite()) else {
                    return Ok(());
                };
                let (row, feature, found) = (at / width, at % width, number(&inputs[at]));
                Err(Error::data(format!("feature {feature} of row {row} is {found}, not a finite number"))
                    .hint("fill the gaps of the data before it is read"))
            }
        }
    }
}

/// A model that is trained ([`Objective`](super::Objective)) and run ([`Runner`](super::Runner)).
pub trait Model: Debug + Send + Sync {
    /// The parameters, in order.
    fn specs(&self) -> &Arc<[ParameterSpec]>;

    /// Names and shapes of the state of `batch` sequences. Empty for a model that reads from both
    /// ends: it reads whole sequences and carries nothing on.
    fn state_layout(&self, batch: usize) -> Vec<(String, Shape)>;

    /// What it reads.
    fn inputs(&self) -> Inputs;

    /// Numbers of one output.
    fn output_width(&self) -> usize;

    /// Integers that are the targets of a batch of `shape` (sequences, places).
    fn target_len(&self, shape: [usize; 2]) -> usize;

    /// The most places that a sequence may have, where there is such a limit.
    fn most_tokens(&self) -> Option<usize>;

    /// inputs (B S, each [`Inputs::width`] integers) and the state before them
    /// -> what the head reads (B, S or 1, D), and the state after them.
    ///
    /// # Errors
    /// When shapes do not fit.
    fn features(
        &self,
        tape: &mut Tape,
        inputs: Ids,
        shape: [usize; 2],
        wanted: Logits,
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)>;

    /// features (…, D) -> outputs (…, O).
    ///
    /// # Errors
    /// When shapes do not fit.
    fn outputs(&self, tape: &mut Tape, features: Var) -> Result<Var>;

    /// All features and the targets of their outputs -> `scale` times the sum of the losses, and the
    /// loss of each.
    ///
    /// # Errors
    /// When shapes do not fit.
    fn loss(&self, tape: &mut Tape, features: Var, targets: Ids, scale: Var) -> Result<(Var, Var)>;
}
