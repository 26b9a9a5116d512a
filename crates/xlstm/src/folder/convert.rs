//! From one kind of folder to another, and between number formats.
//!
//! One parameter at a time is read, rounded and written, so that a model of any size passes through
//! little memory. What needs more than a file's share goes into several.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::tensors::{INDEX, Index, SINGLE};
use super::weights::scales_name;
use super::writer::{Entry, Part, write_tensors};
use super::{CONFIG, ModelFolder, TOKENIZER, hugging_face, nx_ai, ours, write_file, write_json};
use crate::engine::{Code, Format, Storable};
use crate::error::{Error, Result};
use crate::files::{partial_folder, replace_folder};
use crate::model::{Family, storable_parameters};

/// What other programs keep beside a tokenizer.
const TOKENIZER_NOTES: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];
const EMBEDDING: &str = "embedding.weight";
const HEAD: &str = "lm_head.weight";

/// A kind of folder that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Ours, for every family.
    Ours,
    /// Hugging Face's, for the large family.
    HuggingFace,
    /// NX-AI's, for the large family.
    NxAi,
}

/// What a folder becomes.
#[derive(Clone, Debug)]
pub struct Conversion {
    /// Its kind.
    pub target: Target,
    /// Its number format; None keeps that of most weights.
    pub format: Option<Format>,
    /// How weight matrices of products and look-ups are quantised, if they are (ours only).
    pub quantize: Option<Code>,
    /// Bytes of weights in a file, unless one tensor alone has more.
    pub file_bytes: usize,
}

impl Conversion {
    /// To a folder of this kind, with weights as they are and at most 4 GiB a file.
    pub fn to(target: Target) -> Conversion {
        Conversion { target, format: None, quantize: None, file_bytes: 4 << 30 }
    }
}

/// Writes `source` to `out`, which is not there yet; `tell` hears the share that is done. Returns
/// what the reader of the new folder should know.
///
/// # Errors
/// When `out` is there, the target cannot express the model, or a file cannot be read or written.
pub fn convert(
    source: &ModelFolder,
    conversion: &Conversion,
    out: &Path,
    tell: &mut dyn FnMut(f64),
) -> Result<Vec<String>> {
    if out.exists() {
        return Err(Error::config(format!("{} is there already", out.display()))
            .hint("remove it or choose another folder with --out"));
    }
    if let (Some(code), true) = (conversion.quantize, conversion.target != Target::Ours) {
        return Err(Error::config(format!("other programs do not read our {} weights", code.name()))
            .hint("quantise into a folder of ours: --to ours"));
    }
    let format = conversion.format.unwrap_or_else(|| source.files.format());
    let (config, ends) = (source.model.config(), source.ends.as_deref());
    let (configuration, mut warnings) = match conversion.target {
        Target::Ours => (ours::config_file(config, ends)?, Vec::new()),
        Target::HuggingFace => {
            let named = source.end_tokens();
            let ends = (!named.is_empty()).then_some(named.as_slice());
            hugging_face::config_file(config, format, ends)?
        }
        Target::NxAi => (nx_ai::config_file(config)?, Vec::new()),
    };
    if conversion.target == Target::NxAi && source.ends.is_some() {
        warnings.push("this kind of folder does not say which tokens end a text".into());
    }
    let partial = partial_folder(out)?;
    let written = write_configuration(source, conversion.target, &configuration, &partial)
        .and_then(|()| write_weights(source, conversion, format, &partial, tell))
        .and_then(|()| write_tokenizer(source, conversion.target, &partial, &mut warnings));
    if let Err(error) = written {
        // The first error is the one to report.
        let _ = std::fs::remove_dir_all(&partial);
        return Err(error);
    }
    replace_folder(&partial, out)?;
    Ok(warnings)
}

fn write_configuration(
    source: &ModelFolder,
    target: Target,
    configuration: &Value,
    folder: &Path,
) -> Result<()> {
    match target {
        Target::Ours => write_json(&folder.join(CONFIG), configuration),
        Target::HuggingFace => {
            write_json(&folder.join(CONFIG), configuration)?;
            let ends = source.end_tokens();
            let ends = (!ends.is_empty()).then_some(ends.as_slice());
            write_json(&folder.join(hugging_face::GENERATION), &hugging_face::generation_file(ends))
        }
        Target::NxAi => {
            let text = serde_saphyr::to_string(configuration).map_err(|e| Error::config(e.to_string()))?;
            write_file(&folder.join(nx_ai::CONFIG), text.as_bytes())
        }
    }
}

