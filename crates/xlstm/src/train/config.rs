//! The configuration of a training run: model, data, optimizer, schedule, loop and samples.
//!
//! Every key has a default, so a file holds only what differs; `to_yaml` writes all of
//! them, which is what a run folder keeps.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::sources::{Paths, TextSource, TokenizerChoice};
use crate::data::{Batching, Stage, TextOptions};
use crate::engine::{DeviceChoice, Precision};
use crate::error::{Error, Result};
use crate::nn::ModelConfig;
use crate::nn::config::{at_least_one, positive, probability};
use crate::optim::{AdamWOptions, Decay, MatrixUpdate, MuonOptions, OptimizerOptions, Schedule};

/// A training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Seed of the initial weights, the order of the data, dropout and samples. Default 1.
    pub seed: u64,
    /// CPU threads; 0 = all. Results do not depend on it. Default 0.
    pub threads: usize,
    /// `auto` (a GPU where one can be used), `cpu` or `cuda:N`. Default `auto`.
    pub device: DeviceChoice,
    /// `f32` or `bf16`; null = bf16 on a GPU, f32 on the processor. Default null.
    pub dtype: Option<Precision>,
    /// The model.
    pub model: ModelConfig,
    /// The text and how it is cut into batches.
    pub data: DataConfig,
    /// AdamW, Muon and gradient clipping.
    pub optimizer: OptimizerConfig,
    /// The learning rate over time.
    pub schedule: ScheduleConfig,
    /// The loop.
    pub training: TrainingConfig,
    /// The sample that is drawn after each validation.
    pub sample: SampleConfig,
}

/// The text and how it is cut into batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// The training text: `shakespeare` (embedded), a path or a list of paths, each a file (.txt,
    /// .jsonl, .parquet, wiki.*.tokens), a folder, a pattern such as `data/*.parquet`, or a folder
    /// that `xlstm prepare` made. Default `shakespeare`.
    pub train: TextSource,
    /// The validation text: null, a path or a list of paths as in `train`. Default null.
    pub validation: Option<Paths>,
    /// The last part of the training text that is held out when `validation` is null, in
    /// [0, 1); 0 = no validation. Whole documents where there are several. Default 0.1.
    pub validation_fraction: f64,
    /// The field of JSON lines and the column of Parquet files that hold the text. Default `text`.
    pub field: String,
    /// Leave out lines and rows that cannot be used, and count them. Default false.
    pub skip_bad: bool,
    /// Undo the tokenisation of WikiText. Default false.
    pub detokenize: bool,
    /// Text that is appended to every document, for instance `<|endoftext|>`. Default empty.
    pub document_end: String,
    /// A folder in which the tokens of files are kept and reused, memory-mapped, so that a corpus
    /// may be larger than memory; null = tokenise into memory in each run. Default null.
    pub cache: Option<PathBuf>,
    /// `characters`, `bytes` or the path of a tokenizer; null = that of prepared data, elsewhere
    /// `characters`. Default null.
    pub tokenizer: Option<TokenizerChoice>,
    /// How sequences are drawn. Default `windows`.
    pub batching: Batching,
    /// Sequences in a batch. Default 16.
    pub batch_size: usize,
    /// Tokens in a sequence. Default 256.
    pub length: usize,
    /// Other batch sizes and lengths from later steps on, in order. Default none.
    pub stages: Vec<StageConfig>,
}

/// A batch size and a length from a step on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct StageConfig {
    /// The steps before the first one of this shape; at least 1.
    pub from_step: u64,
    /// Sequences in a batch.
    pub batch_size: usize,
    /// Tokens in a sequence.
    pub length: usize,
}

/// AdamW, Muon and gradient clipping.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The highest learning rate, reached at the end of the warm-up. Default 1e-3.
    pub learning_rate: f64,
    /// The highest learning rate of embedding and head; the schedule scales it as the other, to its end.
    /// null = `learning_rate`. Default null.
    pub embedding_learning_rate: Option<f64>,
    /// What updates the weight matrices between embedding and head: `adamw`, as all else, or `muon`, which
    /// leaves to AdamW vectors, convolutions, the mLSTM's gates, and blocks of less than 16 features.
    /// Default `adamw`.
    pub matrices: MatrixUpdate,
    /// Decay of Muon's momentum. Default 0.95.
    pub muon_momentum: f64,
    /// Decay of AdamW's first and second moment. Default [0.9, 0.95].
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-8.
    pub eps: f64,
    /// Decoupled weight decay of the weight matrices. Default 0.1.
    pub weight_decay: f64,
    /// Largest global norm of the gradients; null or 0 = no limit. Default 1.
    pub clip: Option<f64>,
}

