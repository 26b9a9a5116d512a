//! What a run needs to go on bit for bit: the model folder's files and, beside them,
//! `training.json` (where the run stands) and `training.safetensors` (both moments of every
//! parameter, and the state that is carried from batch to batch); of a run on a GPU also
//! `algorithms.json` (which of several algorithms every matrix product takes).

use std::borrow::Cow;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::engine::Format;
use crate::error::{Error, Result};
use crate::files::{partial_folder, replace_folder};
use crate::folder::tensors::TensorFile;
use crate::folder::writer::{Entry, Part, write_tensors};
use crate::folder::{self};
use crate::model::LanguageModel;
use crate::nn::Parameters;
use crate::text::Tokenizer;

const VERSION: u32 = 1;
const PROGRESS: &str = "training.json";
const TENSORS: &str = "training.safetensors";
const ALGORITHMS: &str = "algorithms.json";

/// Where a run stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standing {
    /// Version of this file.
    pub version: u32,
    /// Steps done.
    pub step: u64,
    /// Targets learnt from so far.
    pub tokens: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// Lowest validation loss so far, in nats a token.
    pub best: Option<f64>,
    /// Validations since then.
    pub validations_since_best: u64,
    /// Fingerprint of the training tokens: going on with other text would be another run.
    pub corpus: String,
}

impl Standing {
    /// A run over this corpus that has not begun.
    pub fn start(corpus: String) -> Standing {
        Standing {
            version: VERSION,
            step: 0,
            tokens: 0,
            seconds: 0.0,
            best: None,
            validations_since_best: 0,
            corpus,
        }
    }
}

/// The numbers of a run: what training goes on from.
#[derive(Clone, Debug)]
pub struct Snapshot<'a> {
    /// The parameters.
    pub parameters: Cow<'a, Parameters<f32>>,
    /// AdamW's first moments and Muon's momenta, one buffer a parameter.
    pub first: Cow<'a, [Vec<f32>]>,
    /// AdamW's second moments; of what Muon updates, zeros.
    pub second: Cow<'a, [Vec<f32>]>,
    /// The state carried from batch to batch, part by part; empty where none is.
    pub carried: Vec<Vec<f32>>,
    /// A GPU's choice of algorithms for matrix products, on which the last bits depend.
    pub algorithms: Option<String>,
}

/// Replaces the checkpoint in `target` by the present state of a run.
///
/// # Errors
/// When a file cannot be written; the old checkpoint is then still there.
pub fn save(
    target: &Path,
    model: &LanguageModel,
    tokenizer: &Tokenizer,
    snapshot: &Snapshot<'_>,
    standing: &Standing,
) -> Result<()> {
    let Snapshot { parameters, first, second, carried, algorithms } = snapshot;
    let partial = partial_folder(target)?;
    folder::write(&partial, model, parameters, Some(tokenizer))?;
    let text = serde_json::to_string_pretty(standing).map_err(|e| Error::checkpoint(e.to_string()))?;
    let path = partial.join(PROGRESS);
    std::fs::write(&path, text + "\n").map_err(|e| Error::io("write", &path, &e))?;
    if let Some(algorithms) = algorithms {
        let path = partial.join(ALGORITHMS);
        std::fs::write(&path, algorithms).map_err(|e| Error::io("write", &path, &e))?;
    }
    let names = parameters.specs().iter().map(|spec| spec.name.as_str());
    let firsts = names.clone().map(|name| format!("first.{name}")).zip(first.iter());
    let seconds = names.map(|name| format!("second.{name}")).zip(second.iter());
    let state = carried.iter().enumerate().map(|(i, part)| (format!("carried.{i}"), part));
    let (names, values): (Vec<String>, Vec<&Vec<f32>>) = firsts.chain(seconds).chain(state).unzip();
    let entry = |(name, values): (String, &&Vec<f32>)| Entry {
        name,
        shape: vec![values.len()],
        part: Part::Dense(Format::F32),
    };
    let entries: Vec<Entry> = names.into_iter().zip(&values).map(entry).collect();
    write_tensors(&partial.join(TENSORS), &entries, &[], |index| {
        Ok(Cow::Borrowed(values[index].as_slice()))
    })?;
    replace_folder(&partial, target)
}

/// Reads the checkpoint in `target` of a run of `model`: where it stood, and its numbers.
///
/// # Errors
/// When a file is missing, damaged or of another model.
pub fn load(target: &Path, model: &LanguageModel) -> Result<(Standing, Snapshot<'static>)> {
    let loaded = folder::ModelFolder::load(target)?;
    let specs = model.specs();
    if loaded.model.specs() != specs {
        return Err(Error::checkpoint(format!(
            "{} holds a model of another configuration",
            target.display()
        ))
        .hint("resume a run with the config.yaml in its folder, unchanged"));
    }
    let parameters = loaded.parameters();
    let path = target.join(PROGRESS);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, &e))?;
    let standing: Standing = serde_json::from_str(&text)
        .map_err(|e| Error::checkpoint(format!("{} is damaged: {e}", path.display())))?;
    if standing.version != VERSION {
        return Err(Error::checkpoint(format!("{} is of version {}", path.display(), standing.version)));
    }
    let (mut first, mut second) = (parameters.zeros_like(), parameters.zeros_like());
    let mut carried = Vec::new();
    let path = target.join(TENSORS);
    let foreign = |name: &str| {
        Error::checkpoint(format!("{} holds {name}, which the model does not have", path.display()))
    };
    for tensor in TensorFile::open(&path)?.iter() {
        let (name, values) = (tensor.name, tensor.to_f32()?);
        let (kind, rest) = name.split_once('.').ok_or_else(|| foreign(name))?;
        if kind == "carried" {
            let index: usize = rest.parse().map_err(|_| foreign(name))?;
            carried.push((index, values));
            continue;
        }
        let index = specs.iter().position(|spec| spec.name == rest).ok_or_else(|| foreign(name))?;
        let moments = if kind == "first" { &mut first } else { &mut second };
        if moments[index].len() != values.len() {
            return Err(foreign(name));
        }
        moments[index] = values;
    }
    carried.sort_by_key(|(index, _)| *index);
    let carried = carried.into_iter().map(|(_, part)| part).collect();
    let (parameters, first, second) = (Cow::Owned(parameters), Cow::Owned(first), Cow::Owned(second));
    // A run on the processor has none.
    let algorithms = std::fs::read_to_string(target.join(ALGORITHMS)).ok();
    Ok((standing, Snapshot { parameters, first, second, carried, algorithms }))
}
