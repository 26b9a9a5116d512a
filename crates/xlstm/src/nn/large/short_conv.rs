//! A short causal convolution of a layer's input over time, which starts as the identity:
//!
//! ```text
//! y_t = Σ_j w_j ∘ x_{t-K+1+j}          w_{K-1} = 1, the others 0 at first
//! ```
//!
//! Published models of the family have none. A token's projections then see its neighbours (as in the small
//! family, whose queries and keys do), which the matrix memory would have to be asked for otherwise.

use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::nn::Context;
use crate::nn::parameters::{Builder, Init, Parameter};
use crate::ops::causal_conv::causal_conv;

/// One such convolution of a stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct ShortConv {
    weight: Parameter,
    taps: usize,
    width: usize,
}

impl ShortConv {
    /// The convolution called `name` of a stream of width `width` with `taps` taps; none where there are none.
    pub(super) fn new(name: &str, (width, taps): (usize, usize), builder: &mut Builder) -> Option<ShortConv> {
        let last = taps.checked_sub(1)?;
        let identity = (0..width * taps).map(|i| if i % taps == last { 1.0 } else { 0.0 }).collect();
        let weight = builder.scope(name, |builder| {
            builder.parameter_with_decay("weight", &[width, 1, taps], Init::Values(identity), false)
        });
        Some(ShortConv { weight, taps, width })
    }

    /// The shape of the window of `batch` sequences: their last K - 1 tokens.
    pub(super) fn window(&self, batch: usize) -> Shape {
        [batch, self.taps - 1, self.width].into()
    }

    /// x (B, S, D) and the window before it -> y (B, S, D) and the window after it.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub(super) fn forward(
        &self,
        tape: &mut Tape,
        x: Var,
        window: Option<Var>,
        context: &Context,
    ) -> Result<(Var, Var)> {
        let weight = self.weight.var(tape);
        causal_conv(tape, x, weight, None, window, context.marks, false)
    }
}