/// The learning rate over time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    /// Steps of linear warm-up from 0. Default 100.
    pub warmup_steps: u64,
    /// `cosine`, `linear` or `constant`. Default `cosine`.
    pub decay: Decay,
    /// The rate at the end of the decay. Default 1e-4.
    pub min_learning_rate: f64,
    /// The step at which the decay ends; null = the last of training. Default null.
    pub decay_steps: Option<u64>,
}

/// The loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct TrainingConfig {
    /// Optimizer steps; null = those of `epochs`, or 1000 where that is null too. Default null.
    pub steps: Option<u64>,
    /// How often the training text is seen, a number above 0, in place of `steps`; a run's folder
    /// keeps the steps that it comes to. Default null.
    pub epochs: Option<f64>,
    /// Batches whose gradients are averaged in a step. Default 1.
    pub accumulation: usize,
    /// Steps between validations; 0 = only at the end. Default 250.
    pub validate_every: u64,
    /// Batches in a validation; 0 = all of the validation text. Default 0.
    pub validation_batches: usize,
    /// Steps between checkpoints; 0 = only at the end. Default 250.
    pub checkpoint_every: u64,
    /// Stop after this many validations without a better loss; 0 = off. Default 0.
    pub early_stopping: u64,
    /// Steps between rows of metrics and lines of progress. Default 10.
    pub log_every: u64,
}

/// The sample that is drawn after each validation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct SampleConfig {
    /// The text that the sample continues. Default a line break.
    pub prompt: String,
    /// Tokens to draw; 0 = no sample. Default 200.
    pub tokens: usize,
    /// Divides the logits; 0 takes the likeliest token. Default 0.8.
    pub temperature: f64,
    /// Draw from this many likeliest tokens; null = all. Default null.
    pub top_k: Option<usize>,
    /// Draw from the likeliest tokens that hold this much probability, in (0, 1]; null = all. Default null.
    pub top_p: Option<f64>,
    /// Draw from tokens at least this share as likely as the likeliest, in [0, 1]; null = all. Default null.
    pub min_p: Option<f64>,
    /// Divides the logits above 0 of tokens that occurred, and multiplies those below; 1 = off. Default 1.
    pub repetition_penalty: f64,
}

impl Default for RunConfig {
    fn default() -> Self {
        RunConfig {
            seed: 1,
            threads: 0,
            device: DeviceChoice::Auto,
            dtype: None,
            model: ModelConfig::default(),
            data: DataConfig::default(),
            optimizer: OptimizerConfig::default(),
            schedule: ScheduleConfig::default(),
            training: TrainingConfig::default(),
            sample: SampleConfig::default(),
        }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        DataConfig {
            train: TextSource::Shakespeare,
            validation: None,
            validation_fraction: 0.1,
            field: "text".into(),
            skip_bad: false,
            detokenize: false,
            document_end: String::new(),
            cache: None,
            tokenizer: None,
            batching: Batching::Windows,
            batch_size: 16,
            length: 256,
            stages: Vec::new(),
        }
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig {
            learning_rate: 1e-3,
            embedding_learning_rate: None,
            matrices: MatrixUpdate::AdamW,
            muon_momentum: MuonOptions::DEFAULT.momentum,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            clip: Some(1.0),
        }
    }
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        ScheduleConfig { warmup_steps: 100, decay: Decay::Cosine, min_learning_rate: 1e-4, decay_steps: None }
    }
}

impl Default for TrainingConfig {
    fn default() -> Self {
        TrainingConfig {
            steps: None,
            epochs: None,
            accumulation: 1,
            validate_every: 250,
            validation_batches: 0,
            checkpoint_every: 250,
            early_stopping: 0,
            log_every: 10,
        }
    }
}

impl Default for SampleConfig {
    fn default() -> Self {
        SampleConfig {
            prompt: "\n".into(),
            tokens: 200,
            temperature: 0.8,
            top_k: None,
            top_p: None,
            min_p: None,
            repetition_penalty: 1.0,
        }
    }
}

impl RunConfig {
    /// The learning-rate schedule of the whole run.
    pub fn learning_rates(&self) -> Schedule {
        Schedule {
            max: self.optimizer.learning_rate,
            min: self.schedule.min_learning_rate,
            warmup_steps: self.schedule.warmup_steps,
            decay_steps: self.schedule.decay_steps.unwrap_or(self.training.steps()),
            decay: self.schedule.decay,
        }
    }

    /// Checks everything that can be checked before data is read.
    ///
    /// # Errors
    /// A configuration error that names the first key that does not fit, its value and what would.
    pub fn validate(&self) -> Result<()> {
        self.model.validate_causal()?;
        self.data.validate()?;
        self.optimizer.validate()?;
        self.validate_schedule()?;
        self.training.validate()?;
        self.sample.validate()
    }

