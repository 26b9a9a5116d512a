//! What lies between the embedding and the head of a language model.

use std::fmt::{Debug, Display};

use super::large::LargeStack;
use super::lstm::LstmStack;
use super::original::OriginalStack;
use super::stack::Stack;
use super::transformer::TransformerStack;
use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::nn::{Builder, Context, Family, ModelConfig, Parameter};

/// Layers that map features to features and carry a state, whatever the family.
pub trait Backbone: Debug + Send + Sync {
    /// Names and shapes of the state of `batch` sequences, such as `blocks.0.mlstm.c`.
    fn state_layout(&self, batch: usize) -> Vec<(String, Shape)>;

    /// x (B, S, D) and the state before it, in the order of the layout -> y (B, S, D) and the
    /// state after it.
    ///
    /// # Errors
    /// When shapes do not fit.
    fn forward(
        &self,
        tape: &mut Tape,
        x: Var,
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)>;

    /// Multiplications that a token costs besides those with weight matrices.
    fn cell_products(&self) -> usize;

    /// The matrix of which rows are looked up, where there is one.
    fn looked_up(&self) -> Option<Parameter> {
        None
    }

    /// The most tokens of a document, where there is such a limit.
    fn most_tokens(&self) -> Option<usize> {
        None
    }
}

/// Asks for the parameters of the backbone that a configuration describes.
pub(super) fn backbone_of(config: &ModelConfig, builder: &mut Builder) -> Box<dyn Backbone> {
    match config.family {
        Family::Small => Box::new(Stack::new(config, builder)),
        Family::Large => Box::new(LargeStack::new(config, builder)),
        Family::Original => Box::new(OriginalStack::new(config, builder)),
        Family::Lstm => Box::new(LstmStack::new(config, builder)),
        Family::Transformer => Box::new(TransformerStack::new(config, builder)),
    }
}

/// Runs blocks one after the other, each with its part of the state: `forward` takes a block,
/// what flows through them and that part, and `parts` says how many values it has.
pub(super) fn in_a_row<B, X>(
    tape: &mut Tape,
    blocks: &[B],
    mut x: X,
    mut state: Option<&[Var]>,
    parts: impl Fn(&B) -> usize,
    mut forward: impl FnMut(&mut Tape, &B, X, Option<&[Var]>) -> Result<(X, Vec<Var>)>,
) -> Result<(X, Vec<Var>)> {
    let mut after = Vec::new();
    for (i, block) in blocks.iter().enumerate() {
        tape.scope(&format!("blocks.{i}"));
        let (own, rest) = match state {
            Some(state) => {
                let (own, rest) = state.split_at(parts(block));
                (Some(own), Some(rest))
            }
            None => (None, None),
        };
        let (y, own) = forward(tape, block, x, own)?;
        x = y;
        state = rest;
        after.extend(own);
    }
    Ok((x, after))
}

/// The layout of blocks in a row from that of each.
pub(super) fn numbered<B, N: Display>(
    blocks: &[B],
    layout: impl Fn(&B) -> Vec<(N, Shape)>,
) -> Vec<(String, Shape)> {
    let named = |(i, block): (usize, &B)| {
        let parts = layout(block).into_iter();
        parts.map(move |(name, shape)| (format!("blocks.{i}.{name}"), shape)).collect::<Vec<_>>()
    };
    blocks.iter().enumerate().flat_map(named).collect()
}
