//! `xlstm train`: trains a model from a configuration, or goes on with a run.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use xlstm::engine::{DeviceChoice, Precision};
use xlstm::files::next_numbered_folder;
use xlstm::train::{End, RunConfig, Texts, train};
use xlstm::{Error, Result};

use super::text::note_skipped;
use crate::builtin::{SHAKESPEARE, load_config};
use crate::output;
use crate::progress::{Meter, Reporter};

/// Train a model from a configuration, or go on with a run.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  xlstm train shakespeare\n  xlstm train my.yaml --set \
                        optimizer.learning_rate=3e-4 --out out\n  xlstm train --resume out/1")]
pub struct TrainArgs {
    /// A YAML file or the name of a built-in configuration (shakespeare)
    #[arg(value_name = "CONFIG", required_unless_present = "resume", conflicts_with = "resume")]
    pub config: Option<String>,
    /// Change one key of the configuration; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// The folder in which the run gets a numbered folder of its own
    #[arg(long, value_name = "DIR", default_value = "out", conflicts_with = "resume")]
    pub out: PathBuf,
    /// Go on with the run in this folder, with its own configuration
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
    /// auto, cpu or cuda:N (default: the configuration's `device`)
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceChoice>,
    /// f32 or bf16 (default: the configuration's `dtype`)
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<Precision>,
    /// CPU threads; 0 = all (default: the configuration's `threads`)
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

/// Runs the verb.
///
/// # Errors
/// Those of the configuration and of the training run.
pub fn run(args: &TrainArgs) -> Result<()> {
    let (config, folder) = match (&args.config, &args.resume) {
        (Some(name_or_path), _) => {
            let config = load_config(name_or_path, &args.sets)?;
            let texts = load_texts(&config)?;
            texts.vocabulary(config.model.vocab_size)?;
            let folder = next_numbered_folder(&args.out)?;
            return train_in(args, config, texts, &folder).inspect_err(|_| {
                // Of a run that could not start nothing is left: only empty folders go.
                let _ = fs::remove_dir(&folder).and_then(|()| fs::remove_dir(&args.out));
            });
        }
        (None, Some(folder)) => (resumed(folder, args)?, folder),
        (None, None) => return Err(Error::config("there is neither a configuration nor a run to resume")),
    };
    let texts = load_texts(&config)?;
    train_in(args, config, texts, folder)
}

/// The texts of a run, in tokens.
fn load_texts(config: &RunConfig) -> Result<Texts> {
    let mut meter = Meter::new("tokenizing");
    let texts = Texts::load(&config.data, SHAKESPEARE, &mut |progress| {
        meter.set(progress.bytes_done as f64 / progress.bytes.max(1) as f64);
    })?;
    drop(meter);
    note_skipped(texts.training.skipped());
    Ok(texts)
}

/// The configuration of the run in `folder`, with the changes of `--set`.
fn resumed(folder: &Path, args: &TrainArgs) -> Result<RunConfig> {
    let path = folder.join("config.yaml");
    let text = fs::read_to_string(&path).map_err(|e| {
        Error::io("read", &path, &e).hint("--resume takes the folder of a run, for instance out/1")
    })?;
    RunConfig::load(&text, &path, &args.sets)
}

fn train_in(args: &TrainArgs, mut config: RunConfig, texts: Texts, folder: &Path) -> Result<()> {
    config.threads = args.threads.unwrap_or(config.threads);
    config.device = args.device.unwrap_or(config.device);
    config.dtype = args.dtype.or(config.dtype);
    let stop = Arc::new(AtomicBool::new(false));
    let raised = stop.clone();
    // The first Ctrl-C asks the run to save and end, the second one ends it at once.
    ctrlc::set_handler(move || {
        if raised.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })
    .map_err(|e| Error::config(format!("cannot listen for Ctrl-C: {e}")))?;
    let mut reporter = Reporter::new(config.training.log_every);
    let outcome = train(&config, texts, folder, &stop, &mut reporter)?;
    drop(reporter);
    let best = outcome.best.map_or(String::new(), |loss| format!("; lowest validation loss {loss:.4}"));
    let resume = format!("xlstm train --resume {}", folder.display());
    output::note(&match outcome.end {
        End::Finished => format!("done after {} steps{best}", outcome.steps),
        End::Early => format!("stopped early after {} steps{best}", outcome.steps),
        End::Interrupted => {
            format!("interrupted after {} steps{best}; go on with\n  {resume}", outcome.steps)
        }
    });
    let prompt = if config.sample.prompt.trim().is_empty() { "ROMEO:" } else { &config.sample.prompt };
    output::note(&format!("curve: {}", folder.join("loss.svg").display()));
    output::note(&format!(
        "generate with\n  {} generate --model {} --prompt {}",
        program(),
        outcome.model.display(),
        shell_quoted(prompt)
    ));
    Ok(())
}

/// How this program was called, for commands to copy.
fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "xlstm".into())
}

/// A word for a POSIX shell.
fn shell_quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}
