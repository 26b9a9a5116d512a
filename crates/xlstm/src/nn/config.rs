//! The configuration of a language model: its family, the keys that families share, those of the
//! small family (mLSTM and sLSTM residual blocks), and a section for each other family.
//!
//! Keys that the original's configuration has keep its spelling, so that a folder of its
//! and a file of ours say the same thing in the same words.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::large::LargeConfig;
use super::lstm::LstmConfig;
use super::original::OriginalConfig;
use super::slstm_at::SlstmAt;
use super::transformer::TransformerConfig;
use crate::cell::slstm::CellFunction;
use crate::cell::{ForgetGate, InputGate};
use crate::error::{Error, Result};
use crate::ops::activation::Activation;

/// Which architecture a model has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// mLSTM and sLSTM blocks of the paper.
    #[default]
    Small,
    /// The blocks of the published 7B model.
    Large,
    /// Layers of the classic LSTM: a baseline.
    Lstm,
    /// A GPT-style Transformer: a baseline.
    Transformer,
    /// The blocks of the Python original.
    Original,
}

impl Family {
    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Family::Small => "small",
            Family::Large => "large",
            Family::Lstm => "lstm",
            Family::Transformer => "transformer",
            Family::Original => "original",
        }
    }

    /// The keys of a model's configuration that this family has, besides those that all have.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Family::Small => &[
                "slstm_at",
                "dropout",
                "bias",
                "tie_weights",
                "weight_decay_on_embedding",
                "add_embedding_dropout",
                "add_post_blocks_norm",
                "mlstm",
                "slstm",
                "feedforward",
            ],
            Family::Large => &["tie_weights", "weight_decay_on_embedding", "large"],
            Family::Lstm => &["dropout", "tie_weights", "weight_decay_on_embedding", "lstm"],
            Family::Transformer => &["dropout", "tie_weights", "weight_decay_on_embedding", "transformer"],
            Family::Original => &["dropout", "weight_decay_on_embedding", "original"],
        }
    }
}

/// A language model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// `small` (mLSTM and sLSTM blocks), `large` (those of the published 7B model), `original` (those
    /// of the Python original), or one of the baselines `lstm` and `transformer`. Default `small`.
    pub family: Family,
    /// Number of token ids; 0 takes it from the tokenizer. Default 0.
    pub vocab_size: usize,
    /// Width D of the residual stream. Default 128.
    pub embedding_dim: usize,
    /// Number of residual blocks, or of LSTM layers. Default 4.
    pub num_blocks: usize,
    /// Which blocks are sLSTM blocks: positions counted from 0, `all`, `none`, or a ratio
    /// mLSTM:sLSTM such as `7:1`. Default `none`.
    pub slstm_at: SlstmAt,
    /// Dropout after each mLSTM and sLSTM layer and, with `add_embedding_dropout`, after the
    /// embedding; between LSTM layers; after a Transformer's embedding, attention and
    /// feed-forward layers; in the original family between the cells of a block and before what it
    /// adds to the residual stream. A probability in [0, 1). Default 0.
    pub dropout: f64,
    /// Whether the mLSTM layers' projections have biases. Default false.
    pub bias: bool,
    /// Whether the head shares the embedding's weights. Default false.
    pub tie_weights: bool,
    /// Whether weight decay reaches the embedding. Default false.
    pub weight_decay_on_embedding: bool,
    /// Whether dropout follows the embedding. Default false.
    pub add_embedding_dropout: bool,
    /// Whether a layer norm ends the stack. Default true.
    pub add_post_blocks_norm: bool,
    /// The mLSTM blocks.
    pub mlstm: MlstmConfig,
    /// The sLSTM blocks.
    pub slstm: SlstmConfig,
    /// The gated feed-forward layer of the sLSTM blocks.
    pub feedforward: FeedforwardConfig,
    /// What the large family has.
    pub large: LargeConfig,
    /// What the LSTM has.
    pub lstm: LstmConfig,
    /// What the Transformer has.
    pub transformer: TransformerConfig,
    /// What the original family has.
    pub original: OriginalConfig,
}