    fn validate_schedule(&self) -> Result<()> {
        let (schedule, highest) = (&self.schedule, self.optimizer.learning_rate);
        not_negative("schedule.min_learning_rate", schedule.min_learning_rate)?;
        if schedule.decay != Decay::Constant && schedule.min_learning_rate > highest {
            return Err(Error::config(format!(
                "schedule.min_learning_rate is {}, above optimizer.learning_rate, {highest}",
                schedule.min_learning_rate
            ))
            .hint("lower schedule.min_learning_rate, for instance to a tenth of optimizer.learning_rate"));
        }
        match schedule.decay_steps {
            Some(steps) if steps <= schedule.warmup_steps => Err(Error::config(format!(
                "schedule.decay_steps is {steps}, within the {} steps of schedule.warmup_steps",
                schedule.warmup_steps
            ))
            .hint("decay_steps counts from the start of training; leave it null for all of training.steps")),
            _ => Ok(()),
        }
    }
}

impl DataConfig {
    /// How text is taken from files.
    pub fn text_options(&self) -> TextOptions {
        TextOptions {
            field: self.field.clone(),
            skip_bad: self.skip_bad,
            detokenize: self.detokenize,
            document_end: self.document_end.clone(),
        }
    }

    /// The shapes of batches over a run of this many batches a step.
    pub fn batch_stages(&self, accumulation: usize) -> Vec<Stage> {
        let first = Stage { first: 0, batch_size: self.batch_size, length: self.length };
        let later = self.stages.iter().map(|stage| Stage {
            first: stage.from_step * accumulation as u64,
            batch_size: stage.batch_size,
            length: stage.length,
        });
        [first].into_iter().chain(later).collect()
    }

    fn validate(&self) -> Result<()> {
        at_least_one("data.batch_size", self.batch_size)?;
        at_least_one("data.length", self.length)?;
        let mut last = 0;
        for (index, stage) in self.stages.iter().enumerate() {
            let key = |name: &str| format!("data.stages[{index}].{name}");
            at_least_one(&key("batch_size"), stage.batch_size)?;
            at_least_one(&key("length"), stage.length)?;
            if stage.from_step <= last {
                return Err(Error::config(format!("{} is {}, not above {last}", key("from_step"), stage.from_step))
                    .hint("stages are in the order of their steps; before the first one, data.batch_size and data.length hold"));
            }
            last = stage.from_step;
        }
        probability("data.validation_fraction", self.validation_fraction)
    }
}

impl OptimizerConfig {
    /// The largest global norm of the gradients, if there is a limit.
    pub fn clip_norm(&self) -> Option<f64> {
        self.clip.filter(|&norm| norm > 0.0)
    }

    /// What the optimizer is made of.
    pub fn options(&self) -> OptimizerOptions {
        let momentum = self.muon_momentum;
        OptimizerOptions {
            adamw: AdamWOptions { betas: self.betas, eps: self.eps },
            muon: (self.matrices == MatrixUpdate::Muon).then_some(MuonOptions { momentum }),
            weight_decay: self.weight_decay,
            clip: self.clip_norm(),
            border_rate: self.embedding_learning_rate.map_or(1.0, |rate| rate / self.learning_rate),
        }
    }

    fn validate(&self) -> Result<()> {
        positive("optimizer.learning_rate", self.learning_rate)?;
        positive("optimizer.embedding_learning_rate", self.embedding_learning_rate.unwrap_or(1.0))?;
        probability("optimizer.muon_momentum", self.muon_momentum)?;
        probability("optimizer.betas[0]", self.betas[0])?;
        probability("optimizer.betas[1]", self.betas[1])?;
        positive("optimizer.eps", self.eps)?;
        not_negative("optimizer.weight_decay", self.weight_decay)?;
        not_negative("optimizer.clip", self.clip.unwrap_or(0.0))
    }
}

impl TrainingConfig {
    /// Optimizer steps; of a run that counts in epochs, once its texts have said how many they are
    /// ([`Texts::with_steps`](super::Texts::with_steps)).
    pub fn steps(&self) -> u64 {
        self.steps.unwrap_or(1000)
    }

    fn validate(&self) -> Result<()> {
        if let (Some(steps), Some(epochs)) = (self.steps, self.epochs) {
            return Err(Error::config(format!(
                "training.steps is {steps} and training.epochs is {epochs}: a run has one length"
            ))
            .hint("give one of the two and leave the other out, or null"));
        }
        at_least_one("training.steps", self.steps())?;
        positive("training.epochs", self.epochs.unwrap_or(1.0))?;
        at_least_one("training.accumulation", self.accumulation)?;
        at_least_one("training.log_every", self.log_every)?;
        if self.early_stopping > 0 && self.validate_every == 0 {
            return Err(Error::config(format!(
                "training.early_stopping is {}, but training.validate_every is 0",
                self.early_stopping
            ))
            .hint(
                "early stopping watches the validations; set training.validate_every, for instance to 250",
            ));
        }
        Ok(())
    }
}

