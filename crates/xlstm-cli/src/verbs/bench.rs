//! `xlstm bench`: how fast this machine is, and how much of what it could do that is.

use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};
use serde::Serialize;
use xlstm::bench::{Floor, Measured, PRESETS, Preset, Storage, Trained, cells, decode, prefill, train_steps};
use xlstm::engine::{Device, DeviceChoice, OperationTime};
use xlstm::optim::MuonOptions;
use xlstm::{Error, Result};

use crate::builtin::load_config;
use crate::device::DeviceArgs;
use crate::output;

/// Measure how fast this machine is, beside its own floor: the time that matrix products or reads of
/// memory alone would take, at rates measured in the same run.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Debug, Subcommand)]
enum Kind {
    Train(TrainBenchArgs),
    Prefill(PrefillBenchArgs),
    Decode(DecodeBenchArgs),
    Cell(CellBenchArgs),
}

/// What all kinds have.
#[derive(Debug, Args)]
struct Common {
    /// The model and its shapes
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(PRESETS), required_unless_present = "config")]
    preset: Option<String>,
    /// In place of a preset: the model, batches and optimizer of a training configuration, which gives vocab_size
    #[arg(long, value_name = "CONFIG", conflicts_with = "preset")]
    config: Option<String>,
    /// Change one key of the configuration; may be given several times
    // A requirement is not looked at where it conflicts with what is given.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config", conflicts_with = "preset")]
    sets: Vec<String>,
    /// Print JSON, one object a line, instead of lines for people
    #[arg(long)]
    json: bool,
}

impl Common {
    fn preset(&self) -> Result<Preset> {
        match (&self.preset, &self.config) {
            (Some(name), _) => Preset::named(name),
            (None, Some(config)) => Preset::of_run(config, &load_config(config, &self.sets)?),
            (None, None) => Err(Error::config("there is neither a preset nor a configuration to time")),
        }
    }
}

/// Time whole training steps (forward, backward, clipping, the optimizer) on random tokens.
#[derive(Debug, Args)]
struct TrainBenchArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    device: DeviceArgs,
    /// Steps to time, after three that do not count
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = count)]
    steps: usize,
    /// Sequences of a batch, where not as many as the preset has
    #[arg(long, value_name = "N", value_parser = count)]
    batch: Option<usize>,
    /// Tokens of each of them
    #[arg(long, value_name = "N", value_parser = count)]
    length: Option<usize>,
    /// Update weight matrices by Muon instead of AdamW
    #[arg(long)]
    muon: bool,
    /// Also show where the time goes, operation by operation
    #[arg(long)]
    profile: bool,
}

/// Where a model is read, and how it is stored.
#[derive(Debug, Args)]
struct ReadingArgs {
    /// auto (a GPU where one can be used), cpu or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// What the weights are stored in: f32, bf16, f16, int8 or int4
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    dtype: Storage,
    /// Tokens of the prompt [default: the preset's]
    #[arg(long, value_name = "N", value_parser = count)]
    prompt: Option<usize>,
    /// CPU threads; 0 = all
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Repetitions to time, after one that does not count
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = count)]
    repeats: usize,
}

impl ReadingArgs {
    fn choose(&self) -> Result<Device> {
        let (device, line) = Device::choose(self.device, None, self.threads)?;
        output::note(&line);
        Ok(device)
    }
}

/// Time the reading of a prompt by one session, with logits after its last token alone.
#[derive(Debug, Args)]
struct PrefillBenchArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    reading: ReadingArgs,
}

/// Time the drawing of tokens, the likeliest each time, one after the other.
#[derive(Debug, Args)]
struct DecodeBenchArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    reading: ReadingArgs,
    /// Sessions that are decoded at once, as one batch
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count)]
    sessions: usize,
}

