//! What a run needs to go on bit for bit: the model folder's files and, beside them,
//! `training.json` (where the run stands) and `training.safetensors` (both moments of every
//! parameter, and the state that is carried from batch to batch).

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::{partial_folder, replace_folder};
use crate::folder::{self, read_tensors, write_tensors};
use crate::model::LanguageModel;
use crate::nn::Parameters;
use crate::optim::AdamW;
use crate::text::Tokenizer;

const VERSION: u32 = 1;
const PROGRESS: &str = "training.json";
const TENSORS: &str = "training.safetensors";

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

/// Replaces the checkpoint in `target` by the present state of a run.
///
/// # Errors
/// When a file cannot be written; the old checkpoint is then still there.
pub fn save(
    target: &Path,
    model: &LanguageModel,
    parameters: &Parameters<f32>,
    tokenizer: &Tokenizer,
    optimizer: &AdamW<f32>,
    carried: &[Vec<f32>],
    standing: &Standing,
) -> Result<()> {
    let partial = partial_folder(target)?;
    folder::write(&partial, model, parameters, Some(tokenizer))?;
    let text = serde_json::to_string_pretty(standing).map_err(|e| Error::checkpoint(e.to_string()))?;
    let path = partial.join(PROGRESS);
    std::fs::write(&path, text + "\n").map_err(|e| Error::io("write", &path, &e))?;
    let names = parameters.specs().iter().map(|spec| &spec.name);
    let moment = |kind: &str, moments: &[Vec<f32>]| -> Vec<(String, usize)> {
        names.clone().zip(moments).map(|(name, m)| (format!("{kind}.{name}"), m.len())).collect()
    };
    let first = moment("first", &optimizer.first).into_iter().zip(&optimizer.first);
    let second = moment("second", &optimizer.second).into_iter().zip(&optimizer.second);
    let state = carried.iter().enumerate().map(|(i, part)| ((format!("carried.{i}"), part.len()), part));
    let tensors =
        first.chain(second).chain(state).map(|((name, len), values)| (name, vec![len], values.as_slice()));
    write_tensors(&partial.join(TENSORS), tensors)?;
    replace_folder(&partial, target)
}

/// Reads the checkpoint in `target` back into a model's parameters and optimizer; returns
/// where the run stood and the carried state.
///
/// # Errors
/// When a file is missing, damaged or of another model.
pub fn load(
    target: &Path,
    parameters: &mut Parameters<f32>,
    optimizer: &mut AdamW<f32>,
) -> Result<(Standing, Vec<Vec<f32>>)> {
    let loaded = folder::ModelFolder::load(target)?;
    if loaded.model.specs() != parameters.specs() {
        return Err(Error::checkpoint(format!(
            "{} holds a model of another configuration",
            target.display()
        ))
        .hint("resume a run with the config.yaml in its folder, unchanged"));
    }
    parameters.values.clone_from(&loaded.parameters.values);
    let path = target.join(PROGRESS);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, &e))?;
    let standing: Standing = serde_json::from_str(&text)
        .map_err(|e| Error::checkpoint(format!("{} is damaged: {e}", path.display())))?;
    if standing.version != VERSION {
        return Err(Error::checkpoint(format!("{} is of version {}", path.display(), standing.version)));
    }
    let mut carried = Vec::new();
    let specs = parameters.specs().clone();
    let path = target.join(TENSORS);
    let foreign = |name: &str| {
        Error::checkpoint(format!("{} holds {name}, which the model does not have", path.display()))
    };
    read_tensors(&path, |name, _, values| {
        let (kind, rest) = name.split_once('.').ok_or_else(|| foreign(name))?;
        if kind == "carried" {
            let index: usize = rest.parse().map_err(|_| foreign(name))?;
            carried.push((index, values));
            return Ok(());
        }
        let index = specs.iter().position(|spec| spec.name == rest).ok_or_else(|| foreign(name))?;
        let moments = if kind == "first" { &mut optimizer.first } else { &mut optimizer.second };
        if moments[index].len() != values.len() {
            return Err(foreign(name));
        }
        moments[index] = values;
        Ok(())
    })?;
    carried.sort_by_key(|(index, _)| *index);
    optimizer.steps = standing.step;
    Ok((standing, carried.into_iter().map(|(_, part)| part).collect()))
}
