//! The two residual blocks of the original's article:
//!
//! ```text
//! pre:   u = norm(W_up x + b_up)       y = x + dropout(W_proj cells(u) + b_proj)
//! post:  u = norm(cells(x))            y = x + dropout(W_proj GELU(W_up u + b_up) + b_proj)
//! ```
//!
//! with layer norms that have biases. In both directions, cells(x) is cells(x) + the same of
//! other cells that read every document from its end, put back in order.

use super::cells::{Cells, Linear};
use super::config::BlockForm;
use crate::engine::{Shape, Tape, Var};
use crate::error::{Error, Result};
use crate::nn::Context;
use crate::nn::config::ModelConfig;
use crate::nn::parameters::{Builder, Init, Parameter};
use crate::ops::activation::{Activation, activated};
use crate::ops::add::add;
use crate::ops::norm::{Norm, NormKind, norm};
use crate::ops::reverse::reverse;

/// One block of the original's model.
#[derive(Debug)]
pub struct OriginalBlock {
    form: BlockForm,
    dropout: f64,
    cells: Cells,
    /// The cells that read from right to left.
    backwards: Option<Cells>,
    norm: (Parameter, Parameter),
    up: Linear,
    down: Linear,
}

impl OriginalBlock {
    /// Asks for the parameters of a block: the original's names, `lstm_reverse` for the other
    /// direction, and `proj_up` for the projection that it lacks.
    pub fn new(config: &ModelConfig, builder: &mut Builder) -> OriginalBlock {
        let (options, dim) = (&config.original, config.embedding_dim);
        let (form, hidden) = (options.block_form(), options.hidden_size);
        let (up, inputs, projected) = match form {
            BlockForm::Pre => ((hidden, dim), hidden, hidden),
            BlockForm::Post => ((options.projected_size(), hidden), dim, options.projected_size()),
        };
        let cells = builder.scope("lstm", |builder| Cells::new(config, inputs, builder));
        let backwards = options
            .bidirectional
            .then(|| builder.scope("lstm_reverse", |builder| Cells::new(config, inputs, builder)));
        let norm = builder.scope("norm", |builder| {
            let weight = builder.parameter("weight", &[hidden], Init::Constant(1.0));
            (weight, builder.parameter("bias", &[hidden], Init::Constant(0.0)))
        });
        let up = Linear::new(builder, "proj_up", up.0, up.1);
        let down = Linear::new(builder, "proj", dim, projected);
        OriginalBlock { form, dropout: config.dropout, cells, backwards, norm, up, down }
    }

    /// Names and shapes of the state of `batch` sequences; in both directions there is none.
    pub fn state_layout(&self, batch: usize) -> Vec<(String, Shape)> {
        if self.backwards.is_some() { Vec::new() } else { self.cells.state_layout(batch) }
    }

    /// Multiplications of a token that are not those of weights.
    pub fn cell_products(&self) -> usize {
        self.cells.products() + self.backwards.as_ref().map_or(0, Cells::products)
    }

    /// x (B, S, D) and the state before it -> y (B, S, D) and the state after it.
    ///
    /// # Errors
    /// When shapes do not fit, or a block that reads in both directions is given a state.
    pub fn forward(
        &self,
        tape: &mut Tape,
        x: Var,
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)> {
        let (y, after) = match self.form {
            BlockForm::Pre => {
                let u = self.up.forward(tape, x)?;
                let u = self.normalize(tape, u)?;
                self.read(tape, u, state, context)?
            }
            BlockForm::Post => {
                let (h, after) = self.read(tape, x, state, context)?;
                let u = self.normalize(tape, h)?;
                let u = self.up.forward(tape, u)?;
                (activated(tape, u, Activation::Gelu)?, after)
            }
        };
        let y = self.down.forward(tape, y)?;
        let y = context.dropout(tape, y, self.dropout)?;
        Ok((add(tape, x, y)?, after))
    }

    fn normalize(&self, tape: &mut Tape, x: Var) -> Result<Var> {
        let (weight, bias) = (self.norm.0.var(tape), self.norm.1.var(tape));
        norm(
            tape,
            x,
            weight,
            Some(bias),
            Norm { kind: NormKind::Layer, groups: 1, eps: 1e-5, unit_offset: false },
        )
    }

    /// The cells, in one direction or in both.
    fn read(
        &self,
        tape: &mut Tape,
        x: Var,
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)> {
        let Some(backwards) = &self.backwards else {
            return self.cells.forward(tape, x, state, context);
        };
        if state.is_some() {
            return Err(Error::shape("a bidirectional block is given a state").hint(
                "it reads whole sequences from both ends, so that nothing can be carried from one to the next",
            ));
        }
        let (h, _) = self.cells.forward(tape, x, None, context)?;
        let reversed = reverse(tape, x, context.marks)?;
        let (other, _) = backwards.forward(tape, reversed, None, context)?;
        let other = reverse(tape, other, context.marks)?;
        Ok((add(tape, h, other)?, Vec::new()))
    }
}
