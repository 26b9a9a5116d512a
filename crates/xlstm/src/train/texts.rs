//! From a run's configuration to its tokenizer and token corpora.

use std::sync::Arc;

use super::config::{DataConfig, RunConfig, TrainingConfig};
use super::sources::{TextSource, TokenizerChoice};
use crate::data::{Corpus, Origin, Progress, Source, Split, Stages, distinct_characters};
use crate::error::{Error, Result};
use crate::text::Tokenizer;

/// What a run learns from and is measured on.
#[derive(Debug)]
pub struct Texts {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Training tokens.
    pub training: Arc<Corpus>,
    /// Validation tokens; None where nothing is held out.
    pub validation: Option<Arc<Corpus>>,
}

impl Texts {
    /// Reads and tokenizes the texts of `config`, or opens those that are prepared; `shakespeare`
    /// is the text of that name. `progress` hears of the tokenizing.
    ///
    /// # Errors
    /// When a file cannot be used, or holds what the tokenizer does not know.
    pub fn load(config: &DataConfig, shakespeare: &str, progress: &mut dyn FnMut(Progress)) -> Result<Texts> {
        let training = match &config.train {
            TextSource::Shakespeare => Origin::Files(vec![Source::of_text("shakespeare", shakespeare)]),
            TextSource::Files(paths) => Origin::find(&paths.0, Split::Train)?,
        };
        let validation = config.validation.as_ref();
        let validation = validation.map(|paths| Origin::find(&paths.0, Split::Validation)).transpose()?;
        let origins: Vec<&Origin> = [&training].into_iter().chain(&validation).collect();
        let tokenizer = tokenizer_of(config, &origins)?;
        let options = config.text_options();
        let mut load =
            |origin: Origin| origin.load(&options, &tokenizer, config.cache.as_deref(), &mut *progress);
        let training = load(training)?;
        let (training, validation) = match validation {
            Some(origin) => (Some(training), Some(load(origin)?)),
            None => training.split(config.validation_fraction, &tokenizer)?,
        };
        let training = training.ok_or_else(|| {
            Error::data("nothing is left to train on: all of the text is held out")
                .hint("lower data.validation_fraction, or use more text")
        })?;
        Ok(Texts { tokenizer, training: Arc::new(training), validation: validation.map(Arc::new) })
    }

    /// The number of token ids a model of these texts has: `configured`, or the tokenizer's.
    ///
    /// # Errors
    /// When the tokenizer has more than are configured.
    pub fn vocabulary(&self, configured: usize) -> Result<usize> {
        let found = self.tokenizer.vocabulary_size();
        match configured {
            0 => Ok(found),
            size if size >= found => Ok(size),
            size => Err(Error::config(format!(
                "model.vocab_size is {size}, but the tokenizer has {found} tokens"
            ))
            .hint("leave model.vocab_size at 0 to take it from the tokenizer")),
        }
    }

    /// The training batches of a run.
    ///
    /// # Errors
    /// When the text is too short for them.
    pub fn batches(&self, config: &RunConfig) -> Result<Stages> {
        let stages = config.data.batch_stages(config.training.accumulation);
        Stages::new(&self.training, config.data.batching, &stages, config.seed)
    }

    /// The configuration with its number of steps, also where it counts in epochs. This is what a
    /// run keeps: it goes on to the same step.
    ///
    /// # Errors
    /// As [`batches`](Texts::batches).
    pub fn with_steps(&self, config: &RunConfig) -> Result<RunConfig> {
        let steps = match config.training.epochs {
            None => config.training.steps(),
            Some(epochs) => {
                let batches = self.batches(config)?.batches_in(epochs);
                batches.div_ceil(config.training.accumulation as u64).max(1)
            }
        };
        let training = TrainingConfig { steps: Some(steps), epochs: None, ..config.training.clone() };
        Ok(RunConfig { training, ..config.clone() })
    }

    /// A number that tells training corpora apart.
    pub fn fingerprint(&self) -> String {
        self.training.fingerprint()
    }
}

/// The tokenizer that is configured, or that of the prepared data, or the characters of the files.
fn tokenizer_of(config: &DataConfig, origins: &[&Origin]) -> Result<Tokenizer> {
    let prepared = origins.iter().find_map(|origin| origin.tokenizer());
    match (&config.tokenizer, prepared) {
        (None, Some(prepared)) => Ok(prepared.clone()),
        (Some(TokenizerChoice::Bytes), _) => Ok(Tokenizer::bytes()),
        (Some(TokenizerChoice::File(path)), _) => Tokenizer::from_file(path),
        // Characters of the validation text too, or it could not be scored.
        (None | Some(TokenizerChoice::Characters), _) => {
            let mut characters = String::new();
            for origin in origins {
                if let Origin::Files(sources) = origin {
                    characters += &distinct_characters(sources, &config.text_options())?;
                }
            }
            Ok(Tokenizer::characters_of(&characters))
        }
    }
}
