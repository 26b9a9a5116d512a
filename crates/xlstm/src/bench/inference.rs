//! Prefill and decode of a preset model, timed, by the way that generation takes: a model folder is
//! written, opened and read where it lies, and a [`Runner`] reads the tokens.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use super::{Measured, Preset, check_repeats, peak_megabytes};
use crate::engine::{Code, Device, Format};
use crate::error::{Error, Result};
use crate::files::next_numbered_folder;
use crate::folder::convert::{Conversion, Target, convert};
use crate::folder::{ModelFolder, initialize};
use crate::generate::{Sampler, Sampling};
use crate::model::{Draw, LanguageModel, Logits, Runner};
use crate::nn::Weights;
use crate::rng::Rng;
use crate::state::State;

/// How the weights that are read are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// All in a number format.
    Dense(Format),
    /// Weight matrices quantised, all else in f32.
    Quantized(Code),
}

impl Storage {
    /// `f32`, `bf16`, `f16`, `int8` or `int4`.
    pub fn name(self) -> &'static str {
        match self {
            Storage::Dense(format) => format.name(),
            Storage::Quantized(code) => code.name(),
        }
    }
}

impl FromStr for Storage {
    type Err = Error;

    fn from_str(text: &str) -> Result<Storage> {
        let code = [Code::Int8, Code::Int4].into_iter().find(|code| code.name() == text);
        let dense = || text.parse().map(Storage::Dense);
        code.map_or_else(dense, |code| Ok(Storage::Quantized(code))).map_err(|_| {
            Error::config(format!("{text:?} is no number format"))
                .hint("there are f32, bf16, f16, int8 and int4")
        })
    }
}

