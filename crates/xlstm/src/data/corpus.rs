//! Text files, and corpora of tokens with document starts.

use std::path::Path;

use rayon::prelude::*;

use crate::text::Tokenizer;
use crate::{Error, Result};

/// The text of the file at `path`, without a leading byte-order mark.
///
/// # Errors
/// A file that is missing or a folder, that holds nothing but whitespace, or that is
/// not UTF-8; the last names the first bad byte and its line.
pub fn read_text(path: &Path) -> Result<String> {
    if path.is_dir() {
        return Err(Error::data(format!("expected a text file at {}, found a folder", path.display()))
            .hint("name a .txt file inside it"));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, &e))?;
    let text =
        String::from_utf8(bytes).map_err(|e| not_utf8(path, e.as_bytes(), e.utf8_error().valid_up_to()))?;
    if text.trim_start_matches('\u{FEFF}').trim().is_empty() {
        let found = if text.is_empty() { "an empty file" } else { "nothing but whitespace" };
        return Err(Error::data(format!("expected text in {}, found {found}", path.display()))
            .hint("check that the download or export of the file was complete"));
    }
    Ok(match text.strip_prefix('\u{FEFF}') {
        Some(rest) => rest.to_string(),
        None => text,
    })
}

/// The error of a file whose byte at `offset` is the first that is not UTF-8.
fn not_utf8(path: &Path, bytes: &[u8], offset: usize) -> Error {
    let line = 1 + bytes[..offset].iter().filter(|&&b| b == b'\n').count();
    let byte = bytes.get(offset).copied().unwrap_or_default();
    let utf16 = bytes.starts_with(&[0xFF, 0xFE]) || bytes.starts_with(&[0xFE, 0xFF]);
    let encoding = if utf16 { "UTF-16" } else { "LATIN1" };
    Error::data(format!(
        "expected UTF-8 in {}, found the byte 0x{byte:02X} at offset {offset} (line {line})",
        path.display()
    ))
    .hint(format!("re-encode the file: iconv -f {encoding} -t UTF-8 OLD > NEW"))
}

/// The beginning of `text` for training and its last `fraction` for validation.
///
/// Cut by characters, at floor(characters * (1 - fraction)): what nanoGPT does, so that
/// losses on tinyshakespeare compare. A `fraction` outside 0..=1 counts as its nearer end.
pub fn split_text(text: &str, fraction: f64) -> (&str, &str) {
    let characters = text.chars().count();
    let kept = (characters as f64 * (1.0 - fraction.clamp(0.0, 1.0))) as usize;
    let offset = text.char_indices().nth(kept).map_or(text.len(), |(offset, _)| offset);
    text.split_at(offset)
}

/// A corpus: the tokens of all documents, one after another, and where each begins.
///
/// Also counts the bytes and words of the text, since losses of different tokenizers
/// compare only per byte or per word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corpus {
    tokens: Vec<u32>,
    documents: Vec<usize>,
    bytes: u64,
    words: u64,
}

impl Corpus {
    /// Encodes `texts`, each of which is one document, in parallel. A text without
    /// tokens is left out. No end-of-text token is added: one that should be there
    /// stands in the text.
    ///
    /// # Errors
    /// A text that the tokenizer cannot encode, named by its number from 1 when there
    /// are several; no tokens at all.
    pub fn from_texts<T: AsRef<str> + Sync>(texts: &[T], tokenizer: &Tokenizer) -> Result<Self> {
        let encoded: Vec<Result<Vec<u32>>> =
            texts.par_iter().map(|text| tokenizer.encode(text.as_ref())).collect();
        let mut tokens = Vec::new();
        let mut documents = Vec::new();
        // In order, so that the first error is always the same one.
        for (number, ids) in (1..).zip(encoded) {
            let ids = ids.map_err(|e| in_document(e, number, texts.len()))?;
            if !ids.is_empty() {
                documents.push(tokens.len());
                tokens.extend_from_slice(&ids);
            }
        }
        let bytes = texts.iter().map(|text| text.as_ref().len() as u64).sum();
        let words = texts.par_iter().map(|text| text.as_ref().split_whitespace().count() as u64).sum();
        Corpus::from_tokens(tokens, documents, bytes, words)
    }

    /// A corpus of tokens made elsewhere. `documents` holds the place of the first token
    /// of each document, the first 0 and each above the one before; `bytes` and `words`
    /// are those of the text that the tokens stand for.
    ///
    /// # Errors
    /// No tokens; starts that are out of order or range; a token equal to
    /// [`IGNORE`](super::IGNORE).
    pub fn from_tokens(tokens: Vec<u32>, documents: Vec<usize>, bytes: u64, words: u64) -> Result<Self> {
        if tokens.is_empty() {
            return Err(Error::data("expected a corpus with text, found no tokens")
                .hint("check that the files name the right text"));
        }
        let ascending = documents.windows(2).all(|pair| pair[0] < pair[1]);
        let inside = documents.last().is_some_and(|&last| last < tokens.len());
        if documents.first() != Some(&0) || !ascending || !inside {
            return Err(Error::data(format!(
                "expected document starts from 0 upwards and below {}, found {} starts that are not",
                tokens.len(),
                documents.len()
            )));
        }
        if let Some(place) = tokens.iter().position(|&token| token == super::IGNORE) {
            return Err(Error::data(format!(
                "token {place} of the corpus is {}, the value that marks a target to ignore",
                super::IGNORE
            )));
        }
        Ok(Corpus { tokens, documents, bytes, words })
    }

