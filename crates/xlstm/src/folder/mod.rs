//! Model folders: everything that a model is, in three files.
//!
//! - `config.json`: `{"format": "xlstm-model", "version": 1, "family": "small", "model": {…}}`,
//!   the model's configuration with every key that its family has;
//! - `model.safetensors`: the parameters under their official names, f32;
//! - `tokenizer.json`: our own format or Hugging Face's; absent for a model of bare ids.
//!
//! A folder is written beside its place and renamed, so it is whole or not there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::recover_folder;
use crate::model::{LanguageModel, ModelConfig};
use crate::nn::Parameters;
use crate::rng::mix;
use crate::text::Tokenizer;

const FORMAT: &str = "xlstm-model";
const VERSION: u32 = 1;
const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";

#[derive(Serialize, Deserialize)]
struct ConfigFile {
    format: String,
    version: u32,
    family: String,
    model: serde_json::Value,
}

/// A model as loaded from a folder.
#[derive(Debug)]
pub struct ModelFolder {
    /// Where it was loaded from.
    pub path: PathBuf,
    /// The model.
    pub model: Arc<LanguageModel>,
    /// Its numbers.
    pub parameters: Arc<Parameters<f32>>,
    /// Its tokenizer, where it has one.
    pub tokenizer: Option<Tokenizer>,
}

/// Writes a model into the folder `path`, which exists.
///
/// # Errors
/// When a file cannot be written.
pub fn write(
    path: &Path,
    model: &LanguageModel,
    parameters: &Parameters<f32>,
    tokenizer: Option<&Tokenizer>,
) -> Result<()> {
    let (family, model) = (model.config().family, model.config().to_json()?);
    let config = ConfigFile { format: FORMAT.into(), version: VERSION, family: family.name().into(), model };
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::config(e.to_string()))?;
    write_file(&path.join(CONFIG), (text + "\n").as_bytes())?;
    let tensors = parameters.specs().iter().zip(&parameters.values);
    let tensors = tensors.map(|(spec, values)| (spec.name.clone(), spec.shape.clone(), values.as_slice()));
    write_tensors(&path.join(WEIGHTS), tensors)?;
    match tokenizer {
        Some(tokenizer) => write_file(&path.join(TOKENIZER), tokenizer.to_json()?.as_bytes()),
        None => Ok(()),
    }
}

impl ModelFolder {
    /// Loads the model in `path`; of a run's folder, its best one.
    ///
    /// # Errors
    /// When a file is missing, damaged, foreign, or does not belong to the others.
    pub fn load(path: &Path) -> Result<ModelFolder> {
        let path = locate(path)?;
        let config = read_config(&path.join(CONFIG))?;
        let model = LanguageModel::new(&config)?;
        let mut parameters = Parameters::zeros(model.specs());
        let weights = path.join(WEIGHTS);
        let mut missing: Vec<&str> = model.specs().iter().map(|spec| spec.name.as_str()).collect();
        read_tensors(&weights, |name, shape, values| {
            missing.retain(|other| *other != name);
            parameters.set(name, shape, values)
        })?;
        if let Some(name) = missing.first() {
            return Err(Error::checkpoint(format!("{} lacks the parameter {name}", weights.display()))
                .hint("the file belongs to another model than the config.json beside it"));
        }
        let file = path.join(TOKENIZER);
        let tokenizer = if file.exists() { Some(Tokenizer::from_file(&file)?) } else { None };
        if let Some(tokenizer) = &tokenizer
            && tokenizer.vocabulary_size() > config.vocab_size
        {
            return Err(Error::checkpoint(format!(
                "{} has {} tokens, the model {}",
                file.display(),
                tokenizer.vocabulary_size(),
                config.vocab_size
            ))
            .hint("the tokenizer does not belong to this model"));
        }
        Ok(ModelFolder { path, model: Arc::new(model), parameters: Arc::new(parameters), tokenizer })
    }

