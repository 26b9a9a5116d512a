//! `xlstm eval`: the loss of a model on a text.

use std::path::PathBuf;

use std::sync::Arc;

use clap::Args;
use xlstm::data::{Corpus, read_text};
use xlstm::eval::{Reading, evaluate};
use xlstm::folder::ModelFolder;
use xlstm::nn::Weights;
use xlstm::{Error, Result};

use crate::device::DeviceArgs;
use crate::output;
use crate::progress::Meter;

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
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the verb.
///
/// # Errors
/// Those of reading the model and the text.
pub fn run(args: &EvalArgs) -> Result<()> {
    let folder = ModelFolder::load(&args.model)?;
    let text = read_text(&args.data)?;
    let corpus = Arc::new(Corpus::from_texts(&[text], folder.tokenizer()?)?);
    let device = args.device.choose()?;
    let weights = Weights::new(folder.parameters.clone(), &device)?;
    let reading = match args.window {
        Some(window) => Reading::Windows(usize::try_from(window).unwrap_or(usize::MAX)),
        None => Reading::Whole,
    };
    let mut meter = Meter::new("evaluating");
    let report = evaluate(&folder.model, &weights, &corpus, reading, &device, |share| meter.set(share))?;
    drop(meter);
    if args.json {
        let json = serde_json::to_string(&report).map_err(|e| Error::data(e.to_string()))?;
        return output::data(&(json + "\n"));
    }
    output::data(&format!(
        "loss              {:.4} nats a token\n\
         token perplexity  {:.3}\n\
         word perplexity   {:.2}\n\
         bits per byte     {:.4}\n\
         tokens            {}\n\
         words             {}\n\
         bytes             {}\n",
        report.loss,
        report.token_perplexity,
        report.word_perplexity,
        report.bits_per_byte,
        report.tokens,
        report.words,
        report.bytes
    ))
}
