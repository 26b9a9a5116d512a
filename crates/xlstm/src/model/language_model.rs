//! The language model: embedding -> backbone -> linear head, whatever the family.

use std::sync::Arc;

use super::backbone::{Backbone, backbone_of};
use super::interface::{Inputs, Model};
use super::runner::Logits;
use crate::engine::{Ids, Shape, Tape, Var};
use crate::error::{Error, Result};
use crate::nn::large::Initialization;
use crate::nn::transformer::GPT_DEVIATION;
use crate::nn::{Builder, Context, Family, Init, ModelConfig, Parameter, ParameterSpec};
use crate::ops::embedding::embedding;
use crate::ops::head_loss::{Head, head_loss};
use crate::ops::last_token::last_token;
use crate::ops::linear::linear;
use crate::ops::soft_cap::soft_cap;

/// A language model: what it computes. Its numbers are [`Parameters`](crate::nn::Parameters).
#[derive(Debug)]
pub struct LanguageModel {
    config: ModelConfig,
    specs: Arc<[ParameterSpec]>,
    backbone: Box<dyn Backbone>,
    embedding: Parameter,
    head: Parameter,
    head_bias: Option<Parameter>,
    /// Logits stay within plus and minus this.
    logit_soft_cap: Option<f64>,
}

impl LanguageModel {
    /// The model of a configuration.
    ///
    /// # Errors
    /// When the configuration does not fit together, has no vocabulary, or reads from both ends.
    pub fn new(config: &ModelConfig) -> Result<LanguageModel> {
        config.validate_causal()?;
        if config.vocab_size == 0 {
            return Err(Error::config("model.vocab_size is 0, and there is no tokenizer to take it from"));
        }
        let mut builder = Builder::new();
        let shape = [config.vocab_size, config.embedding_dim];
        let small = Init::Normal((2.0 / (5.0 * config.embedding_dim as f64)).sqrt());
        let decay = config.weight_decay_on_embedding;
        let torch = Init::Uniform(1.0 / (config.embedding_dim as f64).sqrt());
        let (mut logit_soft_cap, mut head_bias) = (None, None);
        let backbone;
        let [embedding, head] = match config.family {
            Family::Small => {
                backbone = builder.scope("xlstm_block_stack", |b| backbone_of(config, b));
                let embedding =
                    builder.parameter_with_decay("token_embedding.weight", &shape, small.clone(), decay);
                [embedding, tied_or(config, embedding, || builder.parameter("lm_head.weight", &shape, small))]
            }
            Family::Large => {
                let (first, last) = match config.large.initialization {
                    Initialization::HuggingFace => (small.clone(), small),
                    Initialization::Pytorch => (Init::Normal(1.0), torch),
                };
                let embedding = builder.parameter_with_decay("embedding.weight", &shape, first, decay);
                backbone = builder.scope("backbone", |b| backbone_of(config, b));
                logit_soft_cap = config.large.output_logit_soft_cap;
                [embedding, tied_or(config, embedding, || builder.parameter("lm_head.weight", &shape, last))]
            }
            Family::Lstm => {
                // As in PyTorch's layers.
                let embedding =
                    builder.parameter_with_decay("embedding.weight", &shape, Init::Normal(1.0), decay);
                backbone = builder.scope("lstm", |b| backbone_of(config, b));
                let hidden = config.lstm.hidden_dim(config.embedding_dim);
                let (shape, last) =
                    ([config.vocab_size, hidden], Init::Uniform(1.0 / (hidden as f64).sqrt()));
                [embedding, tied_or(config, embedding, || builder.parameter("lm_head.weight", &shape, last))]
            }
            Family::Transformer => {
                let (first, last) = (Init::Normal(GPT_DEVIATION), Init::Normal(GPT_DEVIATION));
                let embedding = builder.parameter_with_decay("transformer.wte.weight", &shape, first, decay);
                backbone = builder.scope("transformer", |b| backbone_of(config, b));
                [embedding, tied_or(config, embedding, || builder.parameter("lm_head.weight", &shape, last))]
            }
            // As PyTorch's layers start.
            Family::Original => {
                let first = Init::Normal(1.0);
                let embedding = builder.parameter_with_decay("embedding.weight", &shape, first, decay);
                backbone = backbone_of(config, &mut builder);
                let head = builder.parameter("output_layer.weight", &shape, torch.clone());
                head_bias = Some(builder.parameter("output_layer.bias", &[config.vocab_size], torch));
                [embedding, head]
            }
        };
        [Some(embedding), Some(head), head_bias].into_iter().flatten().for_each(|p| builder.at_border(p));
        let (specs, config) = (builder.finish(), config.clone());
        Ok(LanguageModel { config, specs, backbone, embedding, head, head_bias, logit_soft_cap })
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
        self.backbone.state_layout(batch)
    }