/// The mLSTM layer: matrix memory between an up- and a down-projection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct MlstmConfig {
    /// Heads, each with a matrix memory of its own. Default 4.
    pub num_heads: usize,
    /// Taps of the causal convolution before queries and keys. Default 4.
    pub conv1d_kernel_size: usize,
    /// Width of the diagonal blocks of the query, key and value projections. Default 4.
    pub qkv_proj_blocksize: usize,
    /// Inner width over `embedding_dim`. Default 2.
    pub proj_factor: f64,
    /// The inner width is rounded up to a multiple of this. Default 64.
    pub round_proj_up_to_multiple_of: usize,
    /// Activation of the input gate. Default `exponential`.
    pub input_gate: InputGate,
    /// Activation of the forget gate. Default `sigmoid`.
    pub forget_gate: ForgetGate,
    /// Where the biases of the forget gates start: from the first to the second, evenly over the heads;
    /// lower is a shorter memory. Default [3, 6].
    pub forget_gate_bias: [f64; 2],
    /// Steps that are computed at once within a sequence; changes speed, not results. Default 64.
    pub chunk_size: usize,
    /// Added to the normaliser of the memory's output. Default 1e-6.
    pub eps: f64,
}

/// The sLSTM layer: scalar memories with recurrent connections within each head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct SlstmConfig {
    /// Heads; memories mix within a head only. Default 4.
    pub num_heads: usize,
    /// Taps of the causal convolution before the input and forget gates; 0 leaves it out. Default 4.
    pub conv1d_kernel_size: usize,
    /// The recurrence: `slstm`, or the classic `lstm` in its place. Default `slstm`.
    pub function: CellFunction,
    /// Start of the gate biases. Default `powerlaw_blockdependent`.
    pub bias_init: BiasInit,
    /// Start of the recurrent weights. Default `zeros`.
    pub recurrent_weight_init: RecurrentWeightInit,
    /// Activation of the input gate. Default `exponential`.
    pub input_gate: InputGate,
    /// Activation of the forget gate. Default `sigmoid`.
    pub forget_gate: ForgetGate,
    /// Whether gradients stop at the recurrent weights instead of flowing through time. Default false.
    pub gradient_recurrent_cut: bool,
    /// Largest magnitude of a gradient that flows back through the recurrent weights; null = no
    /// limit. Default null.
    pub gradient_recurrent_clipval: Option<f64>,
}

/// The gated feed-forward layer that follows each sLSTM layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct FeedforwardConfig {
    /// Inner width over `embedding_dim`. Default 1.3.
    pub proj_factor: f64,
    /// Activation of the gate. Default `gelu`.
    pub act_fn: Activation,
    /// The inner width is rounded up to a multiple of this. Default 64.
    pub round_proj_up_to_multiple_of: usize,
    /// Whether the projections have biases. Default false.
    pub bias: bool,
    /// Dropout after the layer, a probability in [0, 1). Default 0.
    pub dropout: f64,
}

/// The start of an sLSTM layer's gate biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum BiasInit {
    /// Forget-gate biases from 5 down to -7 on a power law within each head:
    /// `5 - 12 (j / (DH - 1))^(0.3 + 1.3 block / (num_blocks - 1))`; the others zero.
    PowerlawBlockdependent,
    /// Forget-gate biases in equal steps from 3 to 6 within each head, the others zero.
    SmallInit,
    /// Uniform in (-1 / sqrt(D), 1 / sqrt(D)).
    Standard,
    /// All zero.
    Zeros,
}

/// The start of an sLSTM layer's recurrent weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum RecurrentWeightInit {
    /// All zero.
    Zeros,
    /// Uniform in (-1 / sqrt(D), 1 / sqrt(D)).
    Standard,
}

/// The keys that all families have.
const SHARED: [&str; 4] = ["family", "vocab_size", "embedding_dim", "num_blocks"];

/// What a residual block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockKind {
    /// An mLSTM layer.
    Mlstm,
    /// An sLSTM layer and a feed-forward layer.
    Slstm,
}

