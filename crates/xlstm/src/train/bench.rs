//! How fast this machine trains: whole steps of preset models on random tokens, timed.
//!
//! A step is what training does for a batch: forward, backward, the gradients' global norm,
//! clipping and AdamW.

use std::sync::Arc;
use std::time::Instant;

use super::learner::{Task, learner};
use super::load::unknown_name;
use crate::data::Batch;
use crate::engine::{Device, OperationTime};
use crate::error::{Error, Result};
use crate::model::objective::Carry;
use crate::model::{Family, LanguageModel, ModelConfig, SlstmAt};
use crate::nn::Parameters;
use crate::nn::lstm::LstmConfig;
use crate::nn::transformer::{PositionKind, TransformerConfig};
use crate::optim::AdamWOptions;
use crate::rng::Rng;

/// A model and a batch shape with a name.
#[derive(Clone, Debug)]
pub struct Preset {
    /// Its name on the command line.
    pub name: &'static str,
    /// The model.
    pub model: ModelConfig,
    /// Sequences of a batch.
    pub batch_size: usize,
    /// Tokens of a sequence.
    pub length: usize,
}

/// The names of all presets.
pub const PRESETS: [&str; 9] = [
    "lm-mlstm-128",
    "lm-mlstm-256",
    "lm-slstm-128",
    "lm-slstm-256",
    "lm-mixed-128",
    "small-125m",
    "lstm-128",
    "gpt-128",
    "gpt-256",
];

impl Preset {
    /// The preset of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn named(name: &str) -> Result<Preset> {
        let Some(name) = PRESETS.into_iter().find(|preset| *preset == name) else {
            return Err(unknown_name("preset", name, &PRESETS));
        };
        let of = |family: Family| {
            let (embedding_dim, vocab_size) = if name.ends_with("256") { (256, 5000) } else { (128, 1000) };
            ModelConfig { family, vocab_size, embedding_dim, num_blocks: 4, ..ModelConfig::default() }
        };
        let small = |slstm_at: SlstmAt| ModelConfig { slstm_at, ..of(Family::Small) };
        let (model, batch_size, length) = match name {
            "small-125m" => {
                let shape = ModelConfig {
                    vocab_size: 50304,
                    embedding_dim: 768,
                    num_blocks: 24,
                    ..ModelConfig::default()
                };
                (shape, 4, 512)
            }
            "lstm-128" => {
                // As wide as has the parameters of an xLSTM of 128.
                let lstm = LstmConfig { hidden_dim: 160, ..LstmConfig::default() };
                (ModelConfig { lstm, ..of(Family::Lstm) }, 8, 256)
            }
            "gpt-128" | "gpt-256" => {
                let positions = PositionKind::Learned;
                let transformer = TransformerConfig { positions, ..TransformerConfig::default() };
                (ModelConfig { transformer, ..of(Family::Transformer) }, 8, 256)
            }
            "lm-slstm-128" | "lm-slstm-256" => (small(SlstmAt::All), 8, 256),
            "lm-mixed-128" => (small(SlstmAt::Positions(vec![1])), 8, 256),
            _ => (small(SlstmAt::None), 8, 256),
        };
        Ok(Preset { name, model, batch_size, length })
    }
}

/// What was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Parameters of the model.
    pub parameters: usize,
    /// Seconds of each timed step.
    pub seconds: Vec<f64>,
    /// The median of them.
    pub median: f64,
    /// On a GPU, the median of steps launched kernel by kernel instead of as one graph.
    pub plain_median: Option<f64>,
    /// Tokens a second, at the median.
    pub tokens_per_second: f64,
    /// 10^9 floating-point operations of products and cells a second, at the median.
    pub gigaflops: f64,
    /// 10^6 bytes of memory: the most that this process has held, where the system tells; on a
    /// GPU what is in use on it at the end.
    pub peak_megabytes: Option<f64>,
    /// The loss of the last step, in nats a token.
    pub loss: f64,
    /// Where the time of a step goes, the most expensive operation first.
    pub operations: Vec<OperationTime>,
}

/// Steps before the clock starts: caches, work space, pages and graphs are there by then.
const WARM_UP: usize = 3;

