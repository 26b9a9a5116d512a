//! `xlstm inspect`: what a model folder or a configuration holds.

use std::path::PathBuf;

use clap::Args;
use xlstm::Result;

use super::not_linked;
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
    match &args.config {
        Some(config) => output::data(&load_config(config, &args.sets)?.to_yaml()?),
        None => Err(not_linked("inspecting a model folder")),
    }
}
