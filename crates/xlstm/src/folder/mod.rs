//! Model folders: a configuration, weights in safetensors files, and where there is one a
//! tokenizer.
//!
//! | format | configuration | families |
//! |---|---|---|
//! | ours | `config.json` with `"format": "xlstm-model"` | all |
//! | Hugging Face's | `config.json` with `"model_type": "xlstm"`, `generation_config.json` | large |
//! | NX-AI's | `config.yaml` | large |
//! | the small family's official one | `config.yaml` or `config.json` with its keys | small |
//!
//! All of them are read; the first three are written. Opening a folder reads its configuration and
//! the headers of its weights, so that what does not fit is found before a weight is read. A folder
//! is written beside its place and renamed, so it is whole or not there.

pub mod convert;
#[cfg(feature = "download")]
pub mod download;
pub mod hub;
mod hugging_face;
mod initial;
mod keys;
mod names;
mod nx_ai;
mod ours;
mod small;
pub mod tensors;
pub mod weights;
pub mod writer;

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::engine::{Device, Format};
use crate::error::{Error, Result};
use crate::files::recover_folder;
use crate::model::{Family, LanguageModel, ModelConfig, storable_parameters};
use crate::nn::large::WeightMode;
use crate::nn::{ParameterSpec, Parameters, Weights};
use crate::rng::mix;
use crate::text::Tokenizer;
pub use initial::initialize;
use keys::Keys;
use tensors::TensorFiles;
use weights::{Recipe, WeightFiles};
use writer::{Entry, Part, write_tensors};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";

/// Who writes folders of this kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// This program.
    Ours,
    /// `transformers`.
    HuggingFace,
    /// NX-AI's program for the large family.
    NxAi,
    /// The official program for the small family.
    Small,
}

impl Kind {
    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Ours => "ours",
            Kind::HuggingFace => "Hugging Face",
            Kind::NxAi => "NX-AI",
            Kind::Small => "official, small family",
        }
    }

    /// How a parameter is made of the tensors of such a folder.
    fn recipe(self, config: &ModelConfig, files: &TensorFiles, spec: &ParameterSpec) -> Recipe {
        match (self, config.family) {
            (Kind::HuggingFace, _) => hugging_face::recipe(config, files, &spec.name),
            (Kind::Small, _) => small::recipe(config, files, spec),
            (_, Family::Large) => names::recipe(config, |name| files.get(name).is_some(), &spec.name),
            _ => Recipe::tensor(&spec.name),
        }
    }

    /// Our configuration keys, as an error names them, and this kind's.
    fn renamed_keys(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Kind::Ours => &[],
            Kind::HuggingFace => {
                &[("model.large.", ""), ("model.embedding_dim", "hidden_size"), ("model.", "")]
            }
            Kind::NxAi => &[("model.large.", ""), ("model.", "")],
            Kind::Small => &[
                ("model.mlstm.", "mlstm_block.mlstm."),
                ("model.slstm.", "slstm_block.slstm."),
                ("model.feedforward.", "slstm_block.feedforward."),
                ("model.", ""),
            ],
        }
    }
}

/// What a folder's configuration says.
#[derive(Debug)]
struct Description {
    config: ModelConfig,
    /// Tokens that end a text; None where nothing is said.
    ends: Option<Vec<u32>>,
    warnings: Vec<String>,
}

/// A model in a folder. Its weights are read where they are needed, from the files that
/// were there when it was opened.
#[derive(Debug)]
pub struct ModelFolder {
    /// Where it was loaded from.
    pub path: PathBuf,
    /// Who wrote it.
    pub kind: Kind,
    /// The model.
    pub model: Arc<LanguageModel>,
    /// Its numbers.
    pub files: WeightFiles,
    /// Its tokenizer, where it has one.
    pub tokenizer: Option<Tokenizer>,
    /// What the folder says that was not understood or not followed.
    pub warnings: Vec<String>,
    ends: Option<Vec<u32>>,
}