impl Default for ModelConfig {
    fn default() -> Self {
        ModelConfig {
            family: Family::Small,
            vocab_size: 0,
            embedding_dim: 128,
            num_blocks: 4,
            slstm_at: SlstmAt::None,
            dropout: 0.0,
            bias: false,
            tie_weights: false,
            weight_decay_on_embedding: false,
            add_embedding_dropout: false,
            add_post_blocks_norm: true,
            mlstm: MlstmConfig::default(),
            slstm: SlstmConfig::default(),
            feedforward: FeedforwardConfig::default(),
            large: LargeConfig::default(),
            lstm: LstmConfig::default(),
            transformer: TransformerConfig::default(),
            original: OriginalConfig::default(),
        }
    }
}

impl Default for MlstmConfig {
    fn default() -> Self {
        MlstmConfig {
            num_heads: 4,
            conv1d_kernel_size: 4,
            qkv_proj_blocksize: 4,
            proj_factor: 2.0,
            round_proj_up_to_multiple_of: 64,
            input_gate: InputGate::Exponential,
            forget_gate: ForgetGate::Sigmoid,
            forget_gate_bias: [3.0, 6.0],
            chunk_size: 64,
            eps: 1e-6,
        }
    }
}

impl Default for SlstmConfig {
    fn default() -> Self {
        SlstmConfig {
            num_heads: 4,
            conv1d_kernel_size: 4,
            function: CellFunction::Slstm,
            bias_init: BiasInit::PowerlawBlockdependent,
            recurrent_weight_init: RecurrentWeightInit::Zeros,
            input_gate: InputGate::Exponential,
            forget_gate: ForgetGate::Sigmoid,
            gradient_recurrent_cut: false,
            gradient_recurrent_clipval: None,
        }
    }
}

impl Default for FeedforwardConfig {
    fn default() -> Self {
        FeedforwardConfig {
            proj_factor: 1.3,
            act_fn: Activation::Gelu,
            round_proj_up_to_multiple_of: 64,
            bias: false,
            dropout: 0.0,
        }
    }
}

impl ModelConfig {
    /// The inner width of an mLSTM layer: `ceil(proj_factor * D / m) * m` with
    /// `m = round_proj_up_to_multiple_of`.
    pub fn inner_dim(&self) -> usize {
        round_up(self.mlstm.proj_factor, self.embedding_dim, self.mlstm.round_proj_up_to_multiple_of)
    }

    /// The inner width of a feed-forward layer, rounded in the same way.
    pub fn feedforward_dim(&self) -> usize {
        let layer = &self.feedforward;
        round_up(layer.proj_factor, self.embedding_dim, layer.round_proj_up_to_multiple_of)
    }

    /// What each block holds, first block first.
    pub fn block_kinds(&self) -> Vec<BlockKind> {
        (0..self.num_blocks)
            .map(|block| if self.slstm_at.contains(block) { BlockKind::Slstm } else { BlockKind::Mlstm })
            .collect()
    }

    /// The blocks in words: `mlstm slstm`, or of another family how many: `4 transformer`.
    pub fn blocks_in_words(&self) -> String {
        if self.family != Family::Small {
            return format!("{} {}", self.num_blocks, self.family.name());
        }
        let name = |kind: &BlockKind| if *kind == BlockKind::Mlstm { "mlstm" } else { "slstm" };
        self.block_kinds().iter().map(name).collect::<Vec<_>>().join(" ")
    }

    /// Checks that the numbers fit together.
    ///
    /// # Errors
    /// A configuration error that names the first key that does not fit, its value and what would.
    /// Sections of blocks that the model does not have are checked for sense but not for fit.
    pub fn validate(&self) -> Result<()> {
        at_least_one("model.embedding_dim", self.embedding_dim)?;
        at_least_one("model.num_blocks", self.num_blocks)?;
        // Far beyond any model, and within what a list of blocks may hold.
        if self.num_blocks > 10_000 {
            return Err(Error::config(format!("model.num_blocks is {}", self.num_blocks))
                .hint("model.num_blocks is at most 10000"));
        }
        self.refuse_foreign_keys()?;
        match self.family {
            Family::Small => self.validate_small(),
            Family::Large => self.large.validate(self.embedding_dim),
            Family::Lstm => {
                probability("model.dropout", self.dropout)?;
                self.lstm.validate(self.embedding_dim, self.tie_weights)
            }
            Family::Transformer => {
                probability("model.dropout", self.dropout)?;
                self.transformer.validate(self.embedding_dim)
            }
            Family::Original => {
                probability("model.dropout", self.dropout)?;
                self.original.validate()
            }
        }
    }

