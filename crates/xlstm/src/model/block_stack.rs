//! Blocks for sequences that are not words: features -> features.

use super::backbone::{Backbone, backbone_of};
use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::nn::config::at_least_one;
use crate::nn::{Builder, Context, Family, Init, ModelConfig, Parameter};
use crate::ops::linear::linear;

/// The blocks of a configuration behind an input projection, which is there where the features
/// are not as wide as the blocks.
#[derive(Debug)]
pub struct BlockStack {
    input: Option<(Parameter, Parameter)>,
    backbone: Box<dyn Backbone>,
    width: usize,
}

impl BlockStack {
    /// Asks for the parameters of a stack that reads `input_size` features: `input.weight` (D, I)
    /// and `input.bias` (D) where I differs from D, and those of the blocks.
    ///
    /// # Errors
    /// When the configuration does not fit together; its vocabulary is not looked at.
    pub fn new(config: &ModelConfig, input_size: usize, builder: &mut Builder) -> Result<BlockStack> {
        config.validate()?;
        at_least_one("input_size", input_size)?;
        let width = config.embedding_dim;
        let input = (input_size != width).then(|| projection(builder, "input", width, input_size));
        let backbone = builder.scope("stack", |b| backbone_of(config, b));
        let width = match config.family {
            Family::Lstm => config.lstm.hidden_dim(width),
            _ => width,
        };
        Ok(BlockStack { input, backbone, width })
    }

    /// Width of the features that come out.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The most rows that a sequence may have, where there is such a limit.
    pub fn most_tokens(&self) -> Option<usize> {
        self.backbone.most_tokens()
    }

    /// Names and shapes of the state of `batch` sequences.
    pub fn state_layout(&self, batch: usize) -> Vec<(String, Shape)> {
        self.backbone.state_layout(batch)
    }

    /// x (B, S, I) and the state before it, in the order of the layout -> y (B, S, D) and the
    /// state after it.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(
        &self,
        tape: &mut Tape,
        x: Var,
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)> {
        tape.scope("input");
        let x = self.input.map_or(Ok(x), |input| project(tape, x, input))?;
        self.backbone.forward(tape, x, state, context)
    }
}

/// Asks for `name.weight` (rows, columns), small and normal, and `name.bias` (rows), zero, of the
/// projection of the input or the head.
pub(super) fn projection(
    builder: &mut Builder,
    name: &str,
    rows: usize,
    columns: usize,
) -> (Parameter, Parameter) {
    let small = Init::Normal((2.0 / (5.0 * columns as f64)).sqrt());
    let weight = builder.parameter(&format!("{name}.weight"), &[rows, columns], small);
    let bias = builder.parameter(&format!("{name}.bias"), &[rows], Init::Constant(0.0));
    [weight, bias].into_iter().for_each(|parameter| builder.at_border(parameter));
    (weight, bias)
}

/// y = x W^T + b.
pub(super) fn project(tape: &mut Tape, x: Var, (weight, bias): (Parameter, Parameter)) -> Result<Var> {
    let (weight, bias) = (weight.var(tape), bias.var(tape));
    linear(tape, x, weight, Some(bias))
}
