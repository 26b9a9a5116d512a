//! The block of the large family:
//!
//! ```text
//! u = norm(x)             q, k, v, o = W_q u, W_k u, W_v u, W_o u
//! ~i, ~f = cap(W_i u + b_i), cap(W_f u + b_f)          cap(z) = 15 tanh(z / 15)
//! h = norm(mLSTM(q, k, v, ~i, ~f))                     (a layer norm a head)
//! x' = x + W_out (sigmoid(o) ∘ h)
//! y = x' + W_down (SiLU(W_gate u') ∘ W_up u')          u' = norm(x')
//! ```
//!
//! with root-mean-square norms but for the heads'.

use super::config::{Initialization, LargeConfig, WeightMode};
use crate::cell::mlstm::{Form, MlstmConfig, MlstmState, mlstm};
use crate::cell::{ForgetGate, InputGate};
use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::nn::config::ModelConfig;
use crate::nn::parameters::{Builder, Init, Parameter};
use crate::nn::{Context, Residual};
use crate::ops::activation::{Activation, gated};
use crate::ops::gates::gates;
use crate::ops::linear::linears;
use crate::ops::norm::{Norm, NormKind, gated_norm};

/// A norm's weight and, with `use_bias`, its bias.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScaledNorm {
    weight: Parameter,
    bias: Option<Parameter>,
    options: Norm,
}

impl ScaledNorm {
    /// The norm called `name` of a stream of width `dim`, in `groups`.
    pub(crate) fn new(
        config: &LargeConfig,
        (name, dim): (&str, usize),
        kind: NormKind,
        groups: usize,
        builder: &mut Builder,
    ) -> ScaledNorm {
        builder.scope(name, |builder| ScaledNorm {
            weight: builder.parameter("weight", &[dim], Init::Constant(1.0)),
            bias: config.use_bias.then(|| builder.parameter("bias", &[dim], Init::Constant(0.0))),
            options: Norm { kind, groups, eps: config.norm_eps, unit_offset: false },
        })
    }

    /// The stream as one value, and its norm.
    pub(crate) fn forward(&self, tape: &mut Tape, x: Residual) -> Result<(Var, Var)> {
        let (weight, bias) = (self.weight.var(tape), self.bias.map(|bias| bias.var(tape)));
        x.normed(tape, weight, bias, self.options)
    }

    /// sigmoid(gate) ∘ norm(x).
    fn gated(&self, tape: &mut Tape, x: Var, gate: Var) -> Result<Var> {
        let (weight, bias) = (self.weight.var(tape), self.bias.map(|bias| bias.var(tape)));
        gated_norm(tape, x, gate, weight, bias, self.options)
    }
}

/// Some rows of a weight matrix, and of its bias where it has one.
#[derive(Debug, Clone, Copy)]
struct Projection {
    weight: Parameter,
    bias: Option<Parameter>,
    first: usize,
    rows: usize,
}

impl Projection {
    fn vars(&self, tape: &mut Tape) -> (Var, Option<Var>) {
        let weight = self.weight.rows(tape, self.first, self.rows);
        (weight, self.bias.map(|bias| bias.rows(tape, self.first, self.rows)))
    }
}

/// The projections of x.
fn forward<const N: usize>(projections: &[Projection; N], tape: &mut Tape, x: Var) -> Result<[Var; N]> {
    let maps = projections.map(|projection| projection.vars(tape));
    linears(tape, x, maps)
}

/// How the weights and biases of one projection start.
#[derive(Debug, Clone)]
struct Start {
    weight: Init,
    bias: Init,
}

/// One projection as it is asked for.
struct Wanted<'a> {
    name: &'a str,
    rows: usize,
    start: Start,
    /// A matrix to the optimizer; not so gates, whose rows are a head's each.
    is_matrix: bool,
}