    /// Checks that the numbers fit together and make a model that predicts each token from those
    /// before it.
    ///
    /// # Errors
    /// As [`validate`](Self::validate), and where blocks read from both ends.
    pub fn validate_causal(&self) -> Result<()> {
        self.validate()?;
        if self.family == Family::Original && self.original.bidirectional {
            return Err(Error::config(
                "model.original.bidirectional is true, but a language model predicts each token from those before \
                 it: read from both ends, a sequence shows it the tokens that it is to predict",
            )
            .hint("set bidirectional: false; encoders and classifiers (model::OriginalStack) may read both ways"));
        }
        Ok(())
    }

    /// The configuration as JSON, without the keys of other families.
    ///
    /// # Errors
    /// When a number is not finite.
    pub fn to_json(&self) -> Result<Value> {
        let mut all = serde_json::to_value(self).map_err(|e| Error::config(e.to_string()))?;
        if let Value::Object(map) = &mut all {
            map.retain(|key, _| SHARED.contains(&key.as_str()) || self.family.keys().contains(&key.as_str()));
        }
        Ok(all)
    }

    /// Refuses a key that is set and that this family does not have.
    fn refuse_foreign_keys(&self) -> Result<()> {
        let json = |config: &ModelConfig| serde_json::to_value(config).unwrap_or_default();
        let (own, default) = (json(self), json(&ModelConfig::default()));
        for (key, value) in own.as_object().into_iter().flatten() {
            let known = SHARED.contains(&key.as_str()) || self.family.keys().contains(&key.as_str());
            if !known && *value != default[key] {
                let family = self.family.name();
                return Err(Error::config(format!(
                    "model.{key} is set, but model.family is {family}, which does not have it"
                ))
                .hint(format!(
                    "the keys of {family} are {}, {}",
                    SHARED.join(", "),
                    self.family.keys().join(", ")
                )));
            }
        }
        Ok(())
    }

    fn validate_small(&self) -> Result<()> {
        probability("model.dropout", self.dropout)?;
        if let SlstmAt::Positions(positions) = &self.slstm_at {
            for (index, &position) in positions.iter().enumerate() {
                if position >= self.num_blocks {
                    let (last, blocks) = (self.num_blocks - 1, self.num_blocks);
                    return Err(Error::config(format!(
                        "model.slstm_at holds {position}, but model.num_blocks is {blocks}"
                    ))
                    .hint(format!("positions count from 0; the last block is {last}")));
                }
                if positions[..index].contains(&position) {
                    return Err(Error::config(format!("model.slstm_at holds {position} twice"))
                        .hint("name each block once"));
                }
            }
        }
        let kinds = self.block_kinds();
        self.validate_mlstm(kinds.contains(&BlockKind::Mlstm))?;
        self.validate_slstm(kinds.contains(&BlockKind::Slstm))
    }

    fn validate_mlstm(&self, used: bool) -> Result<()> {
        let mlstm = &self.mlstm;
        at_least_one("model.mlstm.num_heads", mlstm.num_heads)?;
        at_least_one("model.mlstm.conv1d_kernel_size", mlstm.conv1d_kernel_size)?;
        at_least_one("model.mlstm.qkv_proj_blocksize", mlstm.qkv_proj_blocksize)?;
        at_least_one("model.mlstm.round_proj_up_to_multiple_of", mlstm.round_proj_up_to_multiple_of)?;
        at_least_one("model.mlstm.chunk_size", mlstm.chunk_size)?;
        positive("model.mlstm.proj_factor", mlstm.proj_factor)?;
        positive("model.mlstm.eps", mlstm.eps)?;
        finite("model.mlstm.forget_gate_bias", mlstm.forget_gate_bias)?;
        if used {
            let inner = self.inner_dim();
            let what = "the inner width of an mLSTM layer (proj_factor x embedding_dim, rounded up)";
            divides("model.mlstm.num_heads", mlstm.num_heads, inner, what)?;
            divides("model.mlstm.qkv_proj_blocksize", mlstm.qkv_proj_blocksize, inner, what)?;
        }
        Ok(())
    }

