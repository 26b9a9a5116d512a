//! `xlstm inspect`: what a model folder or a configuration holds.

use std::path::PathBuf;

use clap::Args;
use xlstm::folder::ModelFolder;
use xlstm::model::BlockKind;
use xlstm::state::State;
use xlstm::{Error, Result};

use crate::builtin::load_config;
use crate::output;

/// Show a model folder, or a configuration with every key in full.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A YAML file or the name of a built-in configuration (shakespeare)
    #[arg(value_name = "CONFIG", required_unless_present = "model", conflicts_with = "model")]
    pub config: Option<String>,
    /// The folder of the model or of a run
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Change one key of the configuration; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "model")]
    pub sets: Vec<String>,
}

/// Runs the verb.
///
/// # Errors
/// Those of the configuration or of reading the model.
pub fn run(args: &InspectArgs) -> Result<()> {
    match (&args.config, &args.model) {
        (Some(config), _) => output::data(&load_config(config, &args.sets)?.to_yaml()?),
        (None, Some(path)) => output::data(&describe(&ModelFolder::load(path)?)?),
        (None, None) => Err(Error::config("there is neither a configuration nor a model to inspect")),
    }
}

/// Configuration, parameters, state and cost of a model.
fn describe(folder: &ModelFolder) -> Result<String> {
    let model = &folder.model;
    let kinds = model.config().block_kinds();
    let slstm = kinds.iter().filter(|kind| **kind == BlockKind::Slstm).count();
    let state = State::<f32>::empty(&model.state_layout(1));
    let tokenizer = match &folder.tokenizer {
        Some(tokenizer) => format!("{}, {} tokens", tokenizer.kind(), tokenizer.vocabulary_size()),
        None => "none".into(),
    };
    let mut text = format!(
        "folder        {}\n\
         blocks        {} mLSTM, {slstm} sLSTM\n\
         parameters    {}\n\
         state         {} bytes a sequence, whatever its length\n\
         forward       {:.3} MFLOP a token\n\
         training      {:.3} MFLOP a token\n\
         tokenizer     {tokenizer}\n\
         fingerprint   {}\n\n",
        folder.path.display(),
        kinds.len() - slstm,
        folder.parameters.count(),
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