/// Times `steps` training steps of a preset.
///
/// # Errors
/// When there is no step to time, the model does not fit together, or a GPU fails.
pub fn train_steps(preset: &Preset, device: &Device, steps: usize) -> Result<Measured> {
    if steps == 0 {
        return Err(Error::config("0 steps cannot be timed").hint("at least 1 is needed, 5 are better"));
    }
    let model = Arc::new(LanguageModel::new(&preset.model)?);
    let Timed { seconds, loss, operations, megabytes } = time(preset, &model, device, steps, true)?;
    let plain_median = match device {
        Device::Cpu(_) => None,
        #[cfg(feature = "cuda")]
        Device::Cuda(..) => Some(median(&time(preset, &model, device, steps, false)?.seconds)),
    };
    let median = median(&seconds);
    let tokens_per_second = (preset.batch_size * preset.length) as f64 / median;
    Ok(Measured {
        parameters: model.parameter_count(),
        seconds,
        median,
        plain_median,
        tokens_per_second,
        gigaflops: tokens_per_second * 3.0 * model.flops_per_token() as f64 / 1e9,
        peak_megabytes: megabytes,
        loss,
        operations,
    })
}

/// What timing a learner gives.
struct Timed {
    seconds: Vec<f64>,
    loss: f64,
    operations: Vec<OperationTime>,
    megabytes: Option<f64>,
}

fn time(
    preset: &Preset,
    model: &Arc<LanguageModel>,
    device: &Device,
    steps: usize,
    captured: bool,
) -> Result<Timed> {
    let parameters = Parameters::<f32>::initialize(model.specs(), 1);
    let options = AdamWOptions { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip: Some(1.0) };
    let shape = [preset.batch_size, preset.length];
    let task = Task { shape, carry: Carry::Fresh, options, seed: 1, captured };
    let mut learner = learner(model, parameters, task, device)?;
    let batches = [random_batch(preset)];
    let (mut seconds, mut loss) = (Vec::with_capacity(steps), f64::NAN);
    for step in 0..WARM_UP + steps {
        let start = Instant::now();
        loss = learner.step(&batches, step as u64, 1e-4)?.loss;
        if step >= WARM_UP {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let megabytes = megabytes(device);
    Ok(Timed { seconds, loss, operations: learner.profile()?, megabytes })
}

fn random_batch(preset: &Preset) -> Batch {
    let count = preset.batch_size * preset.length;
    let mut rng = Rng::new(1, 0);
    let mut draw =
        || (0..count).map(|_| rng.below(preset.model.vocab_size as u64) as u32).collect::<Vec<u32>>();
    Batch {
        batch_size: preset.batch_size,
        length: preset.length,
        inputs: draw(),
        targets: draw(),
        marks: vec![0; count],
        target_count: count,
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// See [`Measured::peak_megabytes`].
fn megabytes(device: &Device) -> Option<f64> {
    match device {
        Device::Cpu(_) => {
            // Linux keeps the high-water mark of a process's resident memory.
            let status = std::fs::read_to_string("/proc/self/status").ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
            let kibibytes: f64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
            Some(kibibytes * 1024.0 / 1e6)
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu, _) => gpu.memory_in_use().ok().map(|bytes| bytes as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_a_model() {
        for name in PRESETS {
            let preset = Preset::named(name).unwrap();
            assert_eq!(preset.name, name);
            LanguageModel::new(&preset.model).unwrap();
        }
        let error = Preset::named("lm-mlstm-12").unwrap_err();
        assert!(error.hint_text().unwrap_or_default().contains("lm-mlstm-128"), "{error}");
    }

    /// The baselines are as large as the same layers in PyTorch: an LSTM of two biases a layer, and a
    /// GPT of norms with biases and projections without.
    #[test]
    fn baselines_have_the_sizes_of_their_peers() {
        let count =
            |name: &str| LanguageModel::new(&Preset::named(name).unwrap().model).unwrap().parameter_count();
        let layer = |inputs: usize| 4 * 160 * (inputs + 160) + 2 * 4 * 160;
        assert_eq!(count("lstm-128"), 1000 * 128 + layer(128) + 3 * layer(160) + 1000 * 160);
        let gpt = |v: usize, d: usize| 2 * v * d + 256 * d + 4 * (12 * d * d + 4 * d) + 2 * d;
        assert_eq!((count("gpt-128"), count("gpt-256")), (gpt(1000, 128), gpt(5000, 256)));
    }

    #[test]
    fn steps_are_timed() {
        let model = ModelConfig {
            vocab_size: 11,
            embedding_dim: 16,
            num_blocks: 2,
            slstm_at: SlstmAt::Positions(vec![1]),
            ..ModelConfig::default()
        };
        let preset = Preset { name: "tiny", model, batch_size: 2, length: 9 };
        let measured = train_steps(&preset, &Device::cpu(1).unwrap(), 3).unwrap();
        assert_eq!(measured.seconds.len(), 3);
        assert!(measured.median > 0.0 && measured.tokens_per_second > 0.0 && measured.gigaflops > 0.0);
        assert!(measured.loss.is_finite());
        assert!(train_steps(&preset, &Device::cpu(1).unwrap(), 0).is_err());
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