    /// The tokenizer, for uses that cannot do without.
    ///
    /// # Errors
    /// When the folder has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Error::checkpoint(format!("{} has no tokenizer.json", self.path.display()))
                .hint("give token ids with --prompt-ids")
        })
    }

    /// A number that tells models apart: of the configuration and all parameters.
    pub fn fingerprint(&self) -> String {
        fingerprint(self.model.config(), &self.parameters)
    }
}

/// The fingerprint of a model with these parameters.
pub fn fingerprint(config: &ModelConfig, parameters: &Parameters<f32>) -> String {
    let mut hash = 0;
    let mut add = |x: u64| hash = mix(hash ^ x);
    format!("{config:?}").bytes().for_each(|byte| add(u64::from(byte)));
    parameters.values.iter().flatten().for_each(|x| add(u64::from(x.to_bits())));
    format!("{hash:016x}")
}

/// The folder itself, or the best model in the folder of a run.
fn locate(path: &Path) -> Result<PathBuf> {
    if path.join(CONFIG).exists() {
        return Ok(path.to_owned());
    }
    for inner in ["best", "last"].map(|name| path.join(name)) {
        if recover_folder(&inner)? && inner.join(CONFIG).exists() {
            return Ok(inner);
        }
    }
    if recover_folder(path)? && path.join(CONFIG).exists() {
        return Ok(path.to_owned());
    }
    let error = match path.exists() {
        true => Error::checkpoint(format!("{} is no model folder: it has no {CONFIG}", path.display())),
        false => Error::checkpoint(format!("there is no model folder {}", path.display())),
    };
    Err(error.hint("`xlstm train` writes model folders, for instance out/1/best"))
}

fn read_config(path: &Path) -> Result<ModelConfig> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
    let foreign = |what: String| {
        Error::checkpoint(format!("{} does not describe an xlstm model: {what}", path.display()))
            .hint("expected the config.json that `xlstm train` writes")
    };
    let file: ConfigFile = serde_json::from_str(&text).map_err(|e| foreign(e.to_string()))?;
    if file.format != FORMAT {
        return Err(foreign(format!("its format is {:?}", file.format)));
    }
    if file.version > VERSION {
        return Err(foreign(format!("version {}, but this program knows {VERSION}", file.version))
            .hint("use a newer version of xlstm"));
    }
    let model: ModelConfig = serde_json::from_value(file.model).map_err(|e| foreign(e.to_string()))?;
    if model.family.name() != file.family {
        return Err(foreign(format!(
            "family {:?}, but its model is of {}",
            file.family,
            model.family.name()
        )));
    }
    Ok(model)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|e| Error::io("write", path, &e))
}

/// Writes f32 tensors (name, shape, values) to a safetensors file.
pub(crate) fn write_tensors<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (String, Vec<usize>, &'a [f32])>,
) -> Result<()> {
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .map(|(name, shape, values)| (name, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let invalid =
        |e: safetensors::SafeTensorError| Error::checkpoint(format!("cannot write {}: {e}", path.display()));
    let mut views = Vec::with_capacity(bytes.len());
    for (name, shape, bytes) in &bytes {
        views.push((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(invalid)?));
    }
    let file = safetensors::serialize(views, None).map_err(invalid)?;
    write_file(path, &file)
}

/// Reads a safetensors file and gives every tensor (name, shape, values) to `take`.
pub(crate) fn read_tensors(
    path: &Path,
    mut take: impl FnMut(&str, &[usize], Vec<f32>) -> Result<()>,
) -> Result<()> {
    let file = std::fs::read(path).map_err(|e| Error::io("read", path, &e))?;
    let damaged = |what: String| {
        Error::checkpoint(format!("{} is damaged: {what}", path.display()))
            .hint("the file may be cut short; use another checkpoint of the run")
    };
    let tensors = SafeTensors::deserialize(&file).map_err(|e| damaged(e.to_string()))?;
    for (name, view) in tensors.iter() {
        if view.dtype() != Dtype::F32 {
            return Err(damaged(format!("{name} is {:?}, expected F32", view.dtype())));
        }
        let values = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        take(name, view.shape(), values)?;
    }
    Ok(())
}
