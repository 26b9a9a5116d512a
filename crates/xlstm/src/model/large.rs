//! The backbone of the large family: its blocks in a row, and the norm after the last.

use super::backbone::{Backbone, in_a_row, numbered};
use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::nn::large::LargeBlock;
use crate::nn::large::block::ScaledNorm;
use crate::nn::{Builder, Context, ModelConfig};
use crate::ops::norm::NormKind;

/// The blocks of the large family.
#[derive(Debug)]
pub(super) struct LargeStack {
    blocks: Vec<LargeBlock>,
    out_norm: Option<ScaledNorm>,
    cell_products: usize,
}

impl LargeStack {
    /// Asks for the parameters of all blocks.
    pub(super) fn new(config: &ModelConfig, builder: &mut Builder) -> LargeStack {
        let (options, dim) = (&config.large, config.embedding_dim);
        let blocks = (0..config.num_blocks)
            .map(|i| builder.scope(&format!("blocks.{i}"), |b| LargeBlock::new(config, b)))
            .collect();
        let rms = NormKind::RootMeanSquare;
        let out_norm =
            options.add_out_norm.then(|| ScaledNorm::new(options, ("out_norm", dim), rms, 1, builder));
        let [qk, v] = options.head_dims(dim);
        // C k v^T and q C, and half a chunk of scores and their sums.
        let cell = 2 * qk * v / options.num_heads + (qk + v) * options.chunk_size / 2;
        LargeStack { blocks, out_norm, cell_products: config.num_blocks * cell }
    }
}

impl Backbone for LargeStack {
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
        let parts = |block: &LargeBlock| block.state_layout(1).len();
        let (x, after) = in_a_row(tape, &self.blocks, x.into(), state, parts, |t, block, x, own| {
            block.forward(t, x, own, context)
        })?;
        tape.scope("out_norm");
        let y = match self.out_norm {
            Some(norm) => norm.forward(tape, x)?.1,
            None => x.value(tape)?,
        };
        Ok((y, after))
    }

    fn cell_products(&self) -> usize {
        self.cell_products
    }
}
