//! From a run's configuration to its tokenizer and token corpora.

use std::sync::Arc;

use super::config::DataConfig;
use super::sources::{Paths, TextSource, TokenizerChoice};
use crate::data::{Corpus, read_text, split_text};
use crate::error::{Error, Result};
use crate::rng::mix;
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
    /// Reads and tokenizes the texts of `config`; `shakespeare` is the text of that name.
    ///
    /// # Errors
    /// When a file cannot be used, or holds what the tokenizer does not know.
    pub fn load(config: &DataConfig, shakespeare: &str) -> Result<Texts> {
        let read =
            |paths: &Paths| paths.0.iter().map(|path| read_text(path)).collect::<Result<Vec<String>>>();
        let all = match &config.train {
            TextSource::Shakespeare => vec![shakespeare.to_owned()],
            TextSource::Files(paths) => read(paths)?,
        };
        let mut training: Vec<&str> = all.iter().map(String::as_str).collect();
        let held_out: Vec<String> = match &config.validation {
            Some(paths) => read(paths)?,
            None if config.validation_fraction > 0.0 => {
                // The last part of the last text.
                let last = training.pop().unwrap_or_default();
                let (train, validation) = split_text(last, config.validation_fraction);
                training.push(train);
                vec![validation.to_owned()]
            }
            None => Vec::new(),
        };
        let tokenizer = match &config.tokenizer {
            // Characters of the held-out part too, or it could not be scored.
            TokenizerChoice::Characters => {
                let everything = all.iter().chain(&held_out).map(String::as_str).collect::<String>();
                Tokenizer::characters_of(&everything)
            }
            TokenizerChoice::Bytes => Tokenizer::bytes(),
            TokenizerChoice::File(path) => Tokenizer::from_file(path)?,
        };
        let training = Arc::new(Corpus::from_texts(&training, &tokenizer)?);
        let validation = match held_out.iter().any(|text| !text.trim().is_empty()) {
            true => Some(Arc::new(Corpus::from_texts(&held_out, &tokenizer)?)),
            false => None,
        };
        Ok(Texts { tokenizer, training, validation })
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

    /// A number that tells training corpora apart.
    pub fn fingerprint(&self) -> String {
        let hash = self.training.tokens().iter().fold(0, |hash, token| mix(hash ^ u64::from(*token)));
        format!("{hash:016x}")
    }
}
