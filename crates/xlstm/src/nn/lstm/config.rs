//! The configuration of the LSTM baseline.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What the LSTM has besides the keys that families share.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct LstmConfig {
    /// Width H of the layers and of the head; 0 takes `embedding_dim`. Default 0.
    pub hidden_dim: usize,
    /// Where the sum of the two forget-gate biases starts; null = as the others, uniform within
    /// 1 / sqrt(H). Default null.
    pub forget_bias: Option<f64>,
}

impl LstmConfig {
    /// Width of the layers in a model with embeddings of width `dim`.
    pub fn hidden_dim(&self, dim: usize) -> usize {
        if self.hidden_dim == 0 { dim } else { self.hidden_dim }
    }

    /// Checks that the numbers fit together with embeddings of width `dim`.
    ///
    /// # Errors
    /// A configuration error that names the first key that does not fit, its value and what would.
    pub fn validate(&self, dim: usize, tied: bool) -> Result<()> {
        if let Some(bias) = self.forget_bias.filter(|bias| !bias.is_finite()) {
            return Err(Error::config(format!("model.lstm.forget_bias is {bias}"))
                .hint("model.lstm.forget_bias is a finite number, such as 1"));
        }
        let hidden = self.hidden_dim(dim);
        if tied && hidden != dim {
            return Err(Error::config(format!(
                "model.tie_weights is true, but model.lstm.hidden_dim is {hidden} and model.embedding_dim {dim}"
            ))
            .hint("a head that shares the embedding's weights needs both of one width"));
        }
        Ok(())
    }
}
