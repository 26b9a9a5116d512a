//! The one error type of the crate.
//!
//! A message says what was expected, what was found and where; the hint, printed on
//! a line of its own, says what to do next.

use std::path::Path;

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// The class of an [`Error`]: what a caller may want to branch on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A configuration file or an override that does not describe a valid run.
    Config,
    /// A corpus, a tokenizer or a token that cannot be used.
    Data,
    /// A model folder, checkpoint or state file that is missing, damaged or foreign.
    Checkpoint,
    /// Tensors whose shapes do not fit together.
    Shape,
    /// A number that is not finite where training needs one.
    NonFinite,
    /// The operating system refused a read or a write.
    Io,
    /// A GPU that is missing, too old, or that failed.
    Device,
}

/// An error with an optional hint on how to go on.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
}

impl Error {
    /// An error of `kind` with a message that names what was expected, found and where.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), hint: None }
    }

    /// A configuration error.
    pub fn config(message: impl Into<String>) -> Self {
        Error::new(ErrorKind::Config, message)
    }

    /// A corpus or tokenizer error.
    pub fn data(message: impl Into<String>) -> Self {
        Error::new(ErrorKind::Data, message)
    }

    /// A checkpoint, model folder or state file error.
    pub fn checkpoint(message: impl Into<String>) -> Self {
        Error::new(ErrorKind::Checkpoint, message)
    }

    /// A shape error.
    pub fn shape(message: impl Into<String>) -> Self {
        Error::new(ErrorKind::Shape, message)
    }

    /// An operating-system error on `path` while doing `action` ("read", "write", …).
    pub fn io(action: &str, path: &Path, error: &std::io::Error) -> Self {
        let e = Error::new(ErrorKind::Io, format!("cannot {action} {}: {error}", path.display()));
        match error.kind() {
            std::io::ErrorKind::NotFound => {
                e.hint("check the path; relative paths start at the current folder")
            }
            std::io::ErrorKind::PermissionDenied => {
                e.hint("check the permissions of the file and its folder")
            }
            std::io::ErrorKind::StorageFull => e.hint("free some space or choose another folder with --out"),
            _ => e,
        }
    }

    /// The same error with a line that says what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same error with this hint where it has none.
    #[must_use]
    pub(crate) fn or_hint(self, hint: &str) -> Self {
        if self.hint.is_some() { self } else { self.hint(hint) }
    }

    /// The class of the error.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What to do next, where we know.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

/// The candidate closest to `word` by edit distance, if it is close enough to be a typo.
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|c| (edit_distance(word, c), c))
        .min()
        .filter(|(d, c)| *d <= 1 + c.len().max(word.len()) / 3)
        .map(|(_, c)| c)
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitution = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substitution.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_finds_typos_and_rejects_strangers() {
        let keys = ["batch_size", "learning_rate", "length"];
        assert_eq!(nearest("batchsize", keys), Some("batch_size"));
        assert_eq!(nearest("learing_rate", keys), Some("learning_rate"));
        assert_eq!(nearest("zebra_crossing_light", keys), None);
    }
}
