//! `xlstm convert`: a model folder as one of another kind or number format.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use xlstm::engine::{Code, Format};
use xlstm::folder::OpenOptions;
use xlstm::folder::convert::{Conversion, Target, convert};
use xlstm::nn::large::WeightMode;
use xlstm::{Error, Result};

use super::model::{ModelArgs, warn};
use crate::output;
use crate::progress::Meter;

/// Write a model as a folder of another kind or in another number format.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  xlstm convert --model out/1 --to hugging-face --dtype bf16 --out hf\n  \
                        xlstm convert --model NX-AI/xLSTM-7b --to ours --weights fused --out 7b\n  \
                        xlstm convert --model out/1 --to ours --quantize int8 --out small\n  \
                        xlstm convert --model old --config old.yaml --set slstm_block.slstm.num_heads=4 \
                        --to ours --out new"
)]
pub struct ConvertArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The kind of folder
    #[arg(long, value_name = "KIND", value_enum)]
    pub to: To,
    /// f32, bf16 or f16 (default: that of most weights)
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<Format>,
    /// int8 or int4: weight matrices in groups of 32 that share a scale (into ours only)
    #[arg(long, value_name = "CODE")]
    pub quantize: Option<Code>,
    /// Whether weights that read the same input are one matrix (large family; default: as they are
    /// for ours, single for others, whose programs open no fused ones)
    #[arg(long, value_name = "MODE", value_enum)]
    pub weights: Option<Mode>,
    /// The folder to write, which must not be there yet
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The model's configuration, where it is not in its folder: another program's, in YAML or JSON
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Set one key of that program's configuration; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

/// A kind of folder.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum To {
    /// This program's, for every family
    Ours,
    /// What `transformers` opens (large family)
    HuggingFace,
    /// What NX-AI's xlstm package opens (large family)
    NxAi,
}

/// Single or fused weights.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Mode {
    /// Matrix by matrix
    Single,
    /// As rows of one matrix
    Fused,
}

/// Runs the verb.
///
/// # Errors
/// Those of reading the model, and of writing it where the target cannot express it.
pub fn run(args: &ConvertArgs) -> Result<()> {
    let pair = |set: &String| match set.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err(Error::config(format!("--set {set} has no =")).hint("expected --set KEY=VALUE")),
    };
    let options = OpenOptions {
        config: args.config.clone(),
        sets: args.sets.iter().map(pair).collect::<Result<_>>()?,
        weight_mode: match (args.weights, args.to) {
            (Some(Mode::Fused), _) => Some(WeightMode::Fused),
            (None, To::Ours) => None,
            (Some(Mode::Single) | None, _) => Some(WeightMode::Single),
        },
    };
    let source = args.model.open_with(&options)?;
    let target = match args.to {
        To::Ours => Target::Ours,
        To::HuggingFace => Target::HuggingFace,
        To::NxAi => Target::NxAi,
    };
    let conversion = Conversion { format: args.dtype, quantize: args.quantize, ..Conversion::to(target) };
    let mut meter = Meter::new("converting");
    let warnings = convert(&source, &conversion, &args.out, &mut |share| meter.set(share))?;
    drop(meter);
    warn(&warnings);
    output::note(&format!("{} -> {}", source.path.display(), args.out.display()));
    Ok(())
}
