//! `xlstm generate`: a model's continuation of a prompt or of a saved state.

use std::path::PathBuf;

use clap::{ArgGroup, Args};
use xlstm::Result;

use super::not_linked;

/// Continue a prompt; the text goes to stdout as it arises.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("start").args(["prompt", "prompt_ids", "state_in"]).required(true).multiple(true))]
pub struct GenerateArgs {
    /// The folder of the model or of a run
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The text to continue
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_ids")]
    pub prompt: Option<String>,
    /// The token ids to continue, for instance 1,2,3
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub prompt_ids: Vec<u32>,
    /// Tokens to generate
    #[arg(short = 'n', long = "tokens", value_name = "N", default_value_t = 200)]
    pub tokens: usize,
    /// Divides the logits; 0 takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.8, value_parser = temperature)]
    pub temperature: f64,
    /// Draw from the K likeliest tokens only
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u64).range(1..))]
    pub top_k: Option<u64>,
    /// Draw from the likeliest tokens that hold this much probability
    #[arg(long, value_name = "P", value_parser = top_p)]
    pub top_p: Option<f64>,
    /// Seed of the draws (default: a new one each time, printed to stderr)
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Start from the state in this file instead of an empty one; needs no prompt
    #[arg(long, value_name = "FILE")]
    pub state_in: Option<PathBuf>,
    /// Save the state after the last token to this file
    #[arg(long, value_name = "FILE")]
    pub state_out: Option<PathBuf>,
    /// Print one JSON object at the end instead of the text as it arises
    #[arg(long)]
    pub json: bool,
}

/// Runs the verb.
///
/// # Errors
/// Those of reading the model and the state, and of the prompt's tokens.
pub fn run(_args: &GenerateArgs) -> Result<()> {
    Err(not_linked("generation"))
}

fn temperature(text: &str) -> std::result::Result<f64, String> {
    number(text, "a number, 0 or greater", |t| t.is_finite() && t >= 0.0)
}

fn top_p(text: &str) -> std::result::Result<f64, String> {
    number(text, "a number greater than 0 and at most 1", |p| p > 0.0 && p <= 1.0)
}

fn number(text: &str, expected: &str, fits: impl Fn(f64) -> bool) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|&number| fits(number)).ok_or_else(|| format!("expected {expected}"))
}
