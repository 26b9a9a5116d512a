//! The backbone of the original's model: its blocks in a row.

use super::backbone::{Backbone, in_a_row, numbered};
use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::nn::original::OriginalBlock;
use crate::nn::{Builder, Context, ModelConfig};

/// The blocks of the original's model.
#[derive(Debug)]
pub struct OriginalStack {
    blocks: Vec<OriginalBlock>,
}

impl OriginalStack {
    /// Asks for the parameters of all blocks.
    pub fn new(config: &ModelConfig, builder: &mut Builder) -> OriginalStack {
        let block = |i: usize| builder.scope(&format!("blocks.{i}"), |b| OriginalBlock::new(config, b));
        OriginalStack { blocks: (0..config.num_blocks).map(block).collect() }
    }
}

impl Backbone for OriginalStack {
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
        let parts = |block: &OriginalBlock| block.state_layout(1).len();
        in_a_row(tape, &self.blocks, x, state, parts, |t, block, x, own| block.forward(t, x, own, context))
    }

    fn cell_products(&self) -> usize {
        self.blocks.iter().map(OriginalBlock::cell_products).sum()
    }
}