    fn validate_slstm(&self, used: bool) -> Result<()> {
        let (slstm, feedforward) = (&self.slstm, &self.feedforward);
        at_least_one("model.slstm.num_heads", slstm.num_heads)?;
        if let Some(limit) = slstm.gradient_recurrent_clipval {
            positive("model.slstm.gradient_recurrent_clipval", limit)?;
        }
        positive("model.feedforward.proj_factor", feedforward.proj_factor)?;
        at_least_one(
            "model.feedforward.round_proj_up_to_multiple_of",
            feedforward.round_proj_up_to_multiple_of,
        )?;
        probability("model.feedforward.dropout", feedforward.dropout)?;
        if used {
            divides("model.slstm.num_heads", slstm.num_heads, self.embedding_dim, "model.embedding_dim")?;
            // The power law runs over the places j / (DH - 1) of a head, which one place does not have.
            if slstm.bias_init == BiasInit::PowerlawBlockdependent && slstm.num_heads == self.embedding_dim {
                return Err(Error::config(format!(
                    "model.slstm.num_heads is {}, which leaves one unit a head, too few for model.slstm.bias_init \
                     powerlaw_blockdependent",
                    slstm.num_heads
                ))
                .hint("use fewer heads or bias_init: zeros"));
            }
        }
        Ok(())
    }
}

/// `ceil(factor * dim / multiple) * multiple`, in the original's order of operations.
fn round_up(factor: f64, dim: usize, multiple: usize) -> usize {
    ((factor * dim as f64 / multiple as f64).ceil() as usize).saturating_mul(multiple)
}

/// Refuses 0 for the whole number at `key`.
pub(crate) fn at_least_one<N: PartialEq + From<u8>>(key: &str, value: N) -> Result<()> {
    if value == N::from(0) {
        return Err(Error::config(format!("{key} is 0")).hint(format!("{key} is at least 1")));
    }
    Ok(())
}

/// Refuses all but finite numbers above zero at `key`.
pub(crate) fn positive(key: &str, value: f64) -> Result<()> {
    if !(value.is_finite() && value > 0.0) {
        return Err(Error::config(format!("{key} is {value}"))
            .hint(format!("{key} is a finite number greater than 0")));
    }
    Ok(())
}

/// Refuses a pair that is not of numbers at `key`.
pub(crate) fn finite(key: &str, pair: [f64; 2]) -> Result<()> {
    match pair.iter().all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err(Error::config(format!("{key} is [{}, {}]", pair[0], pair[1]))
            .hint(format!("{key} is a pair of finite numbers"))),
    }
}

/// Refuses all but [0, 1) at `key`.
pub(crate) fn probability(key: &str, value: f64) -> Result<()> {
    if !(0.0..1.0).contains(&value) {
        return Err(
            Error::config(format!("{key} is {value}")).hint(format!("{key} is at least 0 and less than 1"))
        );
    }
    Ok(())
}

