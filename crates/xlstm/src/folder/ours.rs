//! Our own folders, for every family: `config.json` is
//! `{"format": "xlstm-model", "version": 1, "family": "small", "model": {…}}`, with every key that
//! the model's family has, and the tokens that end a text where they are not the tokenizer's.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Description;
use super::keys::Keys;
use crate::error::{Error, Result};
use crate::model::ModelConfig;

/// What the configuration carries under `format`.
pub(crate) const FORMAT: &str = "xlstm-model";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct ConfigFile {
    format: String,
    version: u32,
    family: String,
    model: Value,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    end_tokens: Option<Vec<u32>>,
}

/// Whether these are the keys of such a configuration.
pub(crate) fn is(keys: &Keys) -> bool {
    keys.text("format") == Some(FORMAT)
}

/// The content of `config.json`.
///
/// # Errors
/// When a number is not finite.
pub(crate) fn config_file(config: &ModelConfig, ends: Option<&[u32]>) -> Result<Value> {
    let file = ConfigFile {
        format: FORMAT.into(),
        version: VERSION,
        family: config.family.name().into(),
        model: config.to_json()?,
        end_tokens: ends.map(<[u32]>::to_vec),
    };
    serde_json::to_value(file).map_err(|e| Error::config(e.to_string()))
}

/// What the `config.json` at `path` says.
///
/// # Errors
/// When a key is missing, unknown or has a value of another kind, or the version is a later one.
pub(crate) fn describe(path: &Path, keys: Keys) -> Result<Description> {
    let foreign = |what: String| {
        Error::checkpoint(format!("{} does not describe an xlstm model: {what}", path.display()))
            .hint("expected the config.json that `xlstm train` writes")
    };
    let file: ConfigFile = serde_json::from_value(keys.whole()).map_err(|e| foreign(e.to_string()))?;
    if file.version > VERSION {
        return Err(foreign(format!("version {}, but this program knows {VERSION}", file.version))
            .hint("use a newer version of xlstm"));
    }
    let config: ModelConfig = serde_json::from_value(file.model).map_err(|e| foreign(e.to_string()))?;
    if config.family.name() != file.family {
        let (family, own) = (file.family, config.family.name());
        return Err(foreign(format!("family {family:?}, but its model is of {own}")));
    }
    Ok(Description { config, ends: file.end_tokens, warnings: Vec::new() })
}
