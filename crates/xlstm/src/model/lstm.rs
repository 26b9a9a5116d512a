//! The backbone of the LSTM baseline: its layers, with dropout between them.

use super::backbone::{Backbone, in_a_row, numbered};
use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::nn::lstm::LstmLayer;
use crate::nn::{Builder, Context, ModelConfig};

/// The layers of the LSTM.
#[derive(Debug)]
pub(super) struct LstmStack {
    layers: Vec<LstmLayer>,
    dropout: f64,
}

impl LstmStack {
    /// Asks for the parameters of all layers.
    pub(super) fn new(config: &ModelConfig, builder: &mut Builder) -> LstmStack {
        let layers = (0..config.num_blocks).map(|i| LstmLayer::new(config, i, builder)).collect();
        LstmStack { layers, dropout: config.dropout }
    }
}

impl Backbone for LstmStack {
    fn state_layout(&self, batch: usize) -> Vec<(String, Shape)> {
        numbered(&self.layers, |layer| layer.state_layout(batch))
    }

    fn forward(
        &self,
        tape: &mut Tape,
        x: Var,
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)> {
        let (parts, mut last) = (|layer: &LstmLayer| layer.state_layout(1).len(), self.layers.len());
        in_a_row(tape, &self.layers, x, state, parts, |tape, layer, x, own| {
            let (h, after) = layer.forward(tape, x, own, context)?;
            last -= 1;
            let h = if last > 0 { context.dropout(tape, h, self.dropout)? } else { h };
            Ok((h, after))
        })
    }

    /// All are with weight matrices, the recurrent ones among them.
    fn cell_products(&self) -> usize {
        0
    }
}