/// The tensors of the target, each with the parameter that it is, cut into files.
fn write_weights(
    source: &ModelFolder,
    conversion: &Conversion,
    format: Format,
    folder: &Path,
    tell: &mut dyn FnMut(f64),
) -> Result<()> {
    let specs = source.model.specs();
    let theirs = |name: &str| match conversion.target {
        Target::HuggingFace => hugging_face::tensor_name(name).to_owned(),
        Target::Ours | Target::NxAi => name.to_owned(),
    };
    let storable = storable_parameters(&source.model)?;
    let entries = |name: &str, index: usize| {
        let entry = |name: String, shape: Vec<usize>, part: Part| (Entry { name, shape, part }, index);
        match (specs[index].shape.as_slice(), conversion.quantize) {
            (&[rows, inner], Some(code)) if storable[index] == Storable::Quantized && Code::fits(inner) => {
                let codes = vec![rows, inner / code.codes_a_byte()];
                let scales = code.scales_shape(&codes).unwrap_or_default();
                vec![
                    entry(theirs(name), codes, Part::Codes(code)),
                    entry(scales_name(&theirs(name)), scales, Part::Scales(code)),
                ]
            }
            (shape, _) => vec![entry(theirs(name), shape.to_vec(), Part::Dense(format))],
        }
    };
    let mut tensors: Vec<(Entry, usize)> =
        specs.iter().enumerate().flat_map(|(index, spec)| entries(&spec.name, index)).collect();
    let config = source.model.config();
    // The others have a head of its own in any case.
    if config.tie_weights
        && config.family == Family::Large
        && conversion.target != Target::Ours
        && let Some(embedding) = specs.iter().position(|spec| spec.name == EMBEDDING)
    {
        tensors.extend(entries(HEAD, embedding));
    }
    let total: usize = tensors.iter().map(|(entry, _)| entry.bytes()).sum();
    let mut files: Vec<Vec<(Entry, usize)>> = vec![Vec::new()];
    let mut filled = 0;
    for (entry, index) in tensors {
        let bytes = entry.bytes();
        if filled + bytes > conversion.file_bytes && filled > 0 {
            files.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(last) = files.last_mut() {
            last.push((entry, index));
        }
    }
    let names: Vec<String> = match (files.len(), conversion.target) {
        (1, _) => vec![SINGLE.to_owned()],
        (count, Target::NxAi) => (0..count).map(|i| format!("model_{i}.safetensors")).collect(),
        (count, _) => (1..=count).map(|i| format!("model-{i:05}-of-{count:05}.safetensors")).collect(),
    };
    let mut weight_map = BTreeMap::new();
    let mut done = 0;
    for (file, name) in files.into_iter().zip(&names) {
        let (entries, places): (Vec<Entry>, Vec<usize>) = file.into_iter().unzip();
        weight_map.extend(entries.iter().map(|entry| (entry.name.clone(), name.clone())));
        // `transformers` wants to know that the file is not of another framework.
        write_tensors(&folder.join(name), &entries, &[("format", "pt")], |index| {
            done += entries[index].bytes();
            tell(done as f64 / total.max(1) as f64);
            Ok(Cow::Owned(source.files.values(places[index])))
        })?;
    }
    if names.len() > 1 && conversion.target != Target::NxAi {
        let index = Index { metadata: json!({"total_size": total}), weight_map };
        let index = serde_json::to_value(index).map_err(|e| Error::checkpoint(e.to_string()))?;
        write_json(&folder.join(INDEX), &index)?;
    }
    Ok(())
}

fn write_tokenizer(
    source: &ModelFolder,
    target: Target,
    folder: &Path,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let Some(tokenizer) = &source.tokenizer else { return Ok(()) };
    if target != Target::Ours && tokenizer.kind() != "hugging-face" {
        let kind = tokenizer.kind();
        warnings.push(format!("the tokenizer is left out: others do not know the kind {kind}"));
        return Ok(());
    }
    write_file(&folder.join(TOKENIZER), tokenizer.to_json()?.as_bytes())?;
    for name in TOKENIZER_NOTES {
        let file = source.path.join(name);
        if file.exists() {
            let bytes = std::fs::read(&file).map_err(|e| Error::io("read", &file, &e))?;
            write_file(&folder.join(name), &bytes)?;
        }
    }
    Ok(())
}