/// Refuses a `value` at `key` that does not divide `whole`, and names the numbers that do.
pub(crate) fn divides(key: &str, value: usize, whole: usize, what: &str) -> Result<()> {
    if whole.is_multiple_of(value) {
        return Ok(());
    }
    let fitting: Vec<String> =
        (1..=whole.min(256)).filter(|&d| whole.is_multiple_of(d)).take(10).map(|d| d.to_string()).collect();
    Err(Error::config(format!("{key} is {value}, which does not divide {whole}, {what}"))
        .hint(format!("{key} can be {}", fitting.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(change: impl FnOnce(&mut ModelConfig)) -> ModelConfig {
        let mut model = ModelConfig::default();
        change(&mut model);
        model
    }

    #[test]
    fn widths_round_up_as_in_the_original() {
        let default = ModelConfig::default();
        assert_eq!((default.inner_dim(), default.feedforward_dim()), (256, 192));
        // The golden model: D = 24 gives E = 64 and F = 64.
        let golden = model(|m| m.embedding_dim = 24);
        assert_eq!((golden.inner_dim(), golden.feedforward_dim()), (64, 64));
        let exact = model(|m| m.mlstm.round_proj_up_to_multiple_of = 1);
        assert_eq!(exact.inner_dim(), 256);
    }

    #[test]
    fn block_kinds_follow_slstm_at() {
        use BlockKind::{Mlstm, Slstm};
        let mixed = model(|m| m.slstm_at = SlstmAt::Positions(vec![1]));
        assert_eq!(mixed.block_kinds(), [Mlstm, Slstm, Mlstm, Mlstm]);
        assert_eq!(ModelConfig::default().block_kinds(), [Mlstm; 4]);
        assert_eq!(mixed.blocks_in_words(), "mlstm slstm mlstm mlstm");
        assert_eq!(model(|m| m.family = Family::Transformer).blocks_in_words(), "4 transformer");
    }

    #[test]
    fn defaults_are_valid() {
        ModelConfig::default().validate().unwrap();
        model(|m| m.slstm_at = SlstmAt::All).validate().unwrap();
    }

    #[test]
    fn errors_name_the_key_the_value_and_what_fits() {
        let all = SlstmAt::All;
        let cases = [
            (model(|m| m.mlstm.num_heads = 3), "model.mlstm.num_heads is 3", "1, 2, 4, 8"),
            (model(|m| m.mlstm.qkv_proj_blocksize = 5), "qkv_proj_blocksize is 5", "1, 2, 4"),
            (model(|m| m.mlstm.conv1d_kernel_size = 0), "model.mlstm.conv1d_kernel_size is 0", "at least 1"),
            (
                model(|m| m.mlstm.forget_gate_bias = [f64::NAN, 6.0]),
                "model.mlstm.forget_gate_bias is [NaN, 6]",
                "finite",
            ),
            (
                model(|m| {
                    m.family = Family::Large;
                    m.large.forget_gate_bias = [0.0, f64::INFINITY];
                }),
                "model.large.forget_gate_bias is [0, inf]",
                "finite",
            ),
            (model(|m| m.dropout = 1.0), "model.dropout is 1", "less than 1"),
            (model(|m| m.dropout = f64::NAN), "model.dropout is NaN", "less than 1"),
            (
                model(|m| m.slstm_at = SlstmAt::Positions(vec![4])),
                "model.slstm_at holds 4",
                "last block is 3",
            ),
            (model(|m| m.slstm_at = SlstmAt::Positions(vec![1, 1])), "holds 1 twice", "once"),
            (
                model(|m| (m.slstm_at, m.slstm.num_heads) = (all.clone(), 3)),
                "model.slstm.num_heads is 3",
                "1, 2, 4",
            ),
            (
                model(|m| (m.slstm_at, m.slstm.num_heads) = (all.clone(), 128)),
                "one unit a head",
                "bias_init: zeros",
            ),
            (model(|m| m.feedforward.proj_factor = f64::INFINITY), "proj_factor is inf", "finite"),
            (model(|m| m.num_blocks = usize::MAX), "model.num_blocks is", "at most 10000"),
            (model(|m| m.embedding_dim = 0), "model.embedding_dim is 0", "at least 1"),
        ];
        for (config, message, hint) in cases {
            let error = config.validate().expect_err(message);
            assert!(error.to_string().contains(message), "{error}");
            assert!(error.hint_text().unwrap_or_default().contains(hint), "{error}: {:?}", error.hint_text());
        }
    }

    #[test]
    fn sections_of_absent_blocks_need_not_fit() {
        model(|m| m.slstm.num_heads = 3).validate().unwrap();
        model(|m| (m.slstm_at, m.mlstm.num_heads) = (SlstmAt::All, 3)).validate().unwrap();
    }

    #[test]
    fn a_configuration_survives_yaml() {
        let config = model(|m| {
            m.slstm_at = SlstmAt::Ratio { mlstm: 7, slstm: 1 };
            m.feedforward.act_fn = Activation::ReluSquared;
            m.slstm.gradient_recurrent_clipval = Some(0.1);
        });
        let yaml = serde_saphyr::to_string(&config).unwrap();
        assert_eq!(serde_saphyr::from_str::<ModelConfig>(&yaml).unwrap(), config, "{yaml}");
    }
}