/// What is not in a folder or shall be otherwise.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// The configuration, where it lies elsewhere or has another name.
    pub config: Option<PathBuf>,
    /// Keys of another program's configuration and values in YAML, over those of the file.
    pub sets: Vec<(String, String)>,
    /// How weights of the large family that read the same input are kept in memory.
    pub weight_mode: Option<WeightMode>,
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
    write_json(&path.join(CONFIG), &ours::config_file(model.config(), None)?)?;
    let specs = model.specs();
    let part = Part::Dense(format);
    let entry = |spec: &ParameterSpec| Entry { name: spec.name.clone(), shape: spec.shape.clone(), part };
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
        ModelFolder::open(path, &OpenOptions::default())
    }

    /// The same with options.
    ///
    /// # Errors
    /// As [`load`](ModelFolder::load).
    pub fn open(path: &Path, options: &OpenOptions) -> Result<ModelFolder> {
        let (path, file) = match &options.config {
            Some(file) => (path.to_owned(), file.clone()),
            None => locate(path)?,
        };
        let mut keys = Keys::read(&file)?;
        for (key, value) in &options.sets {
            keys.override_with(key, value)?;
        }
        let (kind, keys) = kind_of(&file, keys)?;
        if kind == Kind::Ours && !options.sets.is_empty() {
            return Err(Error::config(format!(
                "{} is our own configuration, whose keys are not set",
                file.display()
            ))
            .hint("--set is for the configurations of other programs"));
        }
        let tensors = TensorFiles::open(&path)?;
        let Description { mut config, ends, warnings } = match kind {
            Kind::Ours => ours::describe(&file, keys)?,
            Kind::HuggingFace => hugging_face::describe(&path, keys, &tensors)?,
            Kind::NxAi => nx_ai::describe(keys)?,
            Kind::Small => small::describe(keys)?,
        };
        if let (Some(mode), Family::Large) = (options.weight_mode, config.family) {
            config.large.weight_mode = mode;
        }
        let model = modest(&config).and_then(|()| LanguageModel::new(&config));
        let model = model.map_err(|error| in_their_words(error, kind, &file))?;
        let files =
            WeightFiles::new(&path, &tensors, model.specs(), |spec| kind.recipe(&config, &tensors, spec))?;
        if let Some(name) = files.unused().first() {
            return Err(Error::checkpoint(format!(
                "{} holds the tensor {name}, but the model of {} has no such parameter",
                path.display(),
                file.display()
            ))
            .hint("the weights belong to another model than the configuration"));
        }
        let tokenizer = read_tokenizer(&path, config.vocab_size)?;
        Ok(ModelFolder { path, kind, model: Arc::new(model), files, tokenizer, warnings, ends })
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

    /// The tokens that end a text: those that the folder names, else the tokenizer's.
    pub fn end_tokens(&self) -> Vec<u32> {
        match &self.ends {
            Some(ends) => ends.clone(),
            None => self.tokenizer.as_ref().and_then(Tokenizer::end_of_text).into_iter().collect(),
        }
    }

    /// The weights for inference on `device`: on the processor as they are stored, mapped where
    /// that is possible, so that memory holds no more than them; on a GPU in its precision.
    ///
    /// # Errors
    /// When a GPU's memory runs out.
    pub fn weights(&self, device: &Device) -> Result<Weights<f32>> {
        match device {
            Device::Cpu(..) => {
                Ok(Weights::Stored(self.files.stored(&storable_parameters(&self.model)?).into()))
            }
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

/// The folder itself, or the best model in the folder of a run; and its configuration.
fn locate(path: &Path) -> Result<(PathBuf, PathBuf)> {
    let here = |path: &Path| {
        let json = path.join(CONFIG);
        json.exists().then(|| (path.to_owned(), json))
    };
    if let Some(found) = here(path) {
        return Ok(found);
    }
    for inner in ["best", "last"].map(|name| path.join(name)) {
        if recover_folder(&inner)?
            && let Some(found) = here(&inner)
        {
            return Ok(found);
        }
    }
    if recover_folder(path)?
        && let Some(found) = here(path)
    {
        return Ok(found);
    }
    // A run's folder has a config.yaml as well, but no weights beside it.
    let yaml = path.join(nx_ai::CONFIG);
    if yaml.exists() && tensors::has_weights(path) {
        return Ok((path.to_owned(), yaml));
    }
    if !path.exists() {
        return Err(Error::checkpoint(format!("there is no model folder {}", path.display()))
            .hint("`xlstm train` writes model folders, for instance out/1/best"));
    }
    Err(Error::checkpoint(format!(
        "{} is no model folder: it has neither {CONFIG} (ours, Hugging Face's) nor {} beside weights \
         (NX-AI's, the small family's official one) nor best/ or last/ (a run's)",
        path.display(),
        nx_ai::CONFIG
    ))
    .hint("`xlstm train` writes model folders, for instance out/1/best"))
}

/// Whose configuration these keys are, and those that matter: a section `model` where the rest is
/// about a run.
fn kind_of(file: &Path, mut keys: Keys) -> Result<(Kind, Keys)> {
    if ours::is(&keys) {
        return Ok((Kind::Ours, keys));
    }
    if let Some(other) = keys.text("model_type") {
        if other == hugging_face::MODEL_TYPE {
            return Ok((Kind::HuggingFace, keys));
        }
        return Err(Error::checkpoint(format!(
            "{}: model_type: expected {:?}, found {other:?}",
            file.display(),
            hugging_face::MODEL_TYPE
        ))
        .hint("this program runs xLSTM models only"));
    }
    if !small::is(&keys)
        && !nx_ai::is(&keys)
        && let Some(inner) = keys.section("model")?
    {
        keys = inner;
    }
    if small::is(&keys) {
        return Ok((Kind::Small, keys));
    }
    if nx_ai::is(&keys) {
        return Ok((Kind::NxAi, keys));
    }
    Err(Error::checkpoint(format!(
        "{} does not describe a model that we know: it has neither \"format\": {:?} (ours) nor \"model_type\": {:?} \
         (Hugging Face's) nor embedding_dim, num_heads, num_blocks and vocab_size (NX-AI's) nor mlstm_block, \
         slstm_block or slstm_at (the small family's official one)",
        file.display(),
        ours::FORMAT,
        hugging_face::MODEL_TYPE
    ))
    .hint("expected the folder of an xLSTM language model"))
}

/// Refuses sizes beyond any model, with which shapes could not be counted.
fn modest(config: &ModelConfig) -> Result<()> {
    let large = &config.large;
    let widest = [large.qk_dim_factor, large.v_dim_factor, large.ffn_proj_factor, config.mlstm.proj_factor]
        .into_iter()
        .chain([config.feedforward.proj_factor, 1.0])
        .fold(0.0, f64::max);
    let rounding = [
        large.ffn_round_up_to_multiple_of,
        config.mlstm.round_proj_up_to_multiple_of,
        config.feedforward.round_proj_up_to_multiple_of,
        config.mlstm.conv1d_kernel_size,
        config.slstm.conv1d_kernel_size,
    ];
    for (key, size) in
        [("model.vocab_size", config.vocab_size), ("model.embedding_dim", config.embedding_dim)]
            .into_iter()
            .chain(rounding.map(|size| ("a multiple or kernel size", size)))
    {
        if size > 1 << 28 {
            return Err(
                Error::config(format!("{key} is {size}")).hint(format!("{key} is at most {}", 1 << 28))
            );
        }
    }
    if widest * config.embedding_dim as f64 > f64::from(1 << 30) {
        return Err(Error::config(format!("a factor of model.embedding_dim is {widest}"))
            .hint("widths are at most a thousand million"));
    }
    Ok(())
}

/// An error about our configuration, as one about theirs.
fn in_their_words(error: Error, kind: Kind, file: &Path) -> Error {
    if kind == Kind::Ours {
        return error;
    }
    let renamed = |text: &str| {
        kind.renamed_keys().iter().fold(text.to_owned(), |text, (ours, theirs)| text.replace(ours, theirs))
    };
    let theirs = Error::checkpoint(format!("{}: {}", file.display(), renamed(&error.to_string())));
    theirs.hint(renamed(error.hint_text().unwrap_or("the configuration is damaged")))
}

fn read_tokenizer(folder: &Path, vocabulary: usize) -> Result<Option<Tokenizer>> {
    let file = folder.join(TOKENIZER);
    if !file.exists() {
        return Ok(None);
    }
    let tokenizer = Tokenizer::from_file(&file)?;
    if tokenizer.vocabulary_size() > vocabulary {
        return Err(Error::checkpoint(format!(
            "{} has {} tokens, the model {vocabulary}",
            file.display(),
            tokenizer.vocabulary_size(),
        ))
        .hint("the tokenizer does not belong to this model"));
    }
    Ok(Some(tokenizer))
}

/// What other programs call a number format.
fn readable(format: Format) -> &'static str {
    match format {
        Format::F32 => "float32",
        Format::Bf16 => "bfloat16",
        Format::F16 => "float16",
    }
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::config(e.to_string()))?;
    write_file(path, (text + "\n").as_bytes())
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|e| Error::io("write", path, &e))
}
