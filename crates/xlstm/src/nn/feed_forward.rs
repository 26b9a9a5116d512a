//! The gated feed-forward layer: y = W_down (act(g) ∘ u) with [g, u] = W_up x.

use super::Context;
use super::config::ModelConfig;
use super::parameters::{Builder, Init, Parameter};
use crate::engine::{Tape, Var};
use crate::error::Result;
use crate::ops::activation::{Activation, gated};
use crate::ops::linear::{linear, linears};

/// The layer's parameters and options.
#[derive(Debug)]
pub struct FeedForward {
    width: usize,
    activation: Activation,
    dropout: f64,
    proj_up: (Parameter, Option<Parameter>),
    proj_down: (Parameter, Option<Parameter>),
}

impl FeedForward {
    /// Asks for the parameters of one of `config.num_blocks` layers.
    pub fn new(config: &ModelConfig, builder: &mut Builder) -> FeedForward {
        let (dim, width) = (config.embedding_dim, config.feedforward_dim());
        let small = Init::Normal((2.0 / (5.0 * dim as f64)).sqrt());
        let wang = Init::Normal(2.0 / config.num_blocks as f64 / (dim as f64).sqrt());
        let mut projection = |name: &str, maps: &[usize], columns: usize, init: Init| {
            let (rows, maps) = (maps.iter().sum(), maps.iter().copied());
            let weight = builder.matrices(&format!("{name}.weight"), &[rows, columns], init, maps);
            let bias = config.feedforward.bias;
            (weight, bias.then(|| builder.parameter(&format!("{name}.bias"), &[rows], Init::Constant(0.0))))
        };
        let proj_up = projection("proj_up", &[width; 2], dim, small);
        let proj_down = projection("proj_down", &[dim], width, wang);
        let options = &config.feedforward;
        FeedForward { width, activation: options.act_fn, dropout: options.dropout, proj_up, proj_down }
    }

    /// x (B, S, D) -> y (B, S, D).
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, tape: &mut Tape, x: Var, context: &mut Context) -> Result<Var> {
        let halves = [0, self.width].map(|first| {
            let bias = self.proj_up.1.map(|b| b.rows(tape, first, self.width));
            (self.proj_up.0.rows(tape, first, self.width), bias)
        });
        let [gate, up] = linears(tape, x, halves)?;
        let product = gated(tape, gate, up, self.activation)?;
        let (weight, bias) = (self.proj_down.0.var(tape), self.proj_down.1.map(|b| b.var(tape)));
        let y = linear(tape, product, weight, bias)?;
        context.dropout(tape, y, self.dropout)
    }
}
