//! The cells of one block, one after the other, each with what makes its gates of its input x
//! (B, S, I), and dropout between them:
//!
//! ```text
//! sLSTM:  ~i, ~f, ~z, ~o = W_ih x + b            and, within the cell, W_hh h (a block a head)
//! mLSTM:  ~i, ~f, ~o = W_ih x + b                ~i and ~f one number a head
//!         q, k, v = W_q x + b_q, W_k x + b_k, W_v x + b_v
//!         h = sigmoid(~o) ∘ mLSTM(q, k, v, ~i, ~f)
//! ```

use super::config::{LstmType, OriginalConfig};
use crate::cell::mlstm::{Form, MlstmConfig, MlstmState, mlstm};
use crate::cell::slstm::{CellFunction, SlstmConfig, SlstmState, slstm};
use crate::cell::{ForgetGate, InputGate};
use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::nn::Context;
use crate::nn::config::ModelConfig;
use crate::nn::parameters::{Builder, Init, Parameter};
use crate::ops::activation::{Activation, gated};
use crate::ops::gates::gates;
use crate::ops::headwise::headwise_full;
use crate::ops::linear::linear;

/// A weight and a bias, which start as PyTorch's linear layers do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Linear {
    weight: Parameter,
    bias: Parameter,
}

impl Linear {
    pub(super) fn new(builder: &mut Builder, name: &str, outputs: usize, inputs: usize) -> Linear {
        let init = Init::Uniform(1.0 / (inputs as f64).sqrt());
        builder.scope(name, |builder| {
            let weight = builder.matrices("weight", &[outputs, inputs], init.clone(), [outputs]);
            Linear { weight, bias: builder.parameter("bias", &[outputs], init) }
        })
    }

    pub(super) fn forward(&self, tape: &mut Tape, x: Var) -> Result<Var> {
        let (weight, bias) = (self.weight.var(tape), self.bias.var(tape));
        linear(tape, x, weight, Some(bias))
    }
}

/// One cell.
// One a layer: its size does not matter.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
enum Cell {
    Slstm { options: SlstmConfig, weight_ih: Parameter, weight_hh: Parameter, bias: Parameter },
    Mlstm { options: MlstmConfig, weight_ih: Parameter, bias: Parameter, qkv: [Linear; 3] },
}

/// The uniform distribution that keeps variance through a matrix of this shape (Glorot and Bengio).
fn xavier(rows: usize, columns: usize) -> Init {
    Init::Uniform((6.0 / (rows + columns) as f64).sqrt())
}

impl Cell {
    /// Asks for the parameters of a cell of this width over `inputs` features. Matrices start as
    /// the original's, biases at zero, but that of the forget gate from 3 up to 6: over the units
    /// of a head or over the heads. Only then do memories last from the first step on. The mLSTM's
    /// input and forget gates start without weights, as in the other families.
    fn new(config: &OriginalConfig, inputs: usize, builder: &mut Builder) -> Cell {
        let (hidden, heads) = (config.hidden_size, config.num_heads);
        let zeros = |count: usize| (count, Init::Constant(0.0));
        match config.lstm_type {
            LstmType::Slstm => {
                let dim = hidden / heads;
                let (shape, start) = ([4 * hidden, inputs], xavier(4 * hidden, inputs));
                let weight_ih = builder.matrices("weight_ih", &shape, start, [hidden; 4]);
                let (shape, start) = ([heads, 4 * dim, dim], xavier(4 * dim, dim));
                let rows = std::iter::repeat_n(dim, 4 * heads);
                let weight_hh = builder.matrices("weight_hh", &shape, start, rows);
                let forget = (0..heads).map(|_| (dim, Init::steps(3.0, 6.0, dim)));
                let runs = [zeros(hidden)].into_iter().chain(forget).chain([zeros(2 * hidden)]);
                let bias = builder.parameter("bias", &[4 * hidden], Init::rows(runs));
                let options = SlstmConfig {
                    heads,
                    function: CellFunction::Slstm,
                    input_gate: InputGate::Exponential,
                    forget_gate: ForgetGate::Sigmoid,
                    gradient_cut: false,
                    gradient_clip: None,
                };
                Cell::Slstm { options, weight_ih, weight_hh, bias }
            }
            LstmType::Mlstm => {
                let rows = 2 * heads + hidden;
                let output = (hidden * inputs, xavier(hidden, inputs));
                let runs = [zeros(2 * heads * inputs), output].into_iter();
                // No matrices to the optimizer: it begins with gates, a row a head.
                let weight_ih = builder.parameter("weight_ih", &[rows, inputs], Init::rows(runs));
                let runs = [zeros(heads), (heads, Init::steps(3.0, 6.0, heads)), zeros(hidden)];
                let bias = builder.parameter("bias", &[rows], Init::rows(runs.into_iter()));
                let qkv = ["W_q", "W_k", "W_v"].map(|name| Linear::new(builder, name, hidden, inputs));
                let options = MlstmConfig {
                    heads,
                    input_gate: InputGate::Exponential,
                    forget_gate: ForgetGate::Sigmoid,
                    normalize: true,
                    eps: 1e-6,
                    form: Form::Chunkwise(config.chunk_size),
                };
                Cell::Mlstm { options, weight_ih, bias, qkv }
            }
        }
    }

