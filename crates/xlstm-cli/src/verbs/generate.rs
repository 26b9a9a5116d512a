//! `xlstm generate`: a model's continuation of a prompt or of a saved state.

use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use clap::{ArgGroup, Args};
use serde::Serialize;
use xlstm::generate::{Finish, Sampler, Sampling, Session, StopStrings};
use xlstm::model::Runner;
use xlstm::text::{Decoder, Tokenizer};
use xlstm::{Error, Result};

use super::model::{ModelArgs, announce};
use crate::device::DeviceArgs;
use crate::output;

/// Continue a prompt; the text goes to stdout as it arises.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("start").args(["prompt", "prompt_ids", "state_in"]).required(true).multiple(true))]
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
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
    /// Draw from tokens at least P times as likely as the likeliest one only
    #[arg(long, value_name = "P", value_parser = top_p)]
    pub min_p: Option<f64>,
    /// Make tokens that occurred less likely: divides their logits above 0, multiplies those below
    #[arg(long, value_name = "R", default_value_t = 1.0, value_parser = penalty)]
    pub repetition_penalty: f64,
    /// End the text before this string; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Seed of the draws (default: a new one each time, printed to stderr)
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Continue N times, all at once; the texts come one after the other at the end
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "state_out",
          value_parser = clap::value_parser!(u16).range(1..))]
    pub samples: u16,
    /// Start from the state in this file instead of an empty one; needs no prompt
    #[arg(long, value_name = "FILE")]
    pub state_in: Option<PathBuf>,
    /// Save the state after the last token to this file; where --stop ended the text, that is the
    /// token that completed the string, which the state has read though the text ends before it
    #[arg(long, value_name = "FILE")]
    pub state_out: Option<PathBuf>,
    /// Print one JSON object a sample at the end instead of the text as it arises
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// The `--json` object.
#[derive(Serialize)]
struct Generated<'a> {
    prompt_ids: &'a [u32],
    ids: &'a [u32],
    /// Absent where the model has no tokenizer.
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    finish_reason: &'static str,
}

/// A continuation as it arises.
struct Sample {
    ids: Vec<u32>,
    text: String,
    decoder: Option<Decoder>,
    stop: StopStrings,
}

impl Sample {
    fn new(tokenizer: Option<&Tokenizer>, stop: &[String]) -> Sample {
        let stop = StopStrings::new(stop.iter().cloned());
        Sample { ids: Vec::new(), text: String::new(), decoder: tokenizer.map(Tokenizer::decoder), stop }
    }

    /// Takes the next token; returns the text that it adds, and whether to go on.
    fn push(&mut self, id: u32) -> Result<(&str, bool)> {
        self.ids.push(id);
        let (fresh, ended) = match &mut self.decoder {
            Some(decoder) => self.stop.push(&decoder.push(id)?),
            None => (format!("{id} "), false),
        };
        self.text.push_str(&fresh);
        Ok((&self.text[self.text.len() - fresh.len()..], !ended))
    }

    /// What was held back, where no stop string ended the text.
    fn finish(&mut self, finish: Finish) -> String {
        if finish == Finish::Stopped {
            return String::new();
        }
        let rest = self.decoder.as_mut().map(Decoder::finish).unwrap_or_default();
        let rest = self.stop.push(&rest).0 + &self.stop.finish();
        self.text.push_str(&rest);
        rest
    }
}

/// Runs the verb.
///
/// # Errors
/// Those of reading the model and the state, and of the prompt's tokens.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let folder = args.model.open()?;
    let prompt_ids = match &args.prompt {
        Some(prompt) => folder.tokenizer()?.encode(prompt)?,
        None => args.prompt_ids.clone(),
    };
    let device = args.device.choose()?;
    announce(&folder);
    let weights = folder.weights(&device)?;
    let runner = Runner::new(folder.model.clone(), weights, device);
    let mut session = match &args.state_in {
        Some(path) => Session::load(runner, path, &folder.fingerprint())?,
        None => Session::new(runner),
    };
    let started = Instant::now();
    session.read(&prompt_ids)?;
    let prefill = started.elapsed().as_secs_f64();

    let vocabulary =
        folder.tokenizer.as_ref().map_or(folder.model.config().vocab_size, Tokenizer::vocabulary_size);
    let seed = args.seed.unwrap_or_else(fresh_seed);
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k.map(|k| usize::try_from(k).unwrap_or(usize::MAX)),
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
    };
    // Sample i is drawn with seed + i.
    let mut samplers: Vec<Sampler> = (0..u64::from(args.samples))
        .map(|i| Sampler::new(sampling, vocabulary, seed.wrapping_add(i)))
        .collect();
    samplers.iter_mut().for_each(|sampler| sampler.observe(&prompt_ids));
    let ends = folder.end_tokens();
    let mut samples: Vec<Sample> =
        samplers.iter().map(|_| Sample::new(folder.tokenizer.as_ref(), &args.stop)).collect();
    let prompt = args.prompt.as_deref().unwrap_or_default();
    let streams = !args.json && args.samples == 1;
    if streams {
        output::data(prompt)?;
    }
    let started = Instant::now();
    let finished = session.generate_samples(args.tokens, &mut samplers, &ends, |i, id| {
        let (fresh, goes_on) = samples[i].push(id)?;
        if streams {
            output::data(fresh)?;
        }
        Ok(goes_on)
    })?;
    let decode = started.elapsed().as_secs_f64();
    for (i, (sample, finish)) in samples.iter_mut().zip(finished).enumerate() {
        let rest = sample.finish(finish);
        if args.json {
            let generated = Generated {
                prompt_ids: &prompt_ids,
                ids: &sample.ids,
                text: folder.tokenizer.is_some().then_some(sample.text.as_str()),
                finish_reason: finish.name(),
            };
            let line = serde_json::to_string(&generated).map_err(|e| Error::data(e.to_string()))?;
            output::data(&(line + "\n"))?;
        } else if streams {
            output::data(&(rest + "\n"))?;
        } else {
            let line = if i == 0 { "" } else { "---\n" };
            output::data(&format!("{line}{prompt}{}\n", sample.text))?;
        }
    }
    if let Some(path) = &args.state_out {
        session.save(path, &folder.fingerprint())?;
        output::note(&format!("state after {} tokens: {}", session.state()?.tokens()[0], path.display()));
    }
    let drawn: usize = samples.iter().map(|sample| sample.ids.len()).sum();
    let speed = |tokens: usize, seconds: f64| tokens as f64 / seconds.max(1e-9);
    output::note(&format!(
        "prefill {} tokens at {:.0} tokens/s, decode {} tokens at {:.0} tokens/s, seed {seed}",
        prompt_ids.len(),
        speed(prompt_ids.len(), prefill),
        drawn,
        speed(drawn, decode)
    ));
    Ok(())
}

/// A seed that differs from call to call, small enough to type.
fn fresh_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() as u64 % 1_000_000_007
}

fn temperature(text: &str) -> std::result::Result<f64, String> {
    number(text, "a number, 0 or greater", |t| t.is_finite() && t >= 0.0)
}

fn top_p(text: &str) -> std::result::Result<f64, String> {
    number(text, "a number greater than 0 and at most 1", |p| p > 0.0 && p <= 1.0)
}

fn penalty(text: &str) -> std::result::Result<f64, String> {
    number(text, "a number greater than 0", |r| r.is_finite() && r > 0.0)
}

fn number(text: &str, expected: &str, fits: impl Fn(f64) -> bool) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|&number| fits(number)).ok_or_else(|| format!("expected {expected}"))
}