    /// All tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The place of the first token of each document, ascending from 0.
    pub fn documents(&self) -> &[usize] {
        &self.documents
    }

    /// The number of tokens; at least 1.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are no tokens, which is never so.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The number of tokens that have another before them in their document: what a
    /// model can be asked to predict.
    pub fn target_count(&self) -> usize {
        self.tokens.len() - self.documents.len()
    }

    /// Bytes of the text in UTF-8.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Words of the text, separated by whitespace.
    pub fn words(&self) -> u64 {
        self.words
    }

    /// The starts of documents within `range` of token places.
    pub(super) fn starts_within(&self, range: std::ops::RangeInclusive<usize>) -> &[usize] {
        let first = self.documents.partition_point(|start| start < range.start());
        let end = self.documents.partition_point(|start| start <= range.end());
        &self.documents[first..end.max(first)]
    }
}

/// `error` with the number of its document, when there are several.
fn in_document(error: Error, number: usize, count: usize) -> Error {
    if count == 1 {
        return error;
    }
    let named = Error::new(error.kind(), format!("document {number} of {count}: {error}"));
    match error.hint_text() {
        Some(hint) => named.hint(hint),
        None => named,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    /// What `read_text` says to a file of these bytes.
    fn read(name: &str, bytes: &[u8]) -> Result<String> {
        let path = std::env::temp_dir().join(format!("xlstm-corpus-{}-{name}.txt", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        let result = read_text(&path);
        std::fs::remove_file(&path).unwrap();
        result
    }

    #[test]
    fn reading_text() {
        assert_eq!(read("good", "é\r\nb".as_bytes()).unwrap(), "é\r\nb");
        assert_eq!(read("mark", "\u{FEFF}text".as_bytes()).unwrap(), "text");
        for (name, bytes, expected, hint) in [
            ("empty", &b""[..], "an empty file", "complete"),
            ("blank", b" \n\t", "nothing but whitespace", "complete"),
            ("latin", b"a\nb\nnaXve \xE9t\xE9", "the byte 0xE9 at offset 10 (line 3)", "LATIN1"),
            ("cut", b"a\n\xE2\x82", "the byte 0xE2 at offset 2 (line 2)", "iconv"),
            ("utf16", b"\xFF\xFEa\0", "the byte 0xFF at offset 0 (line 1)", "UTF-16"),
        ] {
            let error = read(name, bytes).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.to_string().contains(".txt"), "{error}");
            assert!(error.hint_text().unwrap().contains(hint), "{error:?}");
            assert_eq!(error.kind(), ErrorKind::Data);
        }
        assert!(read_text(&std::env::temp_dir()).unwrap_err().to_string().contains("a folder"));
        let missing = read_text(Path::new("no/such/file.txt")).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::Io);
        assert!(missing.to_string().contains("no/such/file.txt"));
    }

    #[test]
    fn splitting_text() {
        let text = "x".repeat(1_115_394);
        let (train, validation) = split_text(&text, 0.1);
        assert_eq!((train.len(), validation.len()), (1_003_854, 111_540));
        assert_eq!(split_text("ééééé", 0.4), ("ééé", "éé"));
        assert_eq!(split_text("abc", 0.0), ("abc", ""));
        assert_eq!(split_text("abc", 7.0), ("", "abc"));
        assert_eq!(split_text("abc", f64::NAN), ("", "abc"));
        assert_eq!(split_text("", 0.1), ("", ""));
    }

    #[test]
    fn documents_and_counts() {
        let tokenizer = Tokenizer::bytes();
        let corpus = Corpus::from_texts(&["ab c", "", "é  d\n"], &tokenizer).unwrap();
        assert_eq!(corpus.tokens(), tokenizer.encode("ab cé  d\n").unwrap());
        assert_eq!(corpus.documents(), [0, 4]);
        assert_eq!((corpus.len(), corpus.bytes(), corpus.words(), corpus.target_count()), (10, 10, 4, 8));
        assert_eq!(corpus.starts_within(0..=3), [0]);
        assert_eq!(corpus.starts_within(1..=4), [4]);
        assert!(corpus.starts_within(5..=9).is_empty());
    }

    #[test]
    fn unusable_corpora() {
        let tokenizer = Tokenizer::characters_of("ab");
        let error = Corpus::from_texts(&["ab", "axb"], &tokenizer).unwrap_err();
        assert!(error.to_string().starts_with("document 2 of 2: the character 'x'"), "{error}");
        assert!(error.hint_text().is_some());
        assert!(Corpus::from_texts(&["", ""], &tokenizer).unwrap_err().to_string().contains("no tokens"));
        assert!(Corpus::from_texts::<&str>(&[], &tokenizer).is_err());
        for starts in [vec![], vec![1], vec![0, 2, 2], vec![0, 3]] {
            assert!(Corpus::from_tokens(vec![1, 2, 3], starts, 3, 1).is_err());
        }
        assert!(Corpus::from_tokens(vec![1, super::super::IGNORE], vec![0], 2, 1).is_err());
    }
}