    /// x (B, S, I) and the state before it -> h (B, S, H) and the state after it.
    fn forward(
        &self,
        tape: &mut Tape,
        x: Var,
        state: Option<&[Var]>,
        context: &Context,
    ) -> Result<(Var, Vec<Var>)> {
        match self {
            Cell::Slstm { options, weight_ih, weight_hh, bias } => {
                let hidden = bias.len() / 4;
                let mut gates = [x; 4];
                for (i, gate) in gates.iter_mut().enumerate() {
                    let weight = weight_ih.block(tape, i * hidden, hidden);
                    *gate = headwise_full(tape, x, weight, None)?;
                }
                let (recurrent, bias) = (weight_hh.var(tape), bias.var(tape));
                let before = state.map(|s| SlstmState { h: s[0], c: s[1], n: Some(s[2]), m: Some(s[3]) });
                let (h, after) = slstm(tape, options, gates, recurrent, bias, before, context.marks)?;
                Ok((h, [Some(after.h), Some(after.c), after.n, after.m].into_iter().flatten().collect()))
            }
            Cell::Mlstm { options, weight_ih, bias, qkv } => {
                let heads = options.heads;
                let maps = [0, heads]
                    .map(|first| (weight_ih.rows(tape, first, heads), Some(bias.rows(tape, first, heads))));
                let gates = gates(tape, x, maps, None)?;
                let hidden = bias.len() - 2 * heads;
                let weight = weight_ih.rows(tape, 2 * heads, hidden);
                let bias = bias.rows(tape, 2 * heads, hidden);
                let o = linear(tape, x, weight, Some(bias))?;
                let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(|map| map.forward(tape, x));
                let before = state.map(|s| MlstmState { c: s[0], n: s[1], m: s[2] });
                let (h, after) = mlstm(tape, options, q?, k?, v?, gates.into(), before, context.marks)?;
                let h = gated(tape, o, h, Activation::Sigmoid)?;
                Ok((h, vec![after.c, after.n, after.m]))
            }
        }
    }
}

/// The cells of one block in one direction.
#[derive(Debug)]
pub(super) struct Cells {
    layers: Vec<Cell>,
    hidden: usize,
    dropout: f64,
}

impl Cells {
    /// Asks for the parameters: `layers.{l}.…` over `inputs` features.
    pub(super) fn new(config: &ModelConfig, inputs: usize, builder: &mut Builder) -> Cells {
        let (options, dropout) = (&config.original, config.dropout);
        let hidden = options.hidden_size;
        let layer = |l: usize| {
            let inputs = if l == 0 { inputs } else { hidden };
            builder.scope(&format!("layers.{l}"), |builder| Cell::new(options, inputs, builder))
        };
        Cells { layers: (0..options.num_layers).map(layer).collect(), hidden, dropout }
    }

    /// Names and shapes of the state of `batch` sequences.
    pub(super) fn state_layout(&self, batch: usize) -> Vec<(String, Shape)> {
        let part = |cell: &Cell| -> Vec<(&'static str, Shape)> {
            match cell {
                Cell::Slstm { .. } => ["slstm.h", "slstm.c", "slstm.n", "slstm.m"]
                    .map(|name| (name, [batch, self.hidden].into()))
                    .into(),
                Cell::Mlstm { options, .. } => {
                    let (heads, size) = (options.heads, self.hidden / options.heads);
                    vec![
                        ("mlstm.c", [batch, heads, size, size].into()),
                        ("mlstm.n", [batch, heads, size].into()),
                        ("mlstm.m", [batch, heads].into()),
                    ]
                }
            }
        };
        let named = |(l, cell): (usize, &Cell)| {
            let parts = part(cell).into_iter();
            parts.map(move |(name, shape)| (format!("layers.{l}.{name}"), shape)).collect::<Vec<_>>()
        };
        self.layers.iter().enumerate().flat_map(named).collect()
    }

    /// Multiplications of a token that are not those of weights.
    pub(super) fn products(&self) -> usize {
        let of = |cell: &Cell| match cell {
            Cell::Slstm { .. } => 0,
            // C k v^T and q C, and half a chunk of scores and their sums.
            Cell::Mlstm { options, .. } => {
                let chunk = if let Form::Chunkwise(size) = options.form { size } else { 0 };
                2 * self.hidden * (self.hidden / options.heads) + self.hidden * chunk
            }
        };
        self.layers.iter().map(of).sum()
    }

    /// x (B, S, I) and the state before it -> h (B, S, H) of the last cell and the state after it.
    pub(super) fn forward(
        &self,
        tape: &mut Tape,
        mut x: Var,
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)> {
        let mut after = Vec::new();
        let parts = self.state_layout(1).len() / self.layers.len();
        for (l, cell) in self.layers.iter().enumerate() {
            if l > 0 {
                x = context.dropout(tape, x, self.dropout)?;
            }
            let own = state.map(|state| &state[l * parts..(l + 1) * parts]);
            let (h, own) = cell.forward(tape, x, own, context)?;
            x = h;
            after.extend(own);
        }
        Ok((x, after))
    }
}
