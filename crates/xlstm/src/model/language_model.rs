//! The language model of the small family: embedding -> stack -> linear head.

use std::sync::Arc;

use super::model::{Inputs, Model};
use super::runner::Logits;
use super::stack::Stack;
use crate::engine::{Ids, Shape, Tape, Var};
use crate::error::{Error, Result};
use crate::nn::{BlockKind, Builder, Context, Init, ModelConfig, Parameter, ParameterSpec};
use crate::ops::cross_entropy::cross_entropy;
use crate::ops::embedding::embedding;
use crate::ops::last_token::last_token;
use crate::ops::linear::linear;

/// A language model: what it computes. Its numbers are [`Parameters`](crate::nn::Parameters).
#[derive(Debug)]
pub struct LanguageModel {
    config: ModelConfig,
    specs: Arc<[ParameterSpec]>,
    stack: Stack,
    token_embedding: Parameter,
    lm_head: Parameter,
}

impl LanguageModel {
    /// The model of a configuration.
    ///
    /// # Errors
    /// When the configuration does not fit together, or has no vocabulary.
    pub fn new(config: &ModelConfig) -> Result<LanguageModel> {
        config.validate()?;
        if config.vocab_size == 0 {
            return Err(Error::config("model.vocab_size is 0, and there is no tokenizer to take it from"));
        }
        let mut builder = Builder::new();
        let stack = builder.scope("xlstm_block_stack", |b| Stack::new(config, b));
        let shape = [config.vocab_size, config.embedding_dim];
        let small = Init::Normal((2.0 / (5.0 * config.embedding_dim as f64)).sqrt());
        let decay = config.weight_decay_on_embedding;
        let token_embedding =
            builder.parameter_with_decay("token_embedding.weight", &shape, small.clone(), decay);
        let lm_head = match config.tie_weights {
            true => token_embedding,
            false => builder.parameter("lm_head.weight", &shape, small),
        };
        Ok(LanguageModel { config: config.clone(), specs: builder.finish(), stack, token_embedding, lm_head })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The parameters, in order.
    pub fn specs(&self) -> &Arc<[ParameterSpec]> {
        &self.specs
    }

    /// Number of trainable numbers.
    pub fn parameter_count(&self) -> usize {
        self.specs.iter().map(|spec| spec.shape.iter().product::<usize>()).sum()
    }

    /// Names and shapes of the state of `batch` sequences.
    pub fn state_layout(&self, batch: usize) -> Vec<(String, Shape)> {
        self.stack.state_layout(batch)
    }

    /// tokens (B S) and the state before them -> features (B, S, D) and the state after them.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn features(
        &self,
        tape: &mut Tape,
        tokens: Ids,
        shape: [usize; 2],
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)> {
        tape.scope("token_embedding");
        let weight = self.token_embedding.var(tape);
        let mut x = embedding(tape, tokens, weight, shape)?;
        if self.config.add_embedding_dropout {
            x = context.dropout(tape, x, self.config.dropout)?;
        }
        self.stack.forward(tape, x, state, context)
    }

    /// features (…, D) -> logits (…, V).
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn logits(&self, tape: &mut Tape, features: Var) -> Result<Var> {
        tape.scope("lm_head");
        let weight = self.lm_head.var(tape);
        linear(tape, features, weight, None)
    }

    /// Floating-point operations of a forward pass, a token: two for every weight of a
    /// projection and what the cells do with their states. Training takes three times that.
    pub fn flops_per_token(&self) -> u64 {
        let config = &self.config;
        let matrices: usize = self
            .specs
            .iter()
            .filter(|s| s.shape.len() >= 2 && s.name != "token_embedding.weight")
            .map(|s| s.shape.iter().product::<usize>())
            .sum();
        let head = if config.tie_weights { config.vocab_size * config.embedding_dim } else { 0 };
        let inner = config.inner_dim();
        let size = inner / config.mlstm.num_heads;
        let cells: usize = config
            .block_kinds()
            .iter()
            .map(|kind| match kind {
                // C k v^T and q C, and half a chunk of scores and their sums.
                BlockKind::Mlstm => 2 * inner * size + inner * config.mlstm.chunk_size,
                BlockKind::Slstm => 0,
            })
            .sum();
        2 * (matrices + head + cells) as u64
    }
}

impl Model for LanguageModel {
    fn specs(&self) -> &Arc<[ParameterSpec]> {
        &self.specs
    }

    fn state_layout(&self, batch: usize) -> Vec<(String, Shape)> {
        self.state_layout(batch)
    }

    fn inputs(&self) -> Inputs {
        Inputs::Tokens { vocabulary: self.config.vocab_size }
    }

    fn output_width(&self) -> usize {
        self.config.vocab_size
    }

    fn target_len(&self, shape: [usize; 2]) -> usize {
        shape[0] * shape[1]
    }

    /// Logits.
    fn outputs(
        &self,
        tape: &mut Tape,
        tokens: Ids,
        shape: [usize; 2],
        wanted: Logits,
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)> {
        let (features, after) = self.features(tape, tokens, shape, state, context)?;
        let features = match wanted {
            Logits::All => features,
            Logits::Last => last_token(tape, features, context.marks)?,
        };
        Ok((self.logits(tape, features)?, after))
    }

    fn loss(&self, tape: &mut Tape, logits: Var, targets: Ids, scale: Var) -> Result<(Var, Var)> {
        cross_entropy(tape, logits, targets, scale)
    }
}
