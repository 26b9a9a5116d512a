//! What a training run reports while it runs, and to whom.

use std::path::{Path, PathBuf};

/// What is known when a run starts.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Summary {
    /// The run's folder.
    pub folder: PathBuf,
    /// Trainable numbers in the model.
    pub parameters: u64,
    /// The blocks in words, for instance `mlstm slstm mlstm mlstm`.
    pub blocks: String,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Tokens of training text.
    pub training_tokens: u64,
    /// Tokens of validation text.
    pub validation_tokens: u64,
    /// Tokens that one step learns from.
    pub tokens_per_step: u64,
    /// The step at which the run starts: 0, or where a resumed run stopped.
    pub start_step: u64,
    /// The step at which the run ends.
    pub steps: u64,
}

/// The state of a run after a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Training loss of the step, in nats a token.
    pub loss: f64,
    /// The same loss in bits a byte of text.
    pub bits_per_byte: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global norm of the gradients before clipping.
    pub gradient_norm: f64,
    /// Training speed.
    pub tokens_per_second: f64,
    /// Estimated time to the last step, in seconds.
    pub seconds_left: f64,
}

/// The result of a validation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Validation {
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Validation loss in nats a token.
    pub loss: f64,
    /// The same loss in bits a byte of text.
    pub bits_per_byte: f64,
    /// Whether it is the lowest so far.
    pub best: bool,
    /// How long the validation took.
    pub seconds: f64,
}

/// Whoever watches a run: a terminal, a notebook, a test. Each method does nothing unless overridden.
pub trait Observer {
    /// The run is about to take its first step.
    fn on_start(&mut self, _summary: &Summary) {}
    /// A step is done; called after every step.
    fn on_step(&mut self, _progress: &Progress) {}
    /// A validation is done.
    fn on_validation(&mut self, _validation: &Validation) {}
    /// A sample was drawn: the prompt and its continuation.
    fn on_sample(&mut self, _text: &str) {}
    /// A checkpoint is complete in this folder.
    fn on_checkpoint(&mut self, _folder: &Path) {}
    /// Anything else that a person may want to know, one line without a line break.
    fn on_message(&mut self, _message: &str) {}
}

/// An observer that ignores everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {}
