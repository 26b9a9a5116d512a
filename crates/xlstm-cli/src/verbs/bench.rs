//! `xlstm bench`: how fast this machine is.

use clap::{Args, Subcommand};
use serde::Serialize;
use xlstm::train::bench::{PRESETS, Preset, train_steps};
use xlstm::{Error, Result};

use crate::device::DeviceArgs;
use crate::output;

/// Measure how fast this machine is.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Debug, Subcommand)]
enum Kind {
    Train(TrainBenchArgs),
}

/// Time whole training steps (forward, backward, clipping, AdamW) on random tokens.
#[derive(Debug, Args)]
struct TrainBenchArgs {
    /// The model and batch shape
    #[arg(long, value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(PRESETS))]
    preset: String,
    #[command(flatten)]
    device: DeviceArgs,
    /// Steps to time, after three that do not count
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = steps)]
    steps: usize,
    /// Also show where the time goes, operation by operation
    #[arg(long)]
    profile: bool,
    /// Print one JSON object instead of lines for people
    #[arg(long)]
    json: bool,
}

fn steps(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a whole number of at least 1".into())
}

#[derive(Serialize)]
struct Report<'a> {
    preset: &'a str,
    params: usize,
    tokens_per_s: f64,
    ms: f64,
    /// Launched kernel by kernel, on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    plain_ms: Option<f64>,
    peak_memory_mb: Option<f64>,
    gflops: f64,
}

/// Runs the verb.
///
/// # Errors
/// Those of starting the threads and building the model.
pub fn run(args: &BenchArgs) -> Result<()> {
    let Kind::Train(args) = &args.kind;
    let preset = Preset::named(&args.preset)?;
    let device = args.device.choose()?;
    let measured = train_steps(&preset, &device, args.steps)?;
    let report = Report {
        preset: preset.name,
        params: measured.parameters,
        tokens_per_s: measured.tokens_per_second,
        ms: measured.median * 1e3,
        plain_ms: measured.plain_median.map(|seconds| seconds * 1e3),
        peak_memory_mb: measured.peak_megabytes,
        gflops: measured.gigaflops,
    };
    if args.json {
        let line = serde_json::to_string(&report)
            .map_err(|e| Error::config(format!("the report cannot be written as JSON: {e}")))?;
        return output::data(&format!("{line}\n"));
    }
    let mut table = String::new();
    if args.profile {
        table += "\noperation        nodes  forward ms  backward ms\n";
        for row in &measured.operations {
            table +=
                &format!("{:<16} {:>5} {:>11.2} {:>12.2}\n", row.name, row.nodes, row.forward, row.backward);
        }
    }
    let memory = report.peak_memory_mb.map_or_else(|| "unknown".into(), |mb| format!("{mb:.0} MB"));
    let plain =
        report.plain_ms.map_or_else(String::new, |ms| format!(", {ms:.1} ms launched kernel by kernel"));
    output::data(&format!(
        "preset       {} (batch {} x {}, {device})\nparameters   {}\nspeed        {:.0} tokens/s\n\
         step         {:.1} ms (median of {}){plain}\npeak memory  {memory}\nproducts     {:.1} GFLOP/s\n{table}",
        report.preset,
        preset.batch_size,
        preset.length,
        report.params,
        report.tokens_per_s,
        report.ms,
        measured.seconds.len(),
        report.gflops,
    ))
}
