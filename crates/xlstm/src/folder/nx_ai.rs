//! NX-AI's folders of the large family: `config.yaml` and `model.safetensors` or
//! `model_0.safetensors`, `model_1.safetensors`, … without an index. Parameters have the names that
//! we use, weights are always single.

use serde_json::{Value, json};

use super::Description;
use super::hugging_face::shared_keys;
use super::keys::Keys;
use crate::error::{Error, Result};
use crate::model::{Family, ModelConfig};
use crate::nn::large::{LargeConfig, WeightMode};

/// The configuration file.
pub(crate) const CONFIG: &str = "config.yaml";

/// Whether these are the keys of such a configuration.
pub(crate) fn is(keys: &Keys) -> bool {
    ["embedding_dim", "num_heads", "num_blocks", "vocab_size"].iter().all(|key| keys.has(key))
}

/// What the configuration says.
///
/// # Errors
/// When a key has a value of another kind.
pub(crate) fn describe(mut keys: Keys) -> Result<Description> {
    let mut config =
        ModelConfig { family: Family::Large, large: LargeConfig::default(), ..ModelConfig::default() };
    keys.count("embedding_dim", &mut config.embedding_dim)?;
    keys.count("num_blocks", &mut config.num_blocks)?;
    shared_keys(&mut keys, &mut config)?;
    // Whatever was used in training: that implementation's files are single, and its loader says so.
    config.large.weight_mode = WeightMode::Single;
    Ok(Description { config, ends: None, warnings: keys.finish() })
}

/// The content of `config.yaml`: the keys that change a result, and that the model is for inference.
///
/// # Errors
/// When the model has what the format cannot express.
pub(crate) fn config_file(config: &ModelConfig) -> Result<Value> {
    if config.family != Family::Large {
        return Err(Error::config(format!(
            "an NX-AI folder is written for models of the large family, and this one is of the {} family",
            config.family.name()
        ))
        .hint("`--to ours` holds every family"));
    }
    let large = &config.large;
    if large.weight_mode == WeightMode::Fused {
        return Err(Error::config("an NX-AI folder holds single weights, and fused ones are asked for")
            .hint("leave --weights out, or give --weights single"));
    }
    Ok(json!({
        "embedding_dim": config.embedding_dim,
        "num_heads": large.num_heads,
        "num_blocks": config.num_blocks,
        "vocab_size": config.vocab_size,
        "use_bias": large.use_bias,
        "norm_eps": large.norm_eps,
        "add_out_norm": large.add_out_norm,
        "qk_dim_factor": large.qk_dim_factor,
        "v_dim_factor": large.v_dim_factor,
        "chunk_size": large.chunk_size,
        "return_last_states": true,
        "mode": "inference",
        "eps": large.eps,
        "ffn_proj_factor": large.ffn_proj_factor,
        "ffn_round_up_to_multiple_of": large.ffn_round_up_to_multiple_of,
        "gate_soft_cap": large.gate_soft_cap,
        "output_logit_soft_cap": large.output_logit_soft_cap,
        "weight_mode": "single",
    }))
}
