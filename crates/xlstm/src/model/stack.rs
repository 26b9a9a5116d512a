//! Residual blocks in a row, and the norm after the last: features -> features.

use super::backbone::{Backbone, in_a_row, numbered};
use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::nn::block::layer_norm;
use crate::nn::{Block, BlockKind, Builder, Context, Init, ModelConfig, Parameter};

/// The stack of blocks of the small family.
#[derive(Debug)]
pub struct Stack {
    blocks: Vec<Block>,
    post_blocks_norm: Option<Parameter>,
    cell_products: usize,
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
        let (inner, mlstm) = (config.inner_dim(), &config.mlstm);
        let kinds = config.block_kinds();
        let cell_products = kinds.iter().map(|kind| match kind {
            // C k v^T and q C, and half a chunk of scores and their sums.
            BlockKind::Mlstm => 2 * inner * (inner / mlstm.num_heads) + inner * mlstm.chunk_size,
            BlockKind::Slstm => 0,
        });
        Stack { blocks, post_blocks_norm, cell_products: cell_products.sum() }
    }
}

impl Backbone for Stack {
    fn state_layout(&self, batch: usize) -> Vec<(String, Shape)> {
        numbered(&self.blocks, |block| block.state_layout(batch))
    }

    fn forward(
        &self,
        tape: &mut Tape,
        x: Var,
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)> {
        let parts = |block: &Block| block.state_layout(1).len();
        let (x, after) = in_a_row(tape, &self.blocks, x.into(), state, parts, |t, block, x, own| {
            block.forward(t, x, own, context)
        })?;
        tape.scope("post_blocks_norm");
        let y = match self.post_blocks_norm {
            Some(weight) => layer_norm(tape, x, weight)?.1,
            None => x.value(tape)?,
        };
        Ok((y, after))
    }

    fn cell_products(&self) -> usize {
        self.cell_products
    }
}
