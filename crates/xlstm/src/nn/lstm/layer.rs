//! One LSTM layer, with PyTorch's parameters:
//!
//! ```text
//! ~i, ~f, ~z, ~o = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh        (four blocks of rows)
//! c_t = σ(~f) c_{t-1} + σ(~i) tanh(~z)          h_t = σ(~o) tanh(c_t)
//! ```

use crate::cell::slstm::{CellFunction, SlstmConfig, SlstmState, slstm};
use crate::cell::{ForgetGate, InputGate};
use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::nn::Context;
use crate::nn::config::ModelConfig;
use crate::nn::parameters::{Builder, Init, Parameter};
use crate::ops::headwise::headwise_full;

/// One layer of the LSTM.
#[derive(Debug)]
pub struct LstmLayer {
    hidden: usize,
    weight_ih: Parameter,
    weight_hh: Parameter,
    bias_ih: Parameter,
    bias_hh: Parameter,
}

impl LstmLayer {
    /// Asks for the parameters of layer `index`.
    pub fn new(config: &ModelConfig, index: usize, builder: &mut Builder) -> LstmLayer {
        let hidden = config.lstm.hidden_dim(config.embedding_dim);
        let inputs = if index == 0 { config.embedding_dim } else { hidden };
        let start = Init::Uniform(1.0 / (hidden as f64).sqrt());
        // Gates are in the order i, f, z, o.
        let bias = |forget: Option<f64>| match forget {
            Some(bias) => Init::rows(
                [(hidden, start.clone()), (hidden, Init::Constant(bias)), (2 * hidden, start.clone())]
                    .into_iter(),
            ),
            None => start.clone(),
        };
        let forget = config.lstm.forget_bias;
        let name = |name: &str| format!("{name}_l{index}");
        let mut weight = |name: &str, inputs: usize| {
            builder.matrices(name, &[4 * hidden, inputs], start.clone(), [hidden; 4])
        };
        let (weight_ih, weight_hh) = (weight(&name("weight_ih"), inputs), weight(&name("weight_hh"), hidden));
        let mut parameter = |name: &str, init: Init| builder.parameter(name, &[4 * hidden], init);
        LstmLayer {
            hidden,
            weight_ih,
            weight_hh,
            bias_ih: parameter(&name("bias_ih"), bias(forget)),
            bias_hh: parameter(&name("bias_hh"), bias(forget.map(|_| 0.0))),
        }
    }

    /// Names and shapes of the state of `batch` sequences.
    pub fn state_layout(&self, batch: usize) -> Vec<(&'static str, Shape)> {
        vec![("lstm.h", [batch, self.hidden].into()), ("lstm.c", [batch, self.hidden].into())]
    }

    /// x (B, S, inputs) and the state before it -> h (B, S, H) and the state after it.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(
        &self,
        tape: &mut Tape,
        x: Var,
        state: Option<&[Var]>,
        context: &Context,
    ) -> Result<(Var, Vec<Var>)> {
        let mut gates = [x; 4];
        for (i, gate) in gates.iter_mut().enumerate() {
            let weight = self.weight_ih.block(tape, i * self.hidden, self.hidden);
            let bias = self.bias_ih.rows(tape, i * self.hidden, self.hidden);
            *gate = headwise_full(tape, x, weight, Some(bias))?;
        }
        let (recurrent, bias) = (self.weight_hh.block(tape, 0, 4 * self.hidden), self.bias_hh.var(tape));
        let cell = SlstmConfig {
            heads: 1,
            function: CellFunction::Lstm,
            input_gate: InputGate::Sigmoid,
            forget_gate: ForgetGate::Sigmoid,
            gradient_cut: false,
            gradient_clip: None,
        };
        let before = state.map(|s| SlstmState { h: s[0], c: s[1], n: None, m: None });
        let (h, after) = slstm(tape, &cell, gates, recurrent, bias, before, context.marks)?;
        Ok((h, vec![after.h, after.c]))
    }
}
