//! The configuration of the original's model, in its spelling where ours has no word for it.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::nn::config::{Family, ModelConfig, at_least_one, divides, positive};

/// What the family has besides the keys that all have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct OriginalConfig {
    /// Width H of the cells. Default 256.
    pub hidden_size: usize,
    /// Cells one after the other in each block, with `model.dropout` between them. Default 1.
    pub num_layers: usize,
    /// The cells: `slstm` or `mlstm` (also `sLSTM`, `mLSTM`). Default `slstm`.
    pub lstm_type: LstmType,
    /// Where the projection up is: `pre`, before the cells, or `post`, after them; null = `pre` for
    /// mLSTM, `post` for sLSTM. Default null.
    pub block: Option<BlockForm>,
    /// Heads of a cell: memories mix within a head only. Default 1.
    pub num_heads: usize,
    /// Width between the projections of a `post` block over `hidden_size`. Default 2.
    pub proj_factor: f64,
    /// Whether each block reads its sequences in both directions and adds what the two find; not
    /// for language models. Default false.
    pub bidirectional: bool,
    /// Steps of an mLSTM that are computed at once; changes speed, not results. Default 64.
    pub chunk_size: usize,
}

/// Which cell the blocks hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum LstmType {
    /// Scalar memories with recurrent connections within each head.
    #[default]
    #[serde(alias = "sLSTM")]
    Slstm,
    /// A matrix memory a head.
    #[serde(alias = "mLSTM")]
    Mlstm,
}

/// The two blocks of the original's article.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum BlockForm {
    /// Linear up, layer norm, cells, linear down.
    Pre,
    /// Cells, layer norm, linear up, GELU, linear down.
    Post,
}

impl Default for OriginalConfig {
    fn default() -> Self {
        OriginalConfig {
            hidden_size: 256,
            num_layers: 1,
            lstm_type: LstmType::Slstm,
            block: None,
            num_heads: 1,
            proj_factor: 2.0,
            bidirectional: false,
            chunk_size: 64,
        }
    }
}

impl OriginalConfig {
    /// The form of the blocks: the one that is set, or what fits the cell.
    pub fn block_form(&self) -> BlockForm {
        self.block.unwrap_or(match self.lstm_type {
            LstmType::Slstm => BlockForm::Post,
            LstmType::Mlstm => BlockForm::Pre,
        })
    }

    /// The width between the projections of a `post` block, rounded down.
    pub fn projected_size(&self) -> usize {
        (self.proj_factor * self.hidden_size as f64) as usize
    }

    /// Checks that the numbers fit together.
    ///
    /// # Errors
    /// A configuration error that names the first key that does not fit, its value and what would.
    pub fn validate(&self) -> Result<()> {
        at_least_one("model.original.hidden_size", self.hidden_size)?;
        at_least_one("model.original.num_layers", self.num_layers)?;
        at_least_one("model.original.num_heads", self.num_heads)?;
        at_least_one("model.original.chunk_size", self.chunk_size)?;
        let (heads, hidden) = (self.num_heads, self.hidden_size);
        divides("model.original.num_heads", heads, hidden, "model.original.hidden_size")?;
        positive("model.original.proj_factor", self.proj_factor)?;
        if self.projected_size() == 0 {
            return Err(Error::config(format!(
                "model.original.proj_factor is {}, which leaves no width",
                self.proj_factor
            ))
            .hint(format!("model.original.proj_factor is at least {}", 1.0 / hidden as f64)));
        }
        Ok(())
    }
}

impl ModelConfig {
    /// The original's model, its arguments in the original's order: `embedding_size` is
    /// [`embedding_dim`](ModelConfig::embedding_dim); the block form is what fits the cell. All
    /// else, such as the number of heads, is at its default and may be changed.
    ///
    /// ```
    /// use xlstm::model::{LanguageModel, LstmType, ModelConfig};
    ///
    /// let config = ModelConfig::original(1000, 128, 256, 1, 2, 0.1, false, LstmType::Slstm);
    /// assert_eq!(LanguageModel::new(&config)?.specs()[0].name, "embedding.weight");
    /// # Ok::<(), xlstm::Error>(())
    /// ```
    // The original's signature.
    #[allow(clippy::too_many_arguments)]
    pub fn original(
        vocab_size: usize,
        embedding_size: usize,
        hidden_size: usize,
        num_layers: usize,
        num_blocks: usize,
        dropout: f64,
        bidirectional: bool,
        lstm_type: LstmType,
    ) -> ModelConfig {
        let defaults = OriginalConfig::default();
        let original = OriginalConfig { hidden_size, num_layers, lstm_type, bidirectional, ..defaults };
        ModelConfig {
            family: Family::Original,
            vocab_size,
            embedding_dim: embedding_size,
            num_blocks,
            dropout,
            original,
            ..ModelConfig::default()
        }
    }
}
