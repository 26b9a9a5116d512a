//! `xlstm prepare`: text to memory-mapped token shards.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use xlstm::data::{Origin, Prepared, Source, Split, distinct_characters};
use xlstm::engine::Device;
use xlstm::text::Tokenizer;
use xlstm::train::TokenizerChoice;
use xlstm::{Error, Result};

use super::text::{TextArgs, note_skipped};
use crate::output;
use crate::progress::Meter;

/// Turn text into token shards that training and evaluation map into memory.
///
/// Killed at any moment, the same command goes on where it was.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  xlstm prepare --data 'enwiki/train-*.parquet' --tokenizer \
                        gpt2/tokenizer.json --out tokens\n  xlstm train my.yaml --set data.train=tokens")]
pub struct PrepareArgs {
    #[command(flatten)]
    pub text: TextArgs,
    /// `characters`, `bytes`, or a file: a tokenizer.json, GPT-2's vocab.json beside its merges.txt,
    /// or a list of words
    #[arg(long, value_name = "FILE", value_parser = clap::value_parser!(TokenizerChoice))]
    pub tokenizer: TokenizerChoice,
    /// First train a byte-level BPE of N tokens on the text and write it to --tokenizer, unless
    /// that is there
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(257..=4_000_000))]
    pub train_tokenizer: Option<u64>,
    /// The folder to write; it may hold a part of the same preparation
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Print the index as JSON instead of lines for people
    #[arg(long)]
    pub json: bool,
    /// CPU threads; 0 = all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

/// Runs the verb.
///
/// # Errors
/// Those of the text, the tokenizer and the folder.
pub fn run(args: &PrepareArgs) -> Result<()> {
    let split = args.text.split.unwrap_or(Split::Train);
    let Origin::Files(sources) = Origin::find(&args.text.data, split)? else {
        return Err(Error::data("--data names tokens that are prepared already").hint(
            "train on them with data.train, check them with `xlstm inspect --data`, or name files of text",
        ));
    };
    let device = Device::cpu(args.threads)?;
    let tokenizer = device.install(|| tokenizer(args, &sources))?;
    let started = Instant::now();
    let mut meter = Meter::new("tokenizing");
    let mut fresh = 0;
    let options = args.text.options();
    let prepared = device.install(|| {
        Prepared::make(&args.out, sources, &options, &tokenizer, &mut |progress| {
            fresh = progress.tokens;
            meter.set(progress.bytes_done as f64 / progress.bytes.max(1) as f64);
        })
    })?;
    drop(meter);
    let seconds = started.elapsed().as_secs_f64();
    output::note(&format!("{fresh} tokens in {seconds:.1} s, {:.0} tokens/s", fresh as f64 / seconds));
    let index = &prepared.index;
    note_skipped(&index.skipped);
    if args.json {
        let json = serde_json::to_string(index).map_err(|e| Error::data(e.to_string()))?;
        return output::data(&(json + "\n"));
    }
    output::data(&counts(&prepared))
}

/// What there is, for people.
pub fn counts(prepared: &Prepared) -> String {
    let index = &prepared.index;
    format!(
        "documents  {}\n\
         tokens     {}\n\
         words      {}\n\
         bytes      {}\n\
         skipped    {}\n\
         shards     {} of {}-bit tokens\n\
         tokenizer  {}\n\
         folder     {}\n",
        index.documents,
        index.tokens,
        index.words,
        index.bytes,
        index.skipped.count,
        index.shards.len(),
        index.dtype.bits(),
        prepared.tokenizer.describe(),
        prepared.folder.display()
    )
}

/// The tokenizer of the arguments, trained where that is asked for.
fn tokenizer(args: &PrepareArgs, sources: &[Source]) -> Result<Tokenizer> {
    match (&args.tokenizer, args.train_tokenizer) {
        (TokenizerChoice::File(path), Some(size)) if !path.exists() => {
            train_tokenizer(args, sources, path, size)
        }
        (TokenizerChoice::File(path), _) => {
            if args.train_tokenizer.is_some() {
                output::note(&format!("{} is there and is taken as it is", path.display()));
            }
            Tokenizer::from_file(path)
        }
        (_, Some(_)) => Err(Error::config("--train-tokenizer needs a file to write to")
            .hint("for instance --tokenizer bpe.json")),
        (TokenizerChoice::Bytes, None) => Ok(Tokenizer::bytes()),
        (TokenizerChoice::Characters, None) => {
            Ok(Tokenizer::characters_of(&distinct_characters(sources, &args.text.options())?))
        }
    }
}

fn train_tokenizer(args: &PrepareArgs, sources: &[Source], path: &Path, size: u64) -> Result<Tokenizer> {
    let mut meter = Meter::new("counting words for the tokenizer");
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    let tokenizer = xlstm::data::train_bpe(sources, &args.text.options(), size, &mut |progress| {
        meter.set(progress.bytes_done as f64 / progress.bytes.max(1) as f64);
    })?;
    drop(meter);
    tokenizer.save(path)?;
    output::note(&format!("tokenizer: {}, {}", tokenizer.describe(), path.display()));
    Ok(tokenizer)
}
