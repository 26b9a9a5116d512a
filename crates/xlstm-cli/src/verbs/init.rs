//! `xlstm init`: a new model of random weights.

use std::path::PathBuf;

use clap::Args;
use xlstm::Result;
use xlstm::engine::{Device, Format};
use xlstm::folder::initialize;
use xlstm::model::LanguageModel;

use crate::builtin::load_config;
use crate::output;

/// Write the folder of a model that has learnt nothing yet: the weights that training starts from.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// A YAML file or the name of a built-in configuration (shakespeare); needs model.vocab_size
    #[arg(value_name = "CONFIG")]
    pub config: String,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// What the weights are stored in: f32, bf16 or f16
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    pub dtype: Format,
    /// Seed of the weights (default: that of the configuration)
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Change one key of the configuration; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// CPU threads; 0 = all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

/// Runs the verb.
///
/// # Errors
/// Those of the configuration and of writing the folder.
pub fn run(args: &InitArgs) -> Result<()> {
    let config = load_config(&args.config, &args.sets)?;
    let model = LanguageModel::new(&config.model)?;
    let seed = args.seed.unwrap_or(config.seed);
    initialize(&args.out, &model, args.dtype, seed, &Device::cpu(args.threads)?)?;
    output::note(&format!(
        "{}: {} parameters in {}, seed {seed}",
        args.out.display(),
        model.parameter_count(),
        args.dtype.name()
    ));
    Ok(())
}
