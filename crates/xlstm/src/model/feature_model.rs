//! A model of sequences that are not words: features -> block stack -> pooling -> head.

use std::sync::Arc;

use super::block_stack::{BlockStack, project, projection};
use super::interface::{Inputs, Model};
use super::runner::Logits;
use crate::data::{Batch, Sequence};
use crate::engine::{Ids, Shape, Tape, Var};
use crate::error::{Error, Result};
use crate::nn::config::at_least_one;
use crate::nn::{Builder, Context, ModelConfig, Parameter, ParameterSpec};
use crate::ops::from_bits::from_bits;
use crate::ops::head_loss::{self, head_loss};
use crate::ops::last_token::last_token;
use crate::ops::mean_tokens::mean_tokens;
use crate::ops::squared_error::squared_error;

/// Which outputs a sequence has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// One for every row of features.
    None,
    /// One, from the last row that is no pad.
    Last,
    /// One, from the mean over all rows that are no pads; their sum and count are part of the
    /// state, so that a stream has the mean over all that it has seen.
    Mean,
}

/// What an output is, and how it is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Logits of classes, scored by the cross entropy.
    Classification {
        /// Number of classes.
        classes: usize,
    },
    /// Numbers, scored by their squared error.
    Regression {
        /// Number of numbers.
        outputs: usize,
    },
}

impl Head {
    /// Numbers of an output.
    pub fn width(self) -> usize {
        match self {
            Head::Classification { classes } => classes,
            Head::Regression { outputs } => outputs,
        }
    }

    /// Targets of an output.
    pub fn targets(self) -> usize {
        match self {
            Head::Classification { .. } => 1,
            Head::Regression { outputs } => outputs,
        }
    }
}

/// The configuration of a [`FeatureModel`].
#[derive(Clone, Debug, PartialEq)]
pub struct FeatureConfig {
    /// Features of a row.
    pub input_size: usize,
    /// The blocks; the vocabulary and the embedding's keys mean nothing here.
    pub blocks: ModelConfig,
    /// Which outputs a sequence has.
    pub pooling: Pooling,
    /// What they are.
    pub head: Head,
}

/// A model of features: what it computes. Its numbers are [`Parameters`](crate::nn::Parameters).
#[derive(Debug)]
pub struct FeatureModel {
    config: FeatureConfig,
    specs: Arc<[ParameterSpec]>,
    stack: BlockStack,
    head: (Parameter, Parameter),
}

impl FeatureModel {
    /// The model of a configuration; its head is `head.weight` (O, D) and `head.bias` (O).
    ///
    /// # Errors
    /// When the configuration does not fit together.
    pub fn new(config: FeatureConfig) -> Result<FeatureModel> {
        at_least_one("the width of the head", config.head.width())?;
        let mut builder = Builder::new();
        let stack = BlockStack::new(&config.blocks, config.input_size, &mut builder)?;
        let head = projection(&mut builder, "head", config.head.width(), stack.width());
        Ok(FeatureModel { config, specs: builder.finish(), stack, head })
    }

    /// The configuration.
    pub fn config(&self) -> &FeatureConfig {
        &self.config
    }

    /// The batch of these sequences, padded to the longest. Each has a target for every output,
    /// [`IGNORE`](crate::marks::IGNORE) where it is not asked for.
    ///
    /// # Errors
    /// When a sequence has no row, or its features or targets are not as many as they have to be.
    pub fn batch(&self, sequences: &[Sequence]) -> Result<Batch> {
        let per_row = self.config.pooling == Pooling::None;
        let batch =
            Batch::of_sequences(sequences, self.config.input_size, self.config.head.targets(), per_row)?;
        if let Head::Classification { classes } = self.config.head {
            let inside = |target: &u32| (*target as usize) < classes || *target == crate::marks::IGNORE;
            if let Some(target) = batch.targets.iter().find(|target| !inside(target)) {
                return Err(Error::data(format!(
                    "a target is {target}, but the model has {classes} classes"
                ))
                .hint("classes count from 0; the targets of a classification are classes, not values"));
            }
        }
        Ok(batch)
    }
}

impl Model for FeatureModel {
    fn specs(&self) -> &Arc<[ParameterSpec]> {
        &self.specs
    }

    /// The blocks' state and, where outputs are means, `pooling.sum` and `pooling.count`.
    fn state_layout(&self, batch: usize) -> Vec<(String, Shape)> {
        let mut layout = self.stack.state_layout(batch);
        if self.config.pooling == Pooling::Mean && !layout.is_empty() {
            layout.push(("pooling.sum".to_owned(), [batch, self.stack.width()].into()));
            layout.push(("pooling.count".to_owned(), [batch, 1].into()));
        }
        layout
    }

    fn inputs(&self) -> Inputs {
        Inputs::Features { width: self.config.input_size }
    }

    fn output_width(&self) -> usize {
        self.config.head.width()
    }

    fn target_len(&self, [batch, length]: [usize; 2]) -> usize {
        let outputs = if self.config.pooling == Pooling::None { batch * length } else { batch };
        outputs * self.config.head.targets()
    }

    fn most_tokens(&self) -> Option<usize> {
        self.stack.most_tokens()
    }

    fn features(
        &self,
        tape: &mut Tape,
        inputs: Ids,
        [batch, length]: [usize; 2],
        wanted: Logits,
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)> {
        tape.scope("features");
        let x = from_bits(tape, inputs, [batch, length, self.config.input_size])?;
        let parts = self.stack.state_layout(1).len();
        let state = state.filter(|_| parts > 0);
        let (own, pooled) = match state.map(|state| state.split_at(parts)) {
            Some((own, &[sum, count])) => (Some(own), Some([sum, count])),
            Some((own, _)) => (Some(own), None),
            None => (None, None),
        };
        let (y, mut after) = self.stack.forward(tape, x, own, context)?;
        tape.scope("pooling");
        let y = match self.config.pooling {
            Pooling::None if wanted == Logits::All => y,
            Pooling::None | Pooling::Last => last_token(tape, y, context.marks)?,
            Pooling::Mean => {
                let pooled = mean_tokens(tape, y, pooled, context.marks)?;
                after.extend(pooled.state);
                pooled.mean
            }
        };
        Ok((y, after))
    }

    fn outputs(&self, tape: &mut Tape, features: Var) -> Result<Var> {
        tape.scope("head");
        project(tape, features, self.head)
    }

    fn loss(&self, tape: &mut Tape, features: Var, targets: Ids, scale: Var) -> Result<(Var, Var)> {
        match self.config.head {
            Head::Classification { .. } => {
                tape.scope("head");
                let (weight, bias) = (self.head.0.var(tape), Some(self.head.1.var(tape)));
                head_loss(tape, features, head_loss::Head { weight, bias, cap: None }, targets, scale)
            }
            Head::Regression { .. } => {
                let outputs = self.outputs(tape, features)?;
                squared_error(tape, outputs, targets, scale)
            }
        }
    }
}
