//! Model folders: everything that a model is, in three files.
//!
//! - `config.json`: `{"format": "xlstm-model", "version": 1, "family": "small", "model": {…}}`,
//!   the model's configuration with every key that its family has;
//! - `model.safetensors`: the parameters under their official names, in f32, bf16 or f16;
//! - `tokenizer.json`: our own format or Hugging Face's; absent for a model of bare ids.
//!
//! A folder is written beside its place and renamed, so it is whole or not there.

mod initial;
pub mod tensors;
pub mod weights;
pub mod writer;

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::engine::{Device, Format};
use crate::error::{Error, Result};
use crate::files::recover_folder;
use crate::model::{LanguageModel, ModelConfig, narrow_parameters};
use crate::nn::{ParameterSpec, Parameters, Weights};
use crate::rng::mix;
use crate::text::Tokenizer;
pub use initial::initialize;
use tensors::TensorFiles;
use weights::{Recipe, WeightFiles};
use writer::{Entry, write_tensors};

const FORMAT: &str = "xlstm-model";
const VERSION: u32 = 1;
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";

#[derive(Serialize, Deserialize)]
struct ConfigFile {
    format: String,
    version: u32,
    family: String,
    model: serde_json::Value,
}

/// A model in a folder. Its weights are read where they are needed, from the files that
/// were there when it was opened.
#[derive(Debug)]
pub struct ModelFolder {
    /// Where it was loaded from.
    pub path: PathBuf,
    /// The model.
    pub model: Arc<LanguageModel>,
    /// Its numbers.
    pub files: WeightFiles,
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
    write_with(path, model, tokenizer, Format::F32, |index, _| Cow::Borrowed(&parameters.values[index]))
}

/// The same in any number format, with the numbers of one parameter at a time.
///
/// # Errors
/// When a file cannot be written.
pub fn write_with<'a>(
    path: &Path,
    model: &LanguageModel,
    tokenizer: Option<&Tokenizer>,
    format: Format,
    mut values: impl FnMut(usize, &ParameterSpec) -> Cow<'a, [f32]>,
) -> Result<()> {
    let (family, config) = (model.config().family, model.config().to_json()?);
    let config =
        ConfigFile { format: FORMAT.into(), version: VERSION, family: family.name().into(), model: config };
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::config(e.to_string()))?;
    write_file(&path.join(CONFIG), (text + "\n").as_bytes())?;
    let specs = model.specs();
    let entry = |spec: &ParameterSpec| Entry { name: spec.name.clone(), shape: spec.shape.clone(), format };
    let entries: Vec<Entry> = specs.iter().map(entry).collect();
    write_tensors(&path.join(tensors::SINGLE), &entries, &[], |index| Ok(values(index, &specs[index])))?;
    match tokenizer {
        Some(tokenizer) => write_file(&path.join(TOKENIZER), tokenizer.to_json()?.as_bytes()),
        None => Ok(()),
    }
}

impl ModelFolder {
    /// Opens the model in `path`; of a run's folder, its best one. Of the weights only names,
    /// shapes and formats are read.
    ///
    /// # Errors
    /// When a file is missing, damaged, foreign, or does not belong to the others.
    pub fn load(path: &Path) -> Result<ModelFolder> {
        let path = locate(path)?;
        let config = read_config(&path.join(CONFIG))?;
        let model = LanguageModel::new(&config)?;
        let tensors = TensorFiles::open(&path)?;
        let files = WeightFiles::new(&path, &tensors, model.specs(), |spec| Recipe::tensor(&spec.name))?;
        if let Some(name) = files.unused().first() {
            return Err(Error::checkpoint(format!(
                "{} holds the tensor {name}, but the model has no such parameter",
                path.display()
            ))
            .hint("the weights belong to another model than the config.json beside them"));
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
        Ok(ModelFolder { path, model: Arc::new(model), files, tokenizer })
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

    /// The weights for inference on `device`: on the processor as they are stored, mapped where
    /// that is possible, so that memory holds no more than them; on a GPU in its precision.
    ///
    /// # Errors
    /// When a GPU's memory runs out.
    pub fn weights(&self, device: &Device) -> Result<Weights<f32>> {
        match device {
            Device::Cpu(_) => Ok(Weights::Stored(self.files.stored(&narrow_parameters(&self.model)?).into())),
            #[cfg(feature = "cuda")]
            Device::Cuda(..) => Weights::new(Arc::new(self.parameters()), device),
        }
    }

    /// All parameters in f32: what training starts from.
    pub fn parameters(&self) -> Parameters<f32> {
        self.files.parameters()
    }

    /// A number that tells models apart: of the configuration and of all parameters as they are
    /// stored. It reads them all.
    pub fn fingerprint(&self) -> String {
        let config = format!("{:?}", self.model.config());
        let hash = config.bytes().fold(self.files.hash(), |hash, byte| mix(hash ^ u64::from(byte)));
        format!("{hash:016x}")
    }
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