/// Time the recurrent cell of a model alone at its training shape, and measure its error against f64.
#[derive(Debug, Args)]
struct CellBenchArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    device: DeviceArgs,
    /// Repetitions to time, after two that do not count
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = count)]
    repeats: usize,
    /// Sequences of a batch, where not as many as the preset has
    #[arg(long, value_name = "N", value_parser = count)]
    batch: Option<usize>,
    /// Tokens of each of them
    #[arg(long, value_name = "N", value_parser = count)]
    length: Option<usize>,
}

fn count(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a whole number of at least 1".into())
}

/// The `--json` object.
#[derive(Default, Serialize)]
struct Report<'a> {
    preset: &'a str,
    params: usize,
    tokens_per_s: f64,
    ms: f64,
    /// Of launches kernel by kernel, on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    plain_ms: Option<f64>,
    /// Of a cell: forward alone, as evaluation has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    forward_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cell: Option<&'a str>,
    /// Of a cell: see `CellTimes`.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dtype: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sessions: Option<usize>,
    /// Of decoding: a session's state after the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    state_mb: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<usize>,
    peak_memory_mb: Option<f64>,
    gflops: f64,
    floor_share: f64,
    product_gflops: f64,
    bandwidth_gb_s: f64,
}

impl<'a> Report<'a> {
    fn new(preset: &'a Preset, measured: &Measured, floor: &Floor) -> Report<'a> {
        Report {
            preset: &preset.name,
            params: measured.parameters,
            tokens_per_s: measured.tokens_per_second(),
            ms: measured.median() * 1e3,
            state_mb: Some(measured.state_bytes / 1e6).filter(|&megabytes| megabytes > 0.0),
            peak_memory_mb: measured.peak_megabytes,
            gflops: measured.gigaflops(),
            floor_share: measured.floor_share(floor),
            product_gflops: floor.product_gigaflops,
            bandwidth_gb_s: floor.bandwidth_gigabytes,
            ..Report::default()
        }
    }

    /// Prints it as JSON, or for people: `what` ran, and the name of a repetition.
    fn print(&self, json: bool, what: &str, (unit, repeats): (&str, usize), more: &str) -> Result<()> {
        if json {
            let line = serde_json::to_string(self)
                .map_err(|e| Error::config(format!("the report cannot be written as JSON: {e}")))?;
            return output::data(&format!("{line}\n"));
        }
        let plain =
            self.plain_ms.map_or_else(String::new, |ms| format!(", {ms:.1} ms launched kernel by kernel"));
        let forward = self.forward_ms.map_or_else(String::new, |ms| format!(", {ms:.2} ms forward alone"));
        let memory = self.peak_memory_mb.map_or_else(|| "unknown".into(), |mb| format!("{mb:.0} MB"));
        let floor = format!(
            "floor        {:.0} % of it ({:.0} GFLOP/s in products, {:.1} GB/s of memory)\n",
            self.floor_share * 100.0,
            self.product_gflops,
            self.bandwidth_gb_s
        );
        output::data(&format!(
            "preset       {} ({what})\nparameters   {}\nspeed        {:.0} tokens/s\n\
             {unit:<12} {:.2} ms (median of {repeats}){plain}{forward}\npeak memory  {memory}\n\
             products     {:.1} GFLOP/s\n{floor}{more}",
            self.preset, self.params, self.tokens_per_s, self.ms, self.gflops,
        ))
    }
}

/// Runs the verb.
///
/// # Errors
/// Those of starting the threads, building the model and writing its folder.
pub fn run(args: &BenchArgs) -> Result<()> {
    match &args.kind {
        Kind::Train(args) => train(args),
        Kind::Prefill(args) => read(&args.common, &args.reading, None),
        Kind::Decode(args) => read(&args.common, &args.reading, Some(args.sessions)),
        Kind::Cell(args) => time_cells(args),
    }
}

fn train(args: &TrainBenchArgs) -> Result<()> {
    let mut preset = args.common.preset()?;
    preset.batch_size = args.batch.unwrap_or(preset.batch_size);
    preset.length = args.length.unwrap_or(preset.length);
    let device = args.device.choose()?;
    if args.muon {
        preset.options.muon = Some(MuonOptions::DEFAULT);
    }
    let Trained { measured, plain, operations, .. } = train_steps(&preset, &device, args.steps)?;
    let floor = Floor::measure(&device)?;
    let plain_ms = plain.map(|plain| plain.median() * 1e3);
    let report = Report { plain_ms, ..Report::new(&preset, &measured, &floor) };
    let times = if preset.accumulation == 1 { String::new() } else { format!("{} x ", preset.accumulation) };
    let what = format!("batch {times}{} x {}, {device}", preset.batch_size, preset.length);
    let table = if args.profile { table(&operations) } else { String::new() };
    report.print(args.common.json, &what, ("step", measured.seconds.len()), &table)
}

/// Where the time goes.
fn table(operations: &[OperationTime]) -> String {
    let row = |row: &OperationTime| {
        format!("{:<16} {:>5} {:>11.2} {:>12.2}\n", row.name, row.nodes, row.forward, row.backward)
    };
    let rows: String = operations.iter().map(row).collect();
    let [forward, backward] = operations.iter().fold([0.0; 2], |[f, b], o| [f + o.forward, b + o.backward]);
    let nodes = operations.iter().map(|o| o.nodes).sum();
    let all = row(&OperationTime { name: "all of them", nodes, forward, backward });
    format!("\noperation        nodes  forward ms  backward ms\n{rows}{all}")
}

/// Prefill, or decoding by so many sessions.
fn read(common: &Common, args: &ReadingArgs, sessions: Option<usize>) -> Result<()> {
    let mut preset = common.preset()?;
    preset.prompt = args.prompt.unwrap_or(preset.prompt);
    let device = args.choose()?;
    let (dtype, (prompt, drawn)) = (args.dtype.name(), (preset.prompt, preset.drawn));
    let (measured, unit, what) = match sessions {
        None => {
            let measured = prefill(&preset, &device, args.dtype, args.repeats)?;
            (measured, "prompt", format!("prefill of {prompt}, weights in {dtype}, {device}"))
        }
        Some(sessions) => {
            let measured = decode(&preset, &device, args.dtype, sessions, args.repeats)?;
            let by = if sessions == 1 { "1 session".into() } else { format!("{sessions} sessions") };
            let what = format!("decode of {drawn} after {prompt} by {by}, weights in {dtype}, {device}");
            (measured, "all tokens", what)
        }
    };
    let floor = Floor::measure(&device)?;
    let report = Report {
        dtype: Some(dtype),
        prompt: Some(prompt),
        sessions,
        ..Report::new(&preset, &measured, &floor)
    };
    report.print(common.json, &what, (unit, measured.seconds.len()), "")
}

fn time_cells(args: &CellBenchArgs) -> Result<()> {
    let mut preset = args.common.preset()?;
    preset.batch_size = args.batch.unwrap_or(preset.batch_size);
    preset.length = args.length.unwrap_or(preset.length);
    let device = args.device.choose()?;
    let times = cells(&preset, &device, args.repeats)?;
    let floor = Floor::measure(&device)?;
    for cell in &times {
        let forward_ms = Some(cell.forward.median() * 1e3);
        let (name, error) = (Some(cell.name), Some(cell.error));
        let report = Report { forward_ms, cell: name, error, ..Report::new(&preset, &cell.training, &floor) };
        let (batch, length) = (preset.batch_size, preset.length);
        let what = format!("{} cell, {}, batch {batch} x {length}, {device}", cell.name, cell.shape);
        let error = format!("error        {:.1e} of f64, output and gradients at worst\n", cell.error);
        report.print(args.common.json, &what, ("both ways", cell.training.seconds.len()), &error)?;
    }
    Ok(())
}