/// Times the reading of a preset's prompt by one session, with logits after its last token alone,
/// `repeats` times; weights are stored as `storage` says.
///
/// # Errors
/// When there is nothing to time, the folder cannot be written, or a GPU fails.
pub fn prefill(preset: &Preset, device: &Device, storage: Storage, repeats: usize) -> Result<Measured> {
    check_repeats(repeats)?;
    let mut opened = Opened::new(preset, device, storage)?;
    let runner = &mut opened.runner;
    let prompt = prompt(preset);
    let mut seconds = Vec::with_capacity(repeats);
    for repeat in 0..=repeats {
        runner.reset(1);
        let start = Instant::now();
        runner.read(&prompt, Logits::Last)?;
        // The first reading records the pass.
        if repeat > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let (model, tokens) = (runner.model(), prompt.len() as u64);
    let head = 2 * model.head_products();
    Ok(Measured {
        parameters: model.parameter_count(),
        tokens: prompt.len(),
        operations: (tokens * (model.flops_per_token() - head) + head) as f64,
        bytes: opened.weight_bytes as f64,
        state_bytes: 0.0,
        seconds,
        peak_megabytes: peak_megabytes(device),
    })
}

/// Times the drawing of a preset's tokens after its prompt, the likeliest each time, one at a time by
/// each of `sessions`, all as one batch, `repeats` times; weights are stored as `storage` says.
///
/// # Errors
/// As [`prefill`]; when there is no session.
pub fn decode(
    preset: &Preset,
    device: &Device,
    storage: Storage,
    sessions: usize,
    repeats: usize,
) -> Result<Measured> {
    check_repeats(repeats)?;
    if sessions == 0 {
        return Err(Error::config("0 sessions draw no token").hint("at least 1 is needed"));
    }
    let mut opened = Opened::new(preset, device, storage)?;
    let runner = &mut opened.runner;
    let logits = runner.read(&prompt(preset), Logits::Last)?;
    let after = runner.state()?;
    let after = State::stack(&vec![&after; sessions])?;
    let vocabulary = logits.len();
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let mut sampler = Sampler::new(greedy, vocabulary, 1);
    let likeliest = Draw { uniform: 0.0, temperature: 0.0, vocabulary };
    let mut tokens = vec![0; sessions];
    let mut seconds = Vec::with_capacity(repeats);
    for repeat in 0..=repeats {
        runner.set_state(&after)?;
        // Otherwise the first token brings the state from the host, which generation does once a prompt at most.
        runner.prepare_step()?;
        let mut logits = logits.repeat(sessions);
        let start = Instant::now();
        // As generation does it.
        device.install(|| -> Result<()> {
            for step in 0..preset.drawn {
                if step == 0 || !runner.draws() {
                    for (token, logits) in tokens.iter_mut().zip(logits.chunks_exact(vocabulary)) {
                        *token = sampler.draw(logits)?;
                    }
                }
                if runner.draws() {
                    tokens = runner.read_and_draw(&tokens, &vec![likeliest; sessions])?;
                } else {
                    logits = runner.read(&tokens, Logits::Last)?;
                }
            }
            Ok(())
        })?;
        // In the first repetition the pass is recorded.
        if repeat > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let (model, drawn) = (runner.model(), preset.drawn as f64);
    Ok(Measured {
        parameters: model.parameter_count(),
        tokens: preset.drawn * sessions,
        operations: drawn * (2 * model.weight_products()) as f64 * sessions as f64,
        bytes: drawn * (opened.weight_bytes + 2 * after.bytes()) as f64,
        state_bytes: after.bytes() as f64 / sessions as f64,
        seconds,
        peak_megabytes: peak_megabytes(device),
    })
}

/// A model of random weights, opened as a user's is.
struct Opened {
    runner: Runner<f32>,
    /// Bytes of the weights that a token reads.
    weight_bytes: usize,
    /// Holds the weights' file: removed after the runner, which maps it.
    _folder: Temporary,
}

impl Opened {
    fn new(preset: &Preset, device: &Device, storage: Storage) -> Result<Opened> {
        let model = LanguageModel::new(&preset.model)?;
        let folder = Temporary::new()?;
        let path = folder.0.join("model");
        match storage {
            Storage::Dense(format) => initialize(&path, &model, format, 1, device)?,
            Storage::Quantized(code) => {
                let wide = folder.0.join("wide");
                initialize(&wide, &model, Format::F32, 1, device)?;
                let conversion = Conversion { quantize: Some(code), ..Conversion::to(Target::Ours) };
                convert(&ModelFolder::load(&wide)?, &conversion, &path, &mut |_| {})?;
            }
        }
        forget_peak();
        let opened = ModelFolder::load(&path)?;
        let weights = opened.weights(device)?;
        let weight_bytes = match &weights {
            Weights::Stored(stored) => {
                let whole = stored.iter().zip(opened.model.reads_whole()).filter(|(_, whole)| *whole);
                whole.map(|(stored, _)| stored.bytes()).sum()
            }
            // As a GPU reads them: matrices in its precision.
            _ => {
                let specs = opened.model.specs().iter().zip(opened.model.reads_whole());
                let bytes = |dims: usize| if dims > 1 { device.precision().bytes() } else { 4 };
                let whole = specs.filter(|(_, whole)| *whole).map(|(spec, _)| spec);
                whole.map(|spec| spec.shape.iter().product::<usize>() * bytes(spec.shape.len())).sum()
            }
        };
        let runner = Runner::new(opened.model.clone(), weights, device.clone());
        Ok(Opened { runner, weight_bytes, _folder: folder })
    }
}

/// A folder of our own among the system's temporary ones, removed at the end.
struct Temporary(PathBuf);

impl Temporary {
    fn new() -> Result<Temporary> {
        let parent = std::env::temp_dir().join(format!("xlstm-bench-{}", std::process::id()));
        Ok(Temporary(next_numbered_folder(&parent)?))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // What cannot be removed is the system's to clear; the parent may be in use.
        let _ = std::fs::remove_dir_all(&self.0);
        let _ = self.0.parent().map(std::fs::remove_dir);
    }
}

/// Lets the system's record of the most memory begin anew, so that writing the folder is not part of
/// it. Where it cannot, the record is of the whole process.
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

fn prompt(preset: &Preset) -> Vec<u32> {
    let mut rng = Rng::new(1, 0);
    (0..preset.prompt).map(|_| rng.below(preset.model.vocab_size as u64) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::presets::tests::tiny;

    #[test]
    fn prefill_and_decode_are_timed() {
        let (preset, device) = (tiny(), Device::cpu(1).unwrap());
        let read = prefill(&preset, &device, Storage::Dense(Format::F32), 2).unwrap();
        assert_eq!((read.seconds.len(), read.tokens), (2, preset.prompt));
        assert!(read.tokens_per_second() > 0.0 && read.operations > 0.0);
        let wide = decode(&preset, &device, Storage::Dense(Format::F32), 3, 2).unwrap();
        assert_eq!((wide.seconds.len(), wide.tokens), (2, 3 * preset.drawn));
        // Of the embedding (11, 16) a step reads a row, of all else every number.
        let numbers = |bytes: f64| bytes / 4.0;
        assert_eq!(numbers(read.bytes), (read.parameters - 11 * 16) as f64);
        let narrow = decode(&preset, &device, Storage::Dense(Format::Bf16), 3, 1).unwrap();
        assert!(narrow.bytes < wide.bytes, "{} and {}", narrow.bytes, wide.bytes);
        let coded = decode(&preset, &device, "int8".parse().unwrap(), 3, 1).unwrap();
        assert!(coded.bytes < wide.bytes, "{} and {}", coded.bytes, wide.bytes);
        assert!("int3".parse::<Storage>().unwrap_err().hint_text().is_some());
        assert!(decode(&preset, &device, Storage::Dense(Format::F32), 0, 1).is_err());
        assert!(prefill(&preset, &device, Storage::Dense(Format::F32), 0).is_err());
    }
}
