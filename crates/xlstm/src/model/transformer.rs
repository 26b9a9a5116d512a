//! The backbone of the Transformer baseline: positions, blocks, and the norm after the last.
//!
//! Its state is a window: the keys and values of the last `context_length` tokens of each
//! document, and how many tokens the document has had. A sequence may be cut anywhere, and a
//! state does not grow.

use super::backbone::{Backbone, in_a_row, numbered};
use crate::engine::{Shape, Tape, Var};
use crate::error::{Error, Result};
use crate::nn::transformer::block::{BiasedNorm, Shared};
use crate::nn::transformer::{GPT_DEVIATION, PositionKind, TransformerBlock};
use crate::nn::{Builder, Context, Init, ModelConfig, Parameter};
use crate::ops::learned_positions::learned_positions;
use crate::ops::positions::positions;
use crate::ops::rotary::angles;

/// The blocks of the Transformer.
#[derive(Debug)]
pub(super) struct TransformerStack {
    context_length: usize,
    /// Features of a head, and the base of its frequencies.
    rotary: Option<(usize, f64)>,
    /// Learned positions.
    wpe: Option<Parameter>,
    dropout: f64,
    blocks: Vec<TransformerBlock>,
    ln_f: BiasedNorm,
    cell_products: usize,
}

impl TransformerStack {
    /// Asks for the parameters of positions and all blocks.
    pub(super) fn new(config: &ModelConfig, builder: &mut Builder) -> TransformerStack {
        let (options, dim) = (&config.transformer, config.embedding_dim);
        let learned = options.positions == PositionKind::Learned;
        let wpe = learned.then(|| {
            let shape = [options.context_length, dim];
            builder.parameter_with_decay("wpe.weight", &shape, Init::Normal(GPT_DEVIATION), false)
        });
        let blocks = (0..config.num_blocks)
            .map(|i| builder.scope(&format!("h.{i}"), |b| TransformerBlock::new(config, b)))
            .collect();
        TransformerStack {
            context_length: options.context_length,
            rotary: (!learned).then_some((dim / options.num_heads, options.rotary_base)),
            wpe,
            dropout: config.dropout,
            blocks,
            ln_f: BiasedNorm::new("ln_f", dim, builder),
            // Scores and their sums, over half a context on average.
            cell_products: config.num_blocks * dim * options.context_length,
        }
    }
}

impl Backbone for TransformerStack {
    fn state_layout(&self, batch: usize) -> Vec<(String, Shape)> {
        let position = ("position".to_owned(), Shape::from([batch]));
        [position].into_iter().chain(numbered(&self.blocks, |block| block.state_layout(batch))).collect()
    }

    fn forward(
        &self,
        tape: &mut Tape,
        mut x: Var,
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)> {
        tape.scope("positions");
        let &[batch, length, _] = tape.shape(x).dims() else {
            return Err(Error::shape(format!("x is (batch, length, features), not {:?}", tape.shape(x))));
        };
        let (before, rest) = match state.and_then(|state| state.split_first()) {
            Some((before, rest)) => (Some(*before), Some(rest)),
            None => (None, None),
        };
        let places = positions(tape, [batch, length], self.context_length, before, context.marks)?;
        if let Some(wpe) = self.wpe {
            let weight = wpe.var(tape);
            x = learned_positions(tape, x, weight, places.position)?;
        }
        x = context.dropout(tape, x, self.dropout)?;
        let table = self.rotary.map(|(size, base)| angles(tape, places.position, size, base));
        let shared = Shared { places, angles: table.transpose()? };
        let parts = |block: &TransformerBlock| block.state_layout(1).len();
        let (x, after) = in_a_row(tape, &self.blocks, x.into(), rest, parts, |tape, block, x, own| {
            block.forward(tape, x, own, shared, context)
        })?;
        tape.scope("ln_f");
        let (_, y) = self.ln_f.forward(tape, x)?;
        Ok((y, [places.after].into_iter().chain(after).collect()))
    }

    fn cell_products(&self) -> usize {
        self.cell_products
    }

    fn looked_up(&self) -> Option<Parameter> {
        self.wpe
    }

    fn most_tokens(&self) -> Option<usize> {
        self.wpe.map(|_| self.context_length)
    }
}
