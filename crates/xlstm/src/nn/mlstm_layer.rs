//! The mLSTM layer of the small family, between an up- and a down-projection:
//!
//! ```text
//! [a, z] = W_up x                 c = SiLU(conv(a))
//! q, k = blockdiag(c)             v = blockdiag(a)
//! ~i, ~f = W_i [q; k; v] + b_i, W_f [q; k; v] + b_f
//! h = mLSTM(q, k, v, ~i, ~f)
//! y = W_down ((norm(h) + skip ∘ c) ∘ SiLU(z))         (a layer norm a head)
//! ```

use super::config::ModelConfig;
use super::parameters::{Builder, Init, Parameter};
use super::{Context, slstm_layer::conv_parameters};
use crate::cell::mlstm::{Form, MlstmConfig, MlstmState, mlstm};
use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::ops::causal_conv::causal_conv;
use crate::ops::linear::{linear, linears};
use crate::ops::norm::{Norm, NormKind};
use crate::ops::qkv::{Fed, qkv};
use crate::ops::skip_norm::skip_norm;

/// The layer's parameters and options.
#[derive(Debug)]
pub struct MlstmLayer {
    inner: usize,
    kernel: usize,
    dropout: f64,
    cell: MlstmConfig,
    proj_up: (Parameter, Option<Parameter>),
    q_proj: (Parameter, Option<Parameter>),
    k_proj: (Parameter, Option<Parameter>),
    v_proj: (Parameter, Option<Parameter>),
    conv: (Parameter, Parameter),
    igate: (Parameter, Parameter),
    fgate: (Parameter, Parameter),
    outnorm: Parameter,
    learnable_skip: Parameter,
    proj_down: (Parameter, Option<Parameter>),
}

impl MlstmLayer {
    /// Asks for the parameters of one of `config.num_blocks` layers.
    pub fn new(config: &ModelConfig, builder: &mut Builder) -> MlstmLayer {
        let options = &config.mlstm;
        let (dim, inner, heads, block) =
            (config.embedding_dim, config.inner_dim(), options.num_heads, options.qkv_proj_blocksize);
        let small = Init::Normal((2.0 / (5.0 * dim as f64)).sqrt());
        let wang = Init::Normal(2.0 / config.num_blocks as f64 / (dim as f64).sqrt());
        let bias = |builder: &mut Builder, name: &str, size: usize| {
            config.bias.then(|| builder.parameter(name, &[size], Init::Constant(0.0)))
        };
        let projection = |builder: &mut Builder, name: &str| {
            let blocks = inner / block;
            let rows = std::iter::repeat_n(block, blocks);
            let shape = [blocks, block, block];
            let weight = builder.matrices(&format!("{name}.weight"), &shape, small.clone(), rows);
            (weight, bias(builder, &format!("{name}.bias"), inner))
        };
        let learnable_skip = builder.parameter("learnable_skip", &[inner], Init::Constant(1.0));
        let up = builder.matrices("proj_up.weight", &[2 * inner, dim], small.clone(), [inner; 2]);
        let proj_up = (up, bias(builder, "proj_up.bias", 2 * inner));
        let q_proj = projection(builder, "q_proj");
        let k_proj = projection(builder, "k_proj");
        let v_proj = projection(builder, "v_proj");
        let conv = conv_parameters(builder, inner, options.conv1d_kernel_size);
        let mut gate = |name: &str, bias: Init| {
            builder.scope(&format!("mlstm_cell.{name}"), |builder| {
                let weight = builder.parameter("weight", &[heads, 3 * inner], Init::Constant(0.0));
                (weight, builder.parameter("bias", &[heads], bias))
            })
        };
        let igate = gate("igate", Init::Normal(0.1));
        let [first, last] = options.forget_gate_bias;
        let fgate = gate("fgate", Init::steps(first, last, heads));
        let outnorm = builder.parameter("mlstm_cell.outnorm.weight", &[inner], Init::Constant(0.0));
        let down = builder.matrices("proj_down.weight", &[dim, inner], wang, [dim]);
        let proj_down = (down, bias(builder, "proj_down.bias", dim));
        let cell = MlstmConfig {
            heads,
            input_gate: options.input_gate,
            forget_gate: options.forget_gate,
            normalize: true,
            eps: options.eps,
            form: Form::Chunkwise(options.chunk_size),
        };
        MlstmLayer {
            inner,
            kernel: options.conv1d_kernel_size,
            dropout: config.dropout,
            cell,
            proj_up,
            q_proj,
            k_proj,
            v_proj,
            conv,
            igate,
            fgate,
            outnorm,
            learnable_skip,
            proj_down,
        }
    }

    /// Names and shapes of the state of `batch` sequences.
    pub fn state_layout(&self, batch: usize) -> Vec<(&'static str, Shape)> {
        let (heads, size) = (self.cell.heads, self.inner / self.cell.heads);
        vec![
            ("mlstm.c", [batch, heads, size, size].into()),
            ("mlstm.n", [batch, heads, size].into()),
            ("mlstm.m", [batch, heads].into()),
            ("conv.window", [batch, self.kernel - 1, self.inner].into()),
        ]
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
        let halves = [0, self.inner].map(|first| {
            let bias = self.proj_up.1.map(|b| b.rows(tape, first, self.inner));
            (self.proj_up.0.rows(tape, first, self.inner), bias)
        });
        let [a, z] = linears(tape, x, halves)?;
        let (weight, bias) = (self.conv.0.var(tape), self.conv.1.var(tape));
        let (c, window) = causal_conv(tape, a, weight, Some(bias), state.map(|s| s[3]), context.marks, true)?;
        let map = |tape: &mut Tape, (weight, bias): (Parameter, Option<Parameter>)| {
            (weight.var(tape), bias.map(|b| b.var(tape)))
        };
        let maps = [self.q_proj, self.k_proj, self.v_proj].map(|projection| map(tape, projection));
        let gates = [self.igate, self.fgate].map(|(weight, bias)| (weight.var(tape), Some(bias.var(tape))));
        let Fed { q, k, v, gates } = qkv(tape, [c, a], maps, gates)?;
        let before = state.map(|s| MlstmState { c: s[0], n: s[1], m: s[2] });
        let (h, after) = mlstm(tape, &self.cell, q, k, v, gates.into(), before, context.marks)?;
        let (weight, skip) = (self.outnorm.var(tape), self.learnable_skip.var(tape));
        let options = Norm { kind: NormKind::Layer, groups: self.cell.heads, eps: 1e-5, unit_offset: true };
        let gated = skip_norm(tape, h, weight, skip, [c, z], options)?;
        let (weight, bias) = (self.proj_down.0.var(tape), self.proj_down.1.map(|b| b.var(tape)));
        let y = linear(tape, gated, weight, bias)?;
        let y = context.dropout(tape, y, self.dropout)?;
        Ok((y, vec![after.c, after.n, after.m, window]))
    }
}