impl SampleConfig {
    fn validate(&self) -> Result<()> {
        not_negative("sample.temperature", self.temperature)?;
        at_least_one("sample.top_k", self.top_k.unwrap_or(1))?;
        positive("sample.repetition_penalty", self.repetition_penalty)?;
        if let Some(min_p) = self.min_p.filter(|min_p| !(0.0..=1.0).contains(min_p)) {
            return Err(Error::config(format!("sample.min_p is {min_p}"))
                .hint("sample.min_p is at least 0 and at most 1"));
        }
        match self.top_p {
            Some(top_p) if !(top_p > 0.0 && top_p <= 1.0) => {
                Err(Error::config(format!("sample.top_p is {top_p}"))
                    .hint("sample.top_p is greater than 0 and at most 1"))
            }
            _ => Ok(()),
        }
    }
}

/// Refuses all but finite numbers from zero up at `key`.
fn not_negative(key: &str, value: f64) -> Result<()> {
    if !(value.is_finite() && value >= 0.0) {
        return Err(Error::config(format!("{key} is {value}"))
            .hint(format!("{key} is a finite number, 0 or greater")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        RunConfig::default().validate().unwrap();
    }

    #[test]
    fn every_bad_number_is_named() {
        type Change = fn(&mut RunConfig);
        let cases: [(Change, &str); 23] = [
            (|c| c.data.batch_size = 0, "data.batch_size is 0"),
            (|c| c.data.length = 0, "data.length is 0"),
            (
                |c| c.data.stages = vec![StageConfig { from_step: 0, batch_size: 1, length: 1 }],
                "data.stages[0].from_step is 0",
            ),
            (|c| c.data.validation_fraction = 1.0, "data.validation_fraction is 1"),
            (|c| c.optimizer.learning_rate = 0.0, "optimizer.learning_rate is 0"),
            (|c| c.optimizer.learning_rate = f64::NAN, "optimizer.learning_rate is NaN"),
            (|c| c.optimizer.embedding_learning_rate = Some(0.0), "optimizer.embedding_learning_rate is 0"),
            (|c| c.optimizer.muon_momentum = 1.0, "optimizer.muon_momentum is 1"),
            (|c| c.optimizer.betas = [0.9, 1.0], "optimizer.betas[1] is 1"),
            (|c| c.optimizer.weight_decay = -0.1, "optimizer.weight_decay is -0.1"),
            (|c| c.optimizer.clip = Some(-1.0), "optimizer.clip is -1"),
            (|c| c.schedule.min_learning_rate = 0.1, "schedule.min_learning_rate is 0.1"),
            (|c| c.schedule.decay_steps = Some(50), "schedule.decay_steps is 50"),
            (|c| c.training.steps = Some(0), "training.steps is 0"),
            (|c| c.training.epochs = Some(0.0), "training.epochs is 0"),
            (
                |c| (c.training.steps, c.training.epochs) = (Some(5), Some(2.0)),
                "training.steps is 5 and training.epochs is 2",
            ),
            (|c| c.training.accumulation = 0, "training.accumulation is 0"),
            (
                |c| (c.training.early_stopping, c.training.validate_every) = (3, 0),
                "training.early_stopping is 3",
            ),
            (|c| c.sample.top_k = Some(0), "sample.top_k is 0"),
            (|c| c.sample.top_p = Some(1.5), "sample.top_p is 1.5"),
            (|c| c.sample.min_p = Some(-0.1), "sample.min_p is -0.1"),
            (|c| c.sample.repetition_penalty = 0.0, "sample.repetition_penalty is 0"),
            (|c| c.model.mlstm.num_heads = 7, "model.mlstm.num_heads is 7"),
        ];
        for (change, message) in cases {
            let mut config = RunConfig::default();
            change(&mut config);
            let error = config.validate().expect_err(message);
            assert!(error.to_string().contains(message), "{error}");
            assert!(error.hint_text().is_some(), "{error}");
        }
    }

    #[test]
    fn clipping_is_off_at_null_and_zero() {
        let with = |clip| OptimizerConfig { clip, ..Default::default() }.clip_norm();
        assert_eq!((with(None), with(Some(0.0)), with(Some(2.0))), (None, None, Some(2.0)));
    }

    #[test]
    fn the_decay_ends_with_training_unless_told() {
        let mut config = RunConfig::default();
        assert_eq!(config.learning_rates().decay_steps, 1000);
        config.schedule.decay_steps = Some(500);
        assert_eq!(config.learning_rates().decay_steps, 500);
    }
}