    fn head(&self, tape: &mut Tape) -> Head {
        tape.scope("head");
        Head {
            weight: self.head.var(tape),
            bias: self.head_bias.map(|bias| bias.var(tape)),
            cap: self.logit_soft_cap,
        }
    }

    /// Whether a token reads the whole of each parameter, in their order: of the others, the
    /// embedding and learned positions, it reads a row. An embedding that is the head is read whole.
    pub fn reads_whole(&self) -> Vec<bool> {
        let embedding = (!self.config.tie_weights).then_some(self.embedding);
        let tables: Vec<usize> =
            embedding.into_iter().chain(self.backbone.looked_up()).map(Parameter::index).collect();
        (0..self.specs.len()).map(|index| !tables.contains(&index)).collect()
    }

    /// Multiplications of a token with weight matrices, those of the head among them.
    pub fn weight_products(&self) -> u64 {
        let read =
            self.specs.iter().zip(self.reads_whole()).filter(|(spec, whole)| *whole && spec.shape.len() >= 2);
        read.map(|(spec, _)| spec.shape.iter().product::<usize>() as u64).sum()
    }

    /// Those of the head alone.
    pub fn head_products(&self) -> u64 {
        self.head.len() as u64
    }

    /// Floating-point operations of a forward pass, a token: two for every weight of a
    /// projection and what the cells do with their states. Training takes three times that.
    pub fn flops_per_token(&self) -> u64 {
        2 * (self.weight_products() + self.backbone.cell_products() as u64)
    }

    /// The most tokens that a document may have, where the model has such a limit: learned
    /// positions end.
    pub fn most_tokens(&self) -> Option<usize> {
        self.backbone.most_tokens()
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

    fn most_tokens(&self) -> Option<usize> {
        self.most_tokens()
    }

    fn features(
        &self,
        tape: &mut Tape,
        tokens: Ids,
        shape: [usize; 2],
        wanted: Logits,
        state: Option<&[Var]>,
        context: &mut Context,
    ) -> Result<(Var, Vec<Var>)> {
        tape.scope("embedding");
        let weight = self.embedding.var(tape);
        let mut x = embedding(tape, tokens, weight, shape)?;
        if self.config.add_embedding_dropout {
            x = context.dropout(tape, x, self.config.dropout)?;
        }
        let (features, after) = self.backbone.forward(tape, x, state, context)?;
        let features = match wanted {
            Logits::Last if shape[1] > 1 => last_token(tape, features, context.marks)?,
            Logits::Last | Logits::All => features,
        };
        Ok((features, after))
    }

    /// Logits.
    fn outputs(&self, tape: &mut Tape, features: Var) -> Result<Var> {
        let head = self.head(tape);
        let logits = linear(tape, features, head.weight, head.bias)?;
        head.cap.map_or(Ok(logits), |cap| soft_cap(tape, logits, cap))
    }

    fn loss(&self, tape: &mut Tape, features: Var, targets: Ids, scale: Var) -> Result<(Var, Var)> {
        let head = self.head(tape);
        head_loss(tape, features, head, targets, scale)
    }
}

/// The embedding itself where the head shares its weights, else what `own` asks for.
fn tied_or(config: &ModelConfig, embedding: Parameter, own: impl FnOnce() -> Parameter) -> Parameter {
    if config.tie_weights { embedding } else { own() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first values of the parameter whose name ends so.
    fn drawn(config: &ModelConfig, ending: &str) -> Vec<f32> {
        let model = LanguageModel::new(&ModelConfig { vocab_size: 7, ..config.clone() }).unwrap();
        let index = model.specs().iter().position(|spec| spec.name.ends_with(ending)).unwrap();
        model.specs()[index].draw(1, index)
    }

    #[test]
    fn forget_gates_start_where_they_are_told() {
        let mut small = ModelConfig::default();
        assert_eq!(drawn(&small, "fgate.bias"), [3.0, 4.0, 5.0, 6.0]);
        small.mlstm.forget_gate_bias = [0.0, 6.0];
        assert_eq!(drawn(&small, "fgate.bias"), [0.0, 2.0, 4.0, 6.0]);
        let mut large = ModelConfig { family: Family::Large, ..ModelConfig::default() };
        assert_eq!(drawn(&large, "fgate_preact.bias"), [3.0, 4.0, 5.0, 6.0]);
        large.large.forget_gate_bias = [-1.0, 2.0];
        assert_eq!(drawn(&large, "fgate_preact.bias"), [-1.0, 0.0, 1.0, 2.0]);
    }
}
