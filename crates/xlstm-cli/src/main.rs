//! The `xlstm` command: trains, evaluates, runs and inspects xLSTM language models.
//!
//! Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 an error, 2 a command
//! line that makes no sense.

mod builtin;
mod device;
mod output;
mod progress;
mod verbs;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Trains, evaluates and runs xLSTM language models.
#[derive(Debug, Parser)]
#[command(name = "xlstm", version, about, max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Train(verbs::train::TrainArgs),
    Prepare(verbs::prepare::PrepareArgs),
    Eval(verbs::eval::EvalArgs),
    Generate(verbs::generate::GenerateArgs),
    Init(verbs::init::InitArgs),
    Inspect(verbs::inspect::InspectArgs),
    Convert(verbs::convert::ConvertArgs),
    #[cfg(feature = "download")]
    Pull(verbs::pull::PullArgs),
    Bench(verbs::bench::BenchArgs),
    Doctor(verbs::doctor::DoctorArgs),
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Train(args) => verbs::train::run(&args),
        Verb::Prepare(args) => verbs::prepare::run(&args),
        Verb::Eval(args) => verbs::eval::run(&args),
        Verb::Generate(args) => verbs::generate::run(&args),
        Verb::Init(args) => verbs::init::run(&args),
        Verb::Inspect(args) => verbs::inspect::run(&args),
        Verb::Convert(args) => verbs::convert::run(&args),
        #[cfg(feature = "download")]
        Verb::Pull(args) => verbs::pull::run(&args),
        Verb::Bench(args) => verbs::bench::run(&args),
        Verb::Doctor(args) => verbs::doctor::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(&format!("error: {error}"));
            if let Some(hint) = error.hint_text() {
                output::note(&format!("hint: {hint}"));
            }
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn command_lines_parse() {
        for line in [
            "xlstm train shakespeare --set seed=2 --set model.num_blocks=2 --out runs --threads 2",
            "xlstm train --resume runs/1",
            "xlstm prepare --data a.txt b.jsonl --field body --tokenizer bytes --out c --skip-bad --threads 2",
            "xlstm prepare --data d --split test --train-tokenizer 1000 --tokenizer t.json --out c --json",
            "xlstm eval --model runs/1 --data a.txt --json --window 512",
            "xlstm eval --model runs/1 --data wikitext --split test --detokenize",
            "xlstm generate --model runs/1 --prompt hello -n 10 --temperature 0.5 --top-k 3 --top-p 0.9 --seed 1",
            "xlstm generate --model runs/1 --prompt-ids 1,2,3 --state-in a --state-out b --json",
            "xlstm generate --model m --prompt a --min-p 0.1 --repetition-penalty 1.2 --stop x --stop y",
            "xlstm init shakespeare --set model.vocab_size=65 --out m --dtype bf16 --seed 3 --threads 2",
            "xlstm inspect --model runs/1",
            "xlstm inspect shakespeare",
            "xlstm inspect --model NX-AI/xLSTM-7b@main",
            "xlstm convert --model m --to hugging-face --dtype bf16 --weights fused --out o",
            "xlstm convert --model m --config c.yaml --set a.b=1 --to nx-ai --out o",
            "xlstm bench train --preset lm-mlstm-128 --threads 2 --json",
            "xlstm bench prefill --preset infer-50m --dtype bf16 --threads 2 --repeats 5",
            "xlstm bench decode --preset infer-50m --dtype f32 --sessions 4 --device cpu --json",
            "xlstm bench cell --preset lm-mixed-128 --threads 1 --json",
            "xlstm bench cell --preset slstm-512 --device cuda:0 --dtype bf16 --batch 16 --length 1024",
            "xlstm doctor",
        ] {
            Cli::try_parse_from(line.split(' ')).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
    }

    #[test]
    fn command_lines_that_make_no_sense_are_refused() {
        for line in [
            "xlstm train",
            "xlstm train shakespeare --resume runs/1",
            "xlstm prepare --data a.txt --out b",
            "xlstm prepare --data a.txt --tokenizer words --out b",
            "xlstm prepare --data a.txt --tokenizer bytes --out b --split dev",
            "xlstm eval --model runs/1",
            "xlstm eval --model m --data a.txt --window 0",
            "xlstm generate --model m --prompt a --prompt-ids 1",
            "xlstm generate --model m",
            "xlstm generate --model m --prompt-ids 1,x",
            "xlstm generate --model m --prompt a --top-p 1.5",
            "xlstm generate --model m --prompt a --temperature -1",
            "xlstm bench",
            "xlstm bench train --preset gpt-5",
            "xlstm bench train --preset lm-mlstm-128 --steps 0",
            "xlstm bench decode --preset infer-50m --sessions 0",
            "xlstm bench prefill --preset infer-50m --dtype int3",
            "xlstm init shakespeare",
            "xlstm init shakespeare --out m --dtype int8",
            "xlstm inspect",
            "xlstm convert --model m --to onnx --out o",
            "xlstm convert --model m --to ours --dtype int8 --out o",
            "xlstm inspect shakespeare --model m",
        ] {
            let error = Cli::try_parse_from(line.split(' ')).err().unwrap_or_else(|| panic!("{line}"));
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
