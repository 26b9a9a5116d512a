//! Residual blocks in a row, and the norm after the last: features -> features.

use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::nn::block::layer_norm;
use crate::nn::{Block, Builder, Context, Init, ModelConfig, Parameter};

/// The stack of blocks of the small family.
#[derive(Debug)]
pub struct Stack {
    blocks: Vec<Block>,
    post_blocks_norm: Option<Parameter>,
}

impl Stack {
    /// Asks for the parameters of all blocks.
    pub fn new(config: &ModelConfig, builder: &mut Builder) -> Stack {
        let kinds = config.block_kinds().into_iter().enumerate();
        let blocks = kinds
            .map(|(i, kind)| builder.scope(&format!("blocks.{i}"), |b| Block::new(config, kind, i, b)))
            .collect();
        let post_blocks_norm = config.add_post_blocks_norm.then(|| {
            builder.parameter("post_blocks_norm.weight", &[config.embedding_dim], Init::Constant(0.0))
        });
        Stack { blocks, post_blocks_norm }
    }

    /// Names and shapes of the state of `batch` sequences, such as `blocks.0.mlstm.c`.
    pub fn state_layout(&self, batch: usize) -> Vec<(String, Shape)> {
        let named = |(i, block): (usize, &Block)| {
            let parts = block.state_layout(batch).into_iter();
            parts.map(move |(name, shape)| (format!("blocks.{i}.{name}"), shape)).collect::<Vec<_>>()
        };
        self.blocks.iter().enumerate().flat_map(named).collect()
    }

    /// x (B, S, D) and the state before it, in the order of the layout -> y (B, S, D) and
    /// the state after it.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(
        &self,
        tape: &mut Tape,
        mut x: Var,
        mut state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)> {
        let mut after = Vec::new();
        for (i, block) in self.blocks.iter().enumerate() {
            tape.scope(&format!("blocks.{i}"));
            let (own, rest) = match state {
                Some(state) => {
                    let (own, rest) = state.split_at(block.state_layout(1).len());
                    (Some(own), Some(rest))
                }
                None => (None, None),
            };
            let (y, own) = block.forward(tape, x, own, context)?;
            x = y;
            state = rest;
            after.extend(own);
        }
        tape.scope("post_blocks_norm");
        let y = match self.post_blocks_norm {
            Some(weight) => layer_norm(tape, x, weight)?,
            None => x,
        };
        Ok((y, after))
    }
}
