//! Where a corpus comes from: files of text, or folders of prepared tokens.

use std::path::{Path, PathBuf};

use super::corpus::Corpus;
use super::documents::TextOptions;
use super::prepared::Prepared;
use super::source::{Source, Split};
use super::tokenize::Progress;
use crate::text::Tokenizer;
use crate::{Error, Result};

/// Where a corpus comes from.
#[derive(Debug)]
pub enum Origin {
    /// Text that is yet to be tokenised.
    Files(Vec<Source>),
    /// Tokens.
    Prepared(Vec<Prepared>),
}

impl Origin {
    /// What `paths` mean: all of them folders of prepared tokens, or all of them as in
    /// [`Source::find`].
    ///
    /// # Errors
    /// Those of finding and opening; a mixture of both.
    pub fn find(paths: &[PathBuf], split: Split) -> Result<Origin> {
        let (prepared, others): (Vec<_>, Vec<_>) = paths.iter().partition(|path| Prepared::is_at(path));
        match (prepared.first(), others.first()) {
            (None, _) => Ok(Origin::Files(Source::find(paths, split)?)),
            (_, None) => {
                let prepared = prepared.into_iter().map(|path| Prepared::open(path));
                Ok(Origin::Prepared(prepared.collect::<Result<_>>()?))
            }
            (Some(prepared), Some(other)) => Err(Error::data(format!(
                "{} is prepared data and {} is not",
                prepared.display(),
                other.display()
            ))
            .hint("prepare both, or give the files of both")),
        }
    }

    /// The tokenizer of prepared tokens.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        match self {
            Origin::Files(_) => None,
            Origin::Prepared(prepared) => prepared.first().map(|prepared| &prepared.tokenizer),
        }
    }

    /// The tokens by `tokenizer`: those that are prepared, or those of the files, in memory or,
    /// with `cache`, kept in a folder of it and mapped into memory from there.
    ///
    /// # Errors
    /// Tokens of another tokenizer; those of reading, tokenising and writing.
    pub fn load(
        self,
        options: &TextOptions,
        tokenizer: &Tokenizer,
        cache: Option<&Path>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Corpus> {
        match (self, cache) {
            (Origin::Prepared(prepared), _) => {
                let foreign = prepared.iter().map(|prepared| &prepared.tokenizer);
                let foreign = foreign.filter(|other| other.fingerprint() != tokenizer.fingerprint());
                if let Some(other) = foreign.into_iter().next() {
                    return Err(Error::data(format!(
                        "the prepared data is of another tokenizer ({}) than the model ({})",
                        other.describe(),
                        tokenizer.describe()
                    ))
                    .hint(
                        "prepare the data with the model's tokenizer.json; a run takes that of the data where \
                         data.tokenizer is null",
                    ));
                }
                let corpora: Vec<Corpus> = prepared.into_iter().map(|prepared| prepared.corpus).collect();
                Corpus::concatenate(&corpora)
            }
            (Origin::Files(sources), Some(cache)) => {
                let folder = cache.join(Prepared::name_of(&sources, options, tokenizer));
                Ok(Prepared::make(&folder, sources, options, tokenizer, progress)?.corpus)
            }
            (Origin::Files(sources), None) => Corpus::read(&sources, options, tokenizer, progress),
        }
    }
}
