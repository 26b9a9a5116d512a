//! The block of the Transformer, as in GPT-2:
//!
//! ```text
//! u = LayerNorm(x)        q, k, v = W_attn u        x' = x + W_proj attention(q, k, v)
//! y = x' + W_out GELU(W_in LayerNorm(x'))
//! ```
//!
//! with norms that have a weight and a bias. With rotary positions q and k are turned first, and
//! keys are kept turned.

use super::GPT_DEVIATION;
use crate::engine::{Shape, Tape, Var};
use crate::error::Result;
use crate::nn::config::ModelConfig;
use crate::nn::parameters::{Builder, Init, Parameter};
use crate::nn::{Context, Residual};
use crate::ops::activation::{Activation, activated};
use crate::ops::attention::attention;
use crate::ops::linear::{linear, linears};
use crate::ops::norm::{Norm, NormKind};
use crate::ops::positions::Places;
use crate::ops::rotary::rotary;
use crate::ops::window::window;

/// A layer norm with weight and bias.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BiasedNorm {
    weight: Parameter,
    bias: Parameter,
}

impl BiasedNorm {
    /// The norm called `name` of a stream of width `dim`.
    pub(crate) fn new(name: &str, dim: usize, builder: &mut Builder) -> BiasedNorm {
        builder.scope(name, |b| BiasedNorm {
            weight: b.parameter_with_decay("weight", &[dim], Init::Constant(1.0), false),
            bias: b.parameter("bias", &[dim], Init::Constant(0.0)),
        })
    }

    /// The stream as one value, and its norm.
    pub(crate) fn forward(&self, tape: &mut Tape, x: Residual) -> Result<(Var, Var)> {
        let (weight, bias) = (self.weight.var(tape), self.bias.var(tape));
        let options = Norm { kind: NormKind::Layer, groups: 1, eps: 1e-5, unit_offset: false };
        x.normed(tape, weight, Some(bias), options)
    }
}

/// A matrix, and its bias where it has one.
#[derive(Clone, Copy, Debug)]
struct Projection {
    weight: Parameter,
    bias: Option<Parameter>,
}

impl Projection {
    /// The projection called `name`, from `inputs` to `parts` maps of so many outputs each.
    fn new(
        name: &str,
        parts: usize,
        [outputs, inputs]: [usize; 2],
        bias: bool,
        deviation: f64,
        builder: &mut Builder,
    ) -> Self {
        builder.scope(name, |b| Projection {
            weight: b.matrices(
                "weight",
                &[parts * outputs, inputs],
                Init::Normal(deviation),
                std::iter::repeat_n(outputs, parts),
            ),
            bias: bias.then(|| b.parameter("bias", &[parts * outputs], Init::Constant(0.0))),
        })
    }

    /// N equal parts of the outputs.
    fn parts<const N: usize>(&self, tape: &mut Tape, x: Var, count: usize) -> Result<[Var; N]> {
        let parts = std::array::from_fn(|part| {
            let bias = self.bias.map(|bias| bias.rows(tape, part * count, count));
            (self.weight.rows(tape, part * count, count), bias)
        });
        linears(tape, x, parts)
    }

    fn forward(&self, tape: &mut Tape, x: Var) -> Result<Var> {
        let (weight, bias) = (self.weight.var(tape), self.bias.map(|bias| bias.var(tape)));
        linear(tape, x, weight, bias)
    }
}

/// What the blocks of a pass share.
#[derive(Clone, Copy, Debug)]
pub struct Shared {
    /// Where the tokens stand and what they see.
    pub places: Places,
    /// With rotary positions, the angles.
    pub angles: Option<Var>,
}

/// One block of the Transformer.
#[derive(Debug)]
pub struct TransformerBlock {
    dim: usize,
    heads: usize,
    context_length: usize,
    dropout: f64,
    ln_1: BiasedNorm,
    /// Queries, keys and values, in this order.
    c_attn: Projection,
    c_proj: Projection,
    ln_2: BiasedNorm,
    c_fc: Projection,
    mlp_proj: Projection,
}

impl TransformerBlock {
    /// Asks for the parameters of one of `config.num_blocks` blocks.
    pub fn new(config: &ModelConfig, builder: &mut Builder) -> TransformerBlock {
        let (options, dim) = (&config.transformer, config.embedding_dim);
        let (inner, bias) = (options.ffn_factor * dim, options.bias);
        // What goes back to the residual stream is smaller the more blocks there are.
        let last = GPT_DEVIATION / (2.0 * config.num_blocks as f64).sqrt();
        let ln_1 = BiasedNorm::new("ln_1", dim, builder);
        let (c_attn, c_proj) = builder.scope("attn", |b| {
            let c_attn = Projection::new("c_attn", 3, [dim, dim], bias, GPT_DEVIATION, b);
            (c_attn, Projection::new("c_proj", 1, [dim, dim], bias, last, b))
        });
        let ln_2 = BiasedNorm::new("ln_2", dim, builder);
        let (c_fc, mlp_proj) = builder.scope("mlp", |b| {
            let c_fc = Projection::new("c_fc", 1, [inner, dim], bias, GPT_DEVIATION, b);
            (c_fc, Projection::new("c_proj", 1, [dim, inner], bias, last, b))
        });
        TransformerBlock {
            dim,
            heads: options.num_heads,
            context_length: options.context_length,
            dropout: config.dropout,
            ln_1,
            c_attn,
            c_proj,
            ln_2,
            c_fc,
            mlp_proj,
        }
    }

    /// Names and shapes of the state of `batch` sequences: keys and values of the last tokens, each a ring
    /// ([`window`](crate::ops::window)).
    pub fn state_layout(&self, batch: usize) -> Vec<(&'static str, Shape)> {
        let shape = Shape::from([batch, self.context_length, self.dim]);
        vec![("attn.keys", shape), ("attn.values", shape)]
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
        shared: Shared,
        context: &mut Context,
    ) -> Result<(Residual, Vec<Var>)> {
        let (x, u) = self.ln_1.forward(tape, x)?;
        let [mut q, mut k, v] = self.c_attn.parts(tape, u, self.dim)?;
        if let Some(angles) = shared.angles {
            (q, k) = (rotary(tape, q, angles)?, rotary(tape, k, angles)?);
        }
        let cache = state.map(|s| [s[0], s[1]]);
        // Attention comes before the caches that it reads are updated.
        let y = attention(tape, self.heads, [q, k, v], cache, shared.places)?;
        let size = self.context_length;
        let keys = window(tape, size, k, cache.map(|c| c[0]), shared.places)?;
        let values = window(tape, size, v, cache.map(|c| c[1]), shared.places)?;
        let y = self.c_proj.forward(tape, y)?;
        let y = context.dropout(tape, y, self.dropout)?;

        let (x, u) = self.ln_2.forward(tape, Residual::sum_of(x, y))?;
        let y = self.c_fc.forward(tape, u)?;
        let y = activated(tape, y, Activation::Gelu)?;
        let y = self.mlp_proj.forward(tape, y)?;
        let y = context.dropout(tape, y, self.dropout)?;
        Ok((Residual::sum_of(x, y), vec![keys, values]))
    }
}