/// Projections of one input of this width: a matrix each, or one matrix called `fused`.
fn projections<const N: usize>(
    builder: &mut Builder,
    mode: WeightMode,
    fused: &str,
    (inputs, bias): (usize, bool),
    wanted: [Wanted<'_>; N],
) -> [Projection; N] {
    let are_matrices = wanted.iter().all(|w| w.is_matrix);
    let matrix = |builder: &mut Builder, name: &str, rows: &[usize], start: Start| {
        let all = rows.iter().sum();
        builder.scope(name, |builder| {
            let weight = match are_matrices {
                true => builder.matrices("weight", &[all, inputs], start.weight, rows.iter().copied()),
                false => builder.parameter("weight", &[all, inputs], start.weight),
            };
            (weight, bias.then(|| builder.parameter("bias", &[all], start.bias)))
        })
    };
    match mode {
        WeightMode::Single => wanted.map(|Wanted { name, rows, start, .. }| {
            let (weight, bias) = matrix(builder, name, &[rows], start);
            Projection { weight, bias, first: 0, rows }
        }),
        WeightMode::Fused => {
            let rows = wanted.each_ref().map(|w| w.rows);
            let weight = Init::rows(wanted.iter().map(|w| (w.rows * inputs, w.start.weight.clone())));
            let start =
                Start { weight, bias: Init::rows(wanted.iter().map(|w| (w.rows, w.start.bias.clone()))) };
            let (weight, bias) = matrix(builder, fused, &rows, start);
            let mut first = 0;
            wanted.map(|Wanted { rows, .. }| {
                first += rows;
                Projection { weight, bias, first: first - rows, rows }
            })
        }
    }
}

/// One block of the large family.
#[derive(Debug)]
pub struct LargeBlock {
    cell: MlstmConfig,
    /// Widths of a head's queries and values.
    sizes: [usize; 2],
    gate_soft_cap: Option<f64>,
    norm_mlstm: ScaledNorm,
    /// Queries, keys, values, output gate.
    qkvo: [Projection; 4],
    /// Input gate, forget gate.
    gates: [Projection; 2],
    multihead_norm: ScaledNorm,
    out_proj: Projection,
    norm_ffn: ScaledNorm,
    /// Gate, up-projection.
    up: [Projection; 2],
    down: Projection,
}

impl LargeBlock {
    /// Asks for the parameters of one of `config.num_blocks` blocks.
    pub fn new(config: &ModelConfig, builder: &mut Builder) -> LargeBlock {
        let (options, dim) = (&config.large, config.embedding_dim);
        let ([qk, v], ffn) = (options.head_dims(dim), options.feedforward_dim(dim));
        let (heads, mode, bias) = (options.num_heads, options.weight_mode, options.use_bias);
        let zeros = Init::Constant(0.0);
        let torch = |inputs: usize| Init::Uniform(1.0 / (inputs as f64).sqrt());
        let plain = options.initialization == Initialization::Pytorch;
        let start = |inputs: usize, weight: Init, bias: Init| match plain {
            true => Start { weight: torch(inputs), bias: torch(inputs) },
            false => Start { weight, bias },
        };
        let small = || start(dim, Init::Normal((2.0 / (5.0 * dim as f64)).sqrt()), zeros.clone());
        let wang = |inputs: usize, width: usize| {
            let deviation = 2.0 / config.num_blocks as f64 / (width as f64).sqrt();
            start(inputs, Init::Normal(deviation), zeros.clone())
        };
        let input_gate = start(dim, zeros.clone(), Init::Constant(-10.0));
        let [first, last] = options.forget_gate_bias;
        let forget_gate = start(dim, zeros.clone(), Init::steps(first, last, heads));
        let wanted = |name, rows, start| Wanted { name, rows, start, is_matrix: true };
        let gate = |name, start| Wanted { name, rows: heads, start, is_matrix: false };

        let rms = NormKind::RootMeanSquare;
        let norm_mlstm = ScaledNorm::new(options, ("norm_mlstm", dim), rms, 1, builder);
        let (qkvo, gates, multihead_norm, out_proj) = builder.scope("mlstm_layer", |builder| {
            let four = [
                wanted("q", qk, small()),
                wanted("k", qk, small()),
                wanted("v", v, small()),
                wanted("ogate_preact", v, small()),
            ];
            let qkvo = projections(builder, mode, "qkv_opreact", (dim, bias), four);
            let two = [gate("igate_preact", input_gate), gate("fgate_preact", forget_gate)];
            let gates = projections(builder, mode, "ifgate_preact", (dim, true), two);
            let norm = ScaledNorm::new(options, ("multihead_norm", v), NormKind::Layer, heads, builder);
            let out = [wanted("out_proj", dim, wang(v, dim))];
            let [out_proj] = projections(builder, WeightMode::Single, "", (v, bias), out);
            (qkvo, gates, norm, out_proj)
        });
        let norm_ffn = ScaledNorm::new(options, ("norm_ffn", dim), rms, 1, builder);
        let (up, down) = builder.scope("ffn", |builder| {
            let two = [wanted("proj_up_gate", ffn, small()), wanted("proj_up", ffn, small())];
            let up = projections(builder, mode, "proj_up_gate_z", (dim, bias), two);
            let down = [wanted("proj_down", dim, wang(ffn, ffn))];
            let [down] = projections(builder, WeightMode::Single, "", (ffn, bias), down);
            (up, down)
        });
        let cell = MlstmConfig {
            heads,
            input_gate: InputGate::Exponential,
            forget_gate: ForgetGate::Sigmoid,
            normalize: true,
            eps: options.eps,
            form: Form::Chunkwise(options.chunk_size),
        };
        LargeBlock {
            cell,
            sizes: [qk / heads, v / heads],
            gate_soft_cap: options.gate_soft_cap,
            norm_mlstm,
            qkvo,
            gates,
            multihead_norm,
            out_proj,
            norm_ffn,
            up,
            down,
        }
    }

    /// Names and shapes of the state of `batch` sequences.
    pub fn state_layout(&self, batch: usize) -> Vec<(&'static str, Shape)> {
        let (heads, [qk, v]) = (self.cell.heads, self.sizes);
        vec![
            ("mlstm.c", [batch, heads, qk, v].into()),
            ("mlstm.n", [batch, heads, qk].into()),
            ("mlstm.m", [batch, heads].into()),
        ]
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
        let (x, u) = self.norm_mlstm.forward(tape, x)?;
        let [q, k, v, o] = forward(&self.qkvo, tape, u)?;
        let maps = self.gates.map(|gate| gate.vars(tape));
        let gates = gates(tape, u, maps, self.gate_soft_cap)?;
        let before = state.map(|s| MlstmState { c: s[0], n: s[1], m: s[2] });
        let (h, after) = mlstm(tape, &self.cell, q, k, v, gates.into(), before, context.marks)?;
        let h = self.multihead_norm.gated(tape, h, o)?;
        let [y] = forward(&[self.out_proj], tape, h)?;

        let (x, u) = self.norm_ffn.forward(tape, Residual::sum_of(x, y))?;
        let [gate, up] = forward(&self.up, tape, u)?;
        let product = gated(tape, gate, up, Activation::Swish)?;
        let [y] = forward(&[self.down], tape, product)?;
        Ok((Residual::sum_of(x, y), vec![after.c, after.n, after.m]))
    }
}
