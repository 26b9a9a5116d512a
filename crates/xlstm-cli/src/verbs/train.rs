//! `xlstm train`: trains a model from a configuration, or goes on with a run.

use std::path::PathBuf;

use clap::Args;
use xlstm::Result;
use xlstm::train::{Observer, RunConfig, TextSource};

use super::not_linked;
use crate::builtin::{SHAKESPEARE, load_config};
use crate::progress::Reporter;

/// Train a model from a configuration, or go on with a run.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  xlstm train shakespeare\n  xlstm train my.yaml --set \
                        optimizer.learning_rate=3e-4 --out runs\n  xlstm train --resume runs/1")]
pub struct TrainArgs {
    /// A YAML file or the name of a built-in configuration (shakespeare)
    #[arg(value_name = "CONFIG", required_unless_present = "resume", conflicts_with = "resume")]
    pub config: Option<String>,
    /// Change one key of the configuration; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// The folder in which the run gets a numbered folder of its own
    #[arg(long, value_name = "DIR", default_value = "runs", conflicts_with = "resume")]
    pub out: PathBuf,
    /// Go on with the run in this folder, with its own configuration
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
    /// CPU threads; 0 = all (default: the configuration's `threads`)
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

/// Runs the verb.
///
/// # Errors
/// Those of the configuration and of the training run.
pub fn run(args: &TrainArgs) -> Result<()> {
    if let Some(name_or_path) = &args.config {
        let config = configuration(name_or_path, args)?;
        let mut reporter = Reporter::new(config.training.log_every);
        if config.data.train == TextSource::Shakespeare {
            reporter.on_message(&format!("training text: Shakespeare's plays, {} bytes", SHAKESPEARE.len()));
        }
    }
    Err(not_linked("training"))
}

/// The run's configuration with the command line's changes.
fn configuration(name_or_path: &str, args: &TrainArgs) -> Result<RunConfig> {
    let mut config = load_config(name_or_path, &args.sets)?;
    if let Some(threads) = args.threads {
        config.threads = threads;
    }
    Ok(config)
}
