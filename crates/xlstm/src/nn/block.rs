//! The residual blocks: x + layer(norm(x)), and after an sLSTM layer x + ffn(norm(x)).

use super::config::{BlockKind, ModelConfig};
use super::feed_forward::FeedForward;
use super::mlstm_layer::MlstmLayer;
use super::parameters::{Builder, Init, Parameter};
use super::slstm_layer::SlstmLayer;
use super::{Context, Residual};
use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::ops::norm::{Norm, NormKind};

/// The family's layer norm: weights stored as w - 1, no bias.
const LAYER_NORM: Norm = Norm { kind: NormKind::Layer, groups: 1, eps: 1e-5, unit_offset: true };

/// One residual block.
#[derive(Debug)]
pub struct Block {
    xlstm_norm: Parameter,
    layer: Layer,
}

// One a block: its size does not matter.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
enum Layer {
    Mlstm(MlstmLayer),
    Slstm { layer: SlstmLayer, ffn_norm: Parameter, ffn: FeedForward },
}

impl Block {
    /// Asks for the parameters of block `index`.
    pub fn new(config: &ModelConfig, kind: BlockKind, index: usize, builder: &mut Builder) -> Block {
        let norm_weight = |builder: &mut Builder, name: &str| {
            builder.parameter(name, &[config.embedding_dim], Init::Constant(0.0))
        };
        let xlstm_norm = norm_weight(builder, "xlstm_norm.weight");
        let layer = match kind {
            BlockKind::Mlstm => Layer::Mlstm(builder.scope("xlstm", |b| MlstmLayer::new(config, b))),
            BlockKind::Slstm => {
                let layer = builder.scope("xlstm", |b| SlstmLayer::new(config, index, b));
                let ffn_norm = norm_weight(builder, "ffn_norm.weight");
                Layer::Slstm { layer, ffn_norm, ffn: builder.scope("ffn", |b| FeedForward::new(config, b)) }
            }
        };
        Block { xlstm_norm, layer }
    }

    /// Names and shapes of the state of `batch` sequences.
    pub fn state_layout(&self, batch: usize) -> Vec<(&'static str, Shape)> {
        match &self.layer {
            Layer::Mlstm(layer) => layer.state_layout(batch),
            Layer::Slstm { layer, .. } => layer.state_layout(batch),
        }
    }

    /// x (B, S, D) and the state before it -> y (B, S, D) and the state after it.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(
        &self,
        tape: &mut Tape,
        x: Residual,
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Residual, Vec<Var>)> {
        let (x, normed) = layer_norm(tape, x, self.xlstm_norm)?;
        match &self.layer {
            Layer::Mlstm(layer) => {
                let (y, state) = layer.forward(tape, normed, state, context)?;
                Ok((Residual::sum_of(x, y), state))
            }
            Layer::Slstm { layer, ffn_norm, ffn } => {
                let (y, state) = layer.forward(tape, normed, state, context)?;
                let (x, normed) = layer_norm(tape, Residual::sum_of(x, y), *ffn_norm)?;
                let y = ffn.forward(tape, normed, context)?;
                Ok((Residual::sum_of(x, y), state))
            }
        }
    }
}

/// The stream as one value, and the family's layer norm of it with this weight.
pub(crate) fn layer_norm(tape: &mut Tape, x: Residual, weight: Parameter) -> Result<(Var, Var)> {
    let weight = weight.var(tape);
    x.normed(tape, weight, None, LAYER_NORM)
}
