//! `xlstm eval`: the loss of a model on a text.

use std::path::PathBuf;

use clap::Args;
use xlstm::Result;

use super::not_linked;

/// Measure a model's loss on a text: nats a token, perplexity, bits a byte.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// The folder of the model or of a run
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The text, a UTF-8 file
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Print one JSON object instead of lines for people
    #[arg(long)]
    pub json: bool,
    /// Start from an empty state every N tokens (default: the state is carried over the whole file)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub window: Option<u64>,
}

/// Runs the verb.
///
/// # Errors
/// Those of reading the model and the text.
pub fn run(_args: &EvalArgs) -> Result<()> {
    Err(not_linked("evaluation"))
}
