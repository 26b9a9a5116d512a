//! `xlstm inspect`: what a model folder, prepared data or a configuration holds.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use xlstm::data::Prepared;
use xlstm::engine::Device;
use xlstm::folder::ModelFolder;
use xlstm::model::{BlockKind, Family, LanguageModel};
use xlstm::state::State;
use xlstm::{Error, Result};

use super::model::{self, formats};
use super::prepare::counts;
use crate::builtin::load_config;
use crate::output;

/// Show a model folder, prepared data with its checksums checked, or a configuration with every key
/// in full.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A YAML file or the name of a built-in configuration (shakespeare)
    #[arg(value_name = "CONFIG", required_unless_present_any = ["model", "data"], conflicts_with_all = ["model", "data"])]
    pub config: Option<String>,
    /// A folder of a model or of a run; or ORG/NAME[@revision] of the Hub's cache
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Folders that `xlstm prepare` made; all of their tokens are read and checked
    #[arg(long, value_name = "DIR", num_args = 1.., conflicts_with = "model")]
    pub data: Vec<PathBuf>,
    /// Change one key of the configuration; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with_all = ["model", "data"])]
    pub sets: Vec<String>,
    /// Print the model's figures as one JSON object; a configuration has to give model.vocab_size
    #[arg(long, conflicts_with = "data")]
    pub json: bool,
}

/// The `--json` object.
#[derive(Serialize)]
struct Figures {
    /// Parameters, shared ones counted once.
    params: usize,
    /// Bytes of the state of a sequence in f32.
    state_bytes: usize,
    /// 10^6 operations a token, forward.
    forward_mflop: f64,
}

/// Runs the verb.
///
/// # Errors
/// Those of the configuration or of reading the model or the data.
pub fn run(args: &InspectArgs) -> Result<()> {
    match (&args.config, &args.model) {
        (Some(config), _) if args.json => {
            let config = load_config(config, &args.sets)?.model;
            if config.vocab_size == 0 {
                return Err(Error::config("model.vocab_size is 0: the training text decides")
                    .hint("no text is read here; add --set model.vocab_size=N"));
            }
            figures(&LanguageModel::new(&config)?)
        }
        (None, Some(path)) if args.json => figures(&model::open(path)?.model),
        (Some(config), _) => output::data(&load_config(config, &args.sets)?.to_yaml()?),
        (None, Some(path)) => output::data(&describe(&model::open(path)?)?),
        (None, None) => inspect_data(&args.data),
    }
}

/// Prints a model's figures as JSON.
fn figures(model: &LanguageModel) -> Result<()> {
    let figures = Figures {
        params: model.parameter_count(),
        state_bytes: State::<f32>::empty(&model.state_layout(1)).bytes(),
        forward_mflop: model.flops_per_token() as f64 / 1e6,
    };
    let line = serde_json::to_string(&figures).map_err(|e| Error::config(e.to_string()))?;
    output::data(&(line + "\n"))
}

/// The counts of prepared data, each folder once it has been checked.
fn inspect_data(folders: &[PathBuf]) -> Result<()> {
    let device = Device::cpu(0)?;
    for folder in folders {
        if !Prepared::is_at(folder) {
            return Err(Error::data(format!("{} holds no prepared data", folder.display()))
                .hint("--data takes folders that `xlstm prepare` wrote with --out"));
        }
        let prepared = Prepared::open(folder)?;
        device.install(|| prepared.verify())?;
        output::data(&format!("{}checksums  match\n", counts(&prepared)))?;
    }
    Ok(())
}

/// Configuration, parameters, state and cost of a model.
fn describe(folder: &ModelFolder) -> Result<String> {
    let model = &folder.model;
    let blocks = match model.config().family {
        Family::Small => {
            let kinds = model.config().block_kinds();
            let slstm = kinds.iter().filter(|kind| **kind == BlockKind::Slstm).count();
            format!("{} mLSTM, {slstm} sLSTM", kinds.len() - slstm)
        }
        _ => model.config().blocks_in_words(),
    };
    let state = State::<f32>::empty(&model.state_layout(1));
    let tokenizer = match &folder.tokenizer {
        Some(tokenizer) => format!("{}, {} tokens", tokenizer.kind(), tokenizer.vocabulary_size()),
        None => "none".into(),
    };
    let mut text = format!(
        "folder        {} ({})\n\
         blocks        {blocks}\n\
         parameters    {}\n\
         weights       {} bytes, {}\n\
         state         {} bytes a sequence, whatever its length\n\
         forward       {:.3} MFLOP a token\n\
         training      {:.3} MFLOP a token\n\
         tokenizer     {tokenizer}\n\
         fingerprint   {}\n\n",
        folder.path.display(),
        folder.kind.name(),
        model.parameter_count(),
        folder.files.bytes(),
        formats(folder),
        state.bytes(),
        model.flops_per_token() as f64 / 1e6,
        3.0 * model.flops_per_token() as f64 / 1e6,
        folder.fingerprint()
    );
    let config =
        serde_json::to_string_pretty(&model.config().to_json()?).map_err(|e| Error::config(e.to_string()))?;
    text += &format!("{config}\n\n");
    for spec in model.specs().iter() {
        text += &format!("{:<64} {:?}{}\n", spec.name, spec.shape, if spec.decay { "  decays" } else { "" });
    }
    Ok(text)
}
