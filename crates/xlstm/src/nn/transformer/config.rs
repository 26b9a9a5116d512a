//! The configuration of the Transformer baseline.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::nn::config::{at_least_one, divides, positive};

/// How tokens know where they stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum PositionKind {
    /// Queries and keys are turned by their position: documents of any length.
    Rotary,
    /// A vector for each of `context_length` positions is added to the embedding: documents of at
    /// most that length.
    Learned,
}

/// What the Transformer has besides the keys that families share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct TransformerConfig {
    /// Attention heads. Default 4.
    pub num_heads: usize,
    /// How many tokens a token sees, itself included. Default 256.
    pub context_length: usize,
    /// `rotary`, or `learned` vectors. Default `rotary`.
    pub positions: PositionKind,
    /// Base of the rotary frequencies. Default 10000.
    pub rotary_base: f64,
    /// Inner width of the feed-forward layer over `embedding_dim`. Default 4.
    pub ffn_factor: usize,
    /// Whether the projections have biases; the norms always have. Default false.
    pub bias: bool,
}

impl Default for TransformerConfig {
    fn default() -> Self {
        TransformerConfig {
            num_heads: 4,
            context_length: 256,
            positions: PositionKind::Rotary,
            rotary_base: 10_000.0,
            ffn_factor: 4,
            bias: false,
        }
    }
}

impl TransformerConfig {
    /// Checks that the numbers fit together in a model of width `dim`.
    ///
    /// # Errors
    /// A configuration error that names the first key that does not fit, its value and what would.
    pub fn validate(&self, dim: usize) -> Result<()> {
        at_least_one("model.transformer.num_heads", self.num_heads)?;
        at_least_one("model.transformer.context_length", self.context_length)?;
        at_least_one("model.transformer.ffn_factor", self.ffn_factor)?;
        positive("model.transformer.rotary_base", self.rotary_base)?;
        divides("model.transformer.num_heads", self.num_heads, dim, "model.embedding_dim")?;
        let size = dim / self.num_heads;
        if self.positions == PositionKind::Rotary && !size.is_multiple_of(2) {
            return Err(Error::config(format!(
                "model.transformer.num_heads is {}, which leaves {size} features a head; rotary positions need \
                 an even number",
                self.num_heads
            ))
            .hint("choose another number of heads, or positions: learned"));
        }
        Ok(())
    }
}
