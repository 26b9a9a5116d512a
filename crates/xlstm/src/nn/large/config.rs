//! The configuration of the large family, in the spelling of its published folders.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::nn::config::{at_least_one, divides, finite, positive};

/// What the family has besides the keys that all have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct LargeConfig {
    /// Heads, each with a matrix memory of its own. Default 4.
    pub num_heads: usize,
    /// Width of all queries, and of all keys, over `embedding_dim`. Default 0.5.
    pub qk_dim_factor: f64,
    /// Width of all values over `embedding_dim`. Default 1.
    pub v_dim_factor: f64,
    /// Inner width of the feed-forward layer over `embedding_dim`. Default 2.6667.
    pub ffn_proj_factor: f64,
    /// That width is rounded up to a multiple of this. Default 64.
    pub ffn_round_up_to_multiple_of: usize,
    /// Whether the projections and norms have biases; the gates always have. Default false.
    pub use_bias: bool,
    /// Whether a norm ends the stack. Default true.
    pub add_out_norm: bool,
    /// Added to the mean square or variance of the norms. Default 1e-6.
    pub norm_eps: f64,
    /// Added to the normaliser of the memory's output. Default 1e-6.
    pub eps: f64,
    /// Gate pre-activations stay within plus and minus this; null = no limit. Default 15.
    pub gate_soft_cap: Option<f64>,
    /// Logits stay within plus and minus this; null = no limit. Default 30.
    pub output_logit_soft_cap: Option<f64>,
    /// Whether weights that read the same input are one matrix: `single` or `fused`. Default `single`.
    pub weight_mode: WeightMode,
    /// How parameters start: `hugging_face` or `pytorch`. Default `hugging_face`.
    pub initialization: Initialization,
    /// Where the biases of the forget gates start: from the first to the second, evenly over the heads;
    /// lower is a shorter memory. Default [3, 6].
    pub forget_gate_bias: [f64; 2],
    /// Steps that are computed at once within a sequence; changes speed, not results. Default 64.
    pub chunk_size: usize,
}

/// How the weights that read the same input are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum WeightMode {
    /// One by one, as published folders have them.
    Single,
    /// As contiguous rows of one matrix: queries, keys, values and output gate; input and forget
    /// gate; gate and up-projection of the feed-forward layer.
    Fused,
}

/// How the parameters of the large family start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Initialization {
    /// Of the Hugging Face implementation: normal with deviation sqrt(2 / (5 D)), what goes back
    /// to the residual stream with 2 / (blocks sqrt(width)), gates from their biases alone (-10 of
    /// the input gate, `forget_gate_bias` of the forget gate: 3 to 6).
    HuggingFace,
    /// Of PyTorch's layers, as NX-AI's implementation has it: uniform within 1 / sqrt(inputs),
    /// the embedding normal with deviation 1.
    Pytorch,
}

impl Default for LargeConfig {
    fn default() -> Self {
        LargeConfig {
            num_heads: 4,
            qk_dim_factor: 0.5,
            v_dim_factor: 1.0,
            ffn_proj_factor: 2.6667,
            ffn_round_up_to_multiple_of: 64,
            use_bias: false,
            add_out_norm: true,
            norm_eps: 1e-6,
            eps: 1e-6,
            gate_soft_cap: Some(15.0),
            output_logit_soft_cap: Some(30.0),
            weight_mode: WeightMode::Single,
            initialization: Initialization::HuggingFace,
            forget_gate_bias: [3.0, 6.0],
            chunk_size: 64,
        }
    }
}

impl LargeConfig {
    /// Widths of all queries, and of all values, in a model of width `dim`.
    pub fn head_dims(&self, dim: usize) -> [usize; 2] {
        [self.qk_dim_factor, self.v_dim_factor].map(|factor| (factor * dim as f64) as usize)
    }

    /// Inner width of the feed-forward layer in a model of width `dim`.
    pub fn feedforward_dim(&self, dim: usize) -> usize {
        let multiple = self.ffn_round_up_to_multiple_of;
        let rounded = (self.ffn_proj_factor * dim as f64 + multiple as f64 - 1.0) / multiple as f64;
        (rounded.floor() as usize).saturating_mul(multiple)
    }

    /// Checks that the numbers fit together in a model of width `dim`.
    ///
    /// # Errors
    /// A configuration error that names the first key that does not fit, its value and what would.
    pub fn validate(&self, dim: usize) -> Result<()> {
        at_least_one("model.large.num_heads", self.num_heads)?;
        at_least_one("model.large.chunk_size", self.chunk_size)?;
        at_least_one("model.large.ffn_round_up_to_multiple_of", self.ffn_round_up_to_multiple_of)?;
        positive("model.large.norm_eps", self.norm_eps)?;
        positive("model.large.eps", self.eps)?;
        finite("model.large.forget_gate_bias", self.forget_gate_bias)?;
        positive("model.large.gate_soft_cap", self.gate_soft_cap.unwrap_or(1.0))?;
        positive("model.large.output_logit_soft_cap", self.output_logit_soft_cap.unwrap_or(1.0))?;
        let [qk, v] = self.head_dims(dim);
        for (key, factor, width) in [
            ("model.large.qk_dim_factor", self.qk_dim_factor, qk),
            ("model.large.v_dim_factor", self.v_dim_factor, v),
            ("model.large.ffn_proj_factor", self.ffn_proj_factor, self.feedforward_dim(dim)),
        ] {
            positive(key, factor)?;
            if width == 0 {
                return Err(Error::config(format!("{key} is {factor}, which leaves no width"))
                    .hint(format!("{key} is at least {}", 1.0 / dim as f64)));
            }
        }
        let what = |of: &str| format!("the width of all {of} ({of} factor x embedding_dim)");
        divides("model.large.num_heads", self.num_heads, qk, &what("queries"))?;
        divides("model.large.num_heads", self.num_heads, v, &what("values"))
    }
}
