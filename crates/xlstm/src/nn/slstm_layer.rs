//! The sLSTM layer of the small family (its up-projection is the feed-forward layer that
//! follows it in the block):
//!
//! ```text
//! c = SiLU(conv(x))                         (c = x without a convolution)
//! ~i = W_fgate c, ~f = W_igate c, ~z = W_zgate x, ~o = W_ogate x      (a block a head)
//! y = norm(dropout(sLSTM(~i, ~f, ~z, ~o)))            (a layer norm a head)
//! ```
//!
//! The parameter called `fgate` drives the input gate and `igate` the forget gate: so the
//! original was trained, and so weights are exchanged with it.

use super::Context;
use super::config::ModelConfig;
use super::config::{BiasInit, RecurrentWeightInit};
use super::parameters::{Builder, Init, Parameter};
use crate::cell::slstm::{CellFunction, SlstmConfig, SlstmState, slstm};
use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::ops::causal_conv::causal_conv;
use crate::ops::headwise::headwise_full;
use crate::ops::norm::{Norm, NormKind, norm};

/// The layer's parameters and options.
#[derive(Debug)]
pub struct SlstmLayer {
    dim: usize,
    kernel: usize,
    dropout: f64,
    cell: SlstmConfig,
    conv: Option<(Parameter, Parameter)>,
    /// In the order of the cell: ~i, ~f, ~z, ~o.
    gates: [Parameter; 4],
    recurrent: Parameter,
    bias: Parameter,
    group_norm: Parameter,
}

/// A causal convolution's weight (E, 1, K) and bias, as PyTorch starts them.
pub(super) fn conv_parameters(builder: &mut Builder, width: usize, kernel: usize) -> (Parameter, Parameter) {
    let init = Init::Uniform(1.0 / (kernel as f64).sqrt());
    builder.scope("conv1d.conv", |builder| {
        let weight = builder.parameter("weight", &[width, 1, kernel], init.clone());
        (weight, builder.parameter("bias", &[width], init))
    })
}

impl SlstmLayer {
    /// Asks for the parameters of the layer in block `index`.
    pub fn new(config: &ModelConfig, index: usize, builder: &mut Builder) -> SlstmLayer {
        let options = &config.slstm;
        let (dim, heads, kernel) = (config.embedding_dim, options.num_heads, options.conv1d_kernel_size);
        let size = dim / heads;
        let small = Init::Normal((2.0 / (5.0 * dim as f64)).sqrt());
        let standard = Init::Uniform(1.0 / (dim as f64).sqrt());
        let conv = (kernel > 0).then(|| conv_parameters(builder, dim, kernel));
        let mut gate = |name: &str| {
            let rows = std::iter::repeat_n(size, heads);
            builder.matrices(&format!("{name}.weight"), &[heads, size, size], small.clone(), rows)
        };
        let (fgate, igate) = (gate("fgate"), gate("igate"));
        let gates = [fgate, igate, gate("zgate"), gate("ogate")];
        let recurrent = match options.recurrent_weight_init {
            RecurrentWeightInit::Zeros => Init::Constant(0.0),
            RecurrentWeightInit::Standard => standard.clone(),
        };
        let bias = match options.bias_init {
            BiasInit::Zeros => Init::Constant(0.0),
            BiasInit::Standard => standard,
            BiasInit::SmallInit => forget_bias(heads, size, |j| 3.0 + 3.0 * j),
            BiasInit::PowerlawBlockdependent => {
                let depth = index as f64 / (config.num_blocks.max(2) - 1) as f64;
                forget_bias(heads, size, |j| 5.0 - 12.0 * j.powf(0.3 + 1.3 * depth))
            }
        };
        let (recurrent, bias) = builder.scope("slstm_cell", |builder| {
            let rows = std::iter::repeat_n(size, 4 * heads);
            let weight = builder.matrices("_recurrent_kernel_", &[heads, 4 * size, size], recurrent, rows);
            (weight, builder.parameter("_bias_", &[4 * dim], bias))
        });
        let group_norm = builder.parameter("group_norm.weight", &[dim], Init::Constant(0.0));
        let cell = SlstmConfig {
            heads,
            function: options.function,
            input_gate: options.input_gate,
            forget_gate: options.forget_gate,
            gradient_cut: options.gradient_recurrent_cut,
            gradient_clip: options.gradient_recurrent_clipval,
        };
        SlstmLayer { dim, kernel, dropout: config.dropout, cell, conv, gates, recurrent, bias, group_norm }
    }

    /// Names and shapes of the state of `batch` sequences.
    pub fn state_layout(&self, batch: usize) -> Vec<(&'static str, Shape)> {
        let names: &[&str] = match self.cell.function {
            CellFunction::Slstm => &["slstm.h", "slstm.c", "slstm.n", "slstm.m"],
            CellFunction::Lstm => &["lstm.h", "lstm.c"],
        };
        let mut layout: Vec<(&str, Shape)> =
            names.iter().map(|name| (*name, [batch, self.dim].into())).collect();
        if self.kernel > 0 {
            layout.push(("conv.window", [batch, self.kernel - 1, self.dim].into()));
        }
        layout
    }

    /// x (B, S, D) and the state before it -> y (B, S, D) and the state after it.
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
        let parts = self.state_layout(1).len() - usize::from(self.kernel > 0);
        let (c, window) = match self.conv {
            Some((weight, bias)) => {
                let (weight, bias) = (weight.var(tape), bias.var(tape));
                let before = state.map(|s| s[parts]);
                let (c, window) = causal_conv(tape, x, weight, Some(bias), before, context.marks, true)?;
                (c, Some(window))
            }
            None => (x, None),
        };
        let mut gates = [x; 4];
        for (gate, (input, parameter)) in gates.iter_mut().zip([c, c, x, x].into_iter().zip(self.gates)) {
            let weight = parameter.var(tape);
            *gate = headwise_full(tape, input, weight, None)?;
        }
        let (recurrent, bias) = (self.recurrent.var(tape), self.bias.var(tape));
        let before = state.map(|s| SlstmState {
            h: s[0],
            c: s[1],
            n: s[..parts].get(2).copied(),
            m: s[..parts].get(3).copied(),
        });
        let (h, after) = slstm(tape, &self.cell, gates, recurrent, bias, before, context.marks)?;
        let h = context.dropout(tape, h, self.dropout)?;
        let weight = self.group_norm.var(tape);
        let options = Norm { kind: NormKind::Layer, groups: self.cell.heads, eps: 1e-5, unit_offset: true };
        let y = norm(tape, h, weight, None, options)?;
        Ok((y, [Some(after.h), Some(after.c), after.n, after.m, window].into_iter().flatten().collect()))
    }
}

/// The gate-major bias (4 D) that is `start(j / (DH - 1))` for unit j of each head's forget
/// gate, and 0 elsewhere.
fn forget_bias(heads: usize, size: usize, start: impl Fn(f64) -> f64) -> Init {
    let width = (size.max(2) - 1) as f64;
    let mut bias = vec![0.0; 4 * heads * size];
    for (i, value) in bias[heads * size..2 * heads * size].iter_mut().enumerate() {
        *value = start((i % size) as f64 / width);
    }
    Init::Values(bias)
}
