//! The residual stream between layers.
//!
//! x' = x + layer(norm(x)): the sum is read by the next norm first of all. So a layer hands on its two
//! terms, and that norm adds them while it reads them.

use crate::engine::{Tape, Var};
use crate::error::Result;
use crate::ops::add::add;
use crate::ops::norm::{Norm, add_norm, norm};

/// A stream, whose last term may still have to be added.
#[derive(Clone, Copy, Debug)]
pub struct Residual {
    x: Var,
    added: Option<Var>,
}

impl From<Var> for Residual {
    fn from(x: Var) -> Residual {
        Residual { x, added: None }
    }
}

impl Residual {
    /// x + y.
    pub fn sum_of(x: Var, y: Var) -> Residual {
        Residual { x, added: Some(y) }
    }

    /// The stream as one value, and its norm.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn normed(
        self,
        tape: &mut Tape,
        weight: Var,
        bias: Option<Var>,
        options: Norm,
    ) -> Result<(Var, Var)> {
        match self.added {
            Some(added) => add_norm(tape, [self.x, added], weight, bias, options),
            None => Ok((self.x, norm(tape, self.x, weight, bias, options)?)),
        }
    }

    /// The stream as one value.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn value(self, tape: &mut Tape) -> Result<Var> {
        self.added.map_or(Ok(self.x), |added| add(tape, self.x, added))
    }
}
