//! `xlstm eval`: the loss of a model on a text.

use std::sync::Arc;

use clap::Args;
use xlstm::data::{Corpus, Origin, Split, Unscored};
use xlstm::eval::{PASS, Reading, evaluate};
use xlstm::text::Tokenizer;
use xlstm::{Error, Result};

use super::model::{ModelArgs, announce};
use super::text::{TextArgs, note_skipped};
use crate::device::DeviceArgs;
use crate::output;
use crate::progress::Meter;

/// Measure a model's loss on a text: nats a token, perplexity, bits a byte.
#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub text: TextArgs,
    /// Print one JSON object instead of lines for people
    #[arg(long)]
    pub json: bool,
    /// Start from an empty state every N tokens (default: the state is carried over the whole file)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub window: Option<u64>,
    /// Begin a window every N tokens; a token is scored in the first window that holds it
    #[arg(long, value_name = "N", requires = "window", value_parser = clap::value_parser!(u64).range(1..))]
    pub stride: Option<u64>,
    /// Read N tokens at a time where the state is carried on (default 256); 1 reads as generation
    /// does, with quantised weights multiplied in integers
    #[arg(long, value_name = "N", conflicts_with = "window", value_parser = clap::value_parser!(u64).range(1..))]
    pub pass: Option<u64>,
    /// Show the loss by position too: the tokens that the model had read of the document (of the
    /// window, with --window) before the one that it predicts; 1, 2 to 3, 4 to 7, ...
    #[arg(long)]
    pub positions: bool,
    /// Read this text but do not score it, such as WikiText's '<unk>': its tokens are not predicted, and it
    /// counts as no word
    #[arg(long, value_name = "TEXT")]
    pub unscored: Option<String>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the verb.
///
/// # Errors
/// Those of reading the model and the text.
pub fn run(args: &EvalArgs) -> Result<()> {
    let folder = args.model.open()?;
    let device = args.device.choose()?;
    let corpus = Arc::new(device.install(|| corpus(args, folder.tokenizer()?))?);
    announce(&folder);
    let weights = folder.weights(&device)?;
    note_skipped(corpus.skipped());
    let unscored = match &args.unscored {
        Some(text) => Unscored::find(&corpus, folder.tokenizer()?, text)?,
        None => Unscored::default(),
    };
    let tokens = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
    let reading = match (args.window, args.stride) {
        (Some(window), Some(stride)) => Reading::Strided { length: tokens(window), stride: tokens(stride) },
        (Some(window), None) => Reading::Windows(tokens(window)),
        (None, _) => Reading::Whole(args.pass.map_or(PASS, tokens)),
    };
    let mut meter = Meter::new("evaluating");
    let mut report =
        evaluate(&folder.model, &weights, &corpus, reading, unscored, &device, |share| meter.set(share))?;
    drop(meter);
    if !args.positions {
        report.positions.clear();
    }
    if args.json {
        let json = serde_json::to_string(&report).map_err(|e| Error::data(e.to_string()))?;
        return output::data(&(json + "\n"));
    }
    let mut text = format!(
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
    );
    if args.unscored.is_some() {
        text += &format!("not scored        {} words\n", report.unscored);
    }
    if args.positions {
        text += "\nposition             tokens  nats a token  perplexity\n";
    }
    for bucket in &report.positions {
        let range = if bucket.first == bucket.last {
            bucket.first.to_string()
        } else {
            format!("{}-{}", bucket.first, bucket.last)
        };
        let (tokens, loss, perplexity) = (bucket.tokens, bucket.loss, bucket.token_perplexity);
        text += &format!("{range:<15} {tokens:>11}  {loss:>12.4}  {perplexity:>10.3}\n");
    }
    output::data(&text)
}

/// The text in tokens.
fn corpus(args: &EvalArgs, tokenizer: &Tokenizer) -> Result<Corpus> {
    let mut meter = Meter::new("tokenizing");
    let origin = Origin::find(&args.text.data, args.text.split.unwrap_or(Split::Test))?;
    origin.load(&args.text.options(), tokenizer, None, &mut |progress| {
        meter.set(progress.bytes_done as f64 / progress.bytes.max(1) as f64);
    })
}
