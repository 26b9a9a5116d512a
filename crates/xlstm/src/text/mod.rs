//! Tokenizers: text to token ids and back, whole or as a stream.
//!
//! Four kinds stand behind one type. Characters and bytes need no training and no
//! file from elsewhere, and are what small experiments use; words come from a list of them
//! (`words.rs` says how it is written); everything else is a Hugging Face `tokenizer.json`, which
//! GPT-2's two files are read as and trained vocabularies are written as. A run saves its tokenizer beside the model, since
//! the ids of a model mean nothing without it.

mod bytes;
mod characters;
mod decoder;
mod gpt2;
mod hugging_face;
mod training;
mod words;

use std::collections::HashMap;
use std::ffi::OsString;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::rng::mix;
use crate::{Error, Result};
use characters::Characters;
use hugging_face::HuggingFace;
use words::Words;

pub use decoder::Decoder;

/// What our own tokenizer files carry under `format`.
const FORMAT: &str = "xlstm-tokenizer";
/// The newest version of our own format.
const VERSION: u32 = 1;

/// A tokenizer. Cheap to clone: clones share one vocabulary.
#[derive(Debug, Clone)]
pub struct Tokenizer(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Characters(Arc<Characters>),
    Bytes,
    Words(Arc<Words>),
    HuggingFace(Arc<HuggingFace>),
}

/// Our own file format, as written.
#[derive(Serialize)]
struct Written<'a> {
    format: &'static str,
    version: u32,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    characters: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    words: Option<&'a [String]>,
}

/// Just enough of a JSON file to tell our format from Hugging Face's.
#[derive(Deserialize)]
struct Probe {
    format: Option<String>,
    version: Option<serde_json::Value>,
    kind: Option<String>,
    characters: Option<String>,
    words: Option<Vec<String>>,
    model: Option<serde::de::IgnoredAny>,
}

impl Tokenizer {
    /// One token for each distinct character of `text`, in the order of code points.
    ///
    /// The vocabulary is that of the training text; a character met later that is not
    /// in it is an error of [`encode`](Self::encode).
    pub fn characters_of(text: &str) -> Self {
        Tokenizer(Kind::Characters(Arc::new(Characters::of(text))))
    }

    /// One token for each byte of UTF-8: 256 ids, any text.
    pub fn bytes() -> Self {
        Tokenizer(Kind::Bytes)
    }

    /// Reads a Hugging Face `tokenizer.json`, a file written by [`save`](Self::save), GPT-2's
    /// `vocab.json` and `merges.txt` (one of them or their folder is named), or a list of words,
    /// one a line or in JSON. Which of these it is shows in name and content; a list of words in
    /// lines has another ending than `.json`.
    ///
    /// # Errors
    /// A file that is missing, damaged, or of no known format; another folder.
    pub fn from_file(path: &Path) -> Result<Self> {
        if let Some((vocabulary, merges)) = gpt2::files(path) {
            return Self::from_json(&gpt2::tokenizer_json(&vocabulary, &merges)?, &vocabulary);
        }
        if path.is_dir() {
            return Err(Error::data(format!(
                "expected a tokenizer file at {}, found a folder",
                path.display()
            ))
            .hint(format!("name the file in it, such as {}", path.join("tokenizer.json").display())));
        }
        let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, &e))?;
        let json = String::from_utf8(bytes).map_err(|e| {
            Error::data(format!(
                "expected a JSON tokenizer at {}, found bytes that are not UTF-8 at byte {}",
                path.display(),
                e.utf8_error().valid_up_to()
            ))
            .hint("a SentencePiece .model must first be converted to a Hugging Face tokenizer.json")
        })?;
        if path.extension().is_none_or(|ending| ending != "json")
            && !json.trim_start().starts_with(['{', '['])
        {
            return Ok(Tokenizer(Kind::Words(Arc::new(Words::from_lines(&json, path)?))));
        }
        Self::from_json(&json, path)
    }

    /// The tokenizer that `json` describes, in one of the formats of
    /// [`from_file`](Self::from_file); `origin` is named in errors.
    ///
    /// # Errors
    /// Text that is not JSON or of no known format, or a damaged vocabulary.
    pub fn from_json(json: &str, origin: &Path) -> Result<Self> {
        let words = |words: Result<Words>| Ok(Tokenizer(Kind::Words(Arc::new(words?))));
        if let Ok(list) = serde_json::from_str(json) {
            return words(Words::from_list(list, origin));
        }
        // A tokenizer.json is left at its first value, which is no number.
        if let Ok(ids) = serde_json::from_str::<HashMap<String, u32>>(json) {
            return words(Words::from_ids(ids, origin));
        }
        let probe: Probe = serde_json::from_str(json).map_err(|e| {
            Error::data(format!("expected a JSON tokenizer at {}, found: {e}", origin.display()))
                .hint("use a Hugging Face tokenizer.json or a tokenizer saved by this program")
        })?;
        if probe.format.as_deref() == Some(FORMAT) {
            return Self::from_own_format(probe, origin);
        }
        if probe.model.is_none() {
            return Err(Error::data(format!(
                "{} is JSON but no tokenizer: it has neither \"format\": \"{FORMAT}\" nor a \"model\"",
                origin.display()
            ))
            .hint("use a Hugging Face tokenizer.json, not tokenizer_config.json"));
        }
        Ok(Tokenizer(Kind::HuggingFace(Arc::new(HuggingFace::from_json(json, origin)?))))
    }

    fn from_own_format(probe: Probe, origin: &Path) -> Result<Self> {
        let version = probe.version.as_ref().and_then(serde_json::Value::as_u64);
        if version != Some(u64::from(VERSION)) {
            let found = probe.version.map_or("none".to_string(), |v| v.to_string());
            return Err(Error::data(format!(
                "expected version {VERSION} of the tokenizer format in {}, found {found}",
                origin.display()
            ))
            .hint("a file of a later version needs a later xlstm"));
        }
        match (probe.kind.as_deref(), probe.characters) {
            (Some("bytes"), _) => Ok(Tokenizer::bytes()),
            (Some("characters"), Some(characters)) => {
                Ok(Tokenizer(Kind::Characters(Arc::new(Characters::from_list(&characters, origin)?))))
            }
            (Some("characters"), None) => Err(Error::data(format!(
                "expected the list \"characters\" in the tokenizer {}, found none",
                origin.display()
            ))),
            (Some("words"), _) if probe.words.is_some() => {
                let words = Words::from_list(probe.words.unwrap_or_default(), origin)?;
                Ok(Tokenizer(Kind::Words(Arc::new(words))))
            }
            (kind, _) => Err(Error::data(format!(
                "expected the kind \"characters\", \"bytes\" or \"words\" in the tokenizer {}, found {kind:?}",
                origin.display()
            ))),
        }
    }

    /// The content of the file that [`from_json`](Self::from_json) reads back: our own
    /// format for characters and bytes, the very `tokenizer.json` it was made from for
    /// a Hugging Face tokenizer.
    ///
    /// # Errors
    /// None today; a format that cannot be written would be one.
    pub fn to_json(&self) -> Result<String> {
        let (characters, words) = match &self.0 {
            Kind::HuggingFace(tokenizer) => return Ok(tokenizer.source().to_string()),
            Kind::Characters(characters) => (Some(characters.list()), None),
            Kind::Words(words) => (None, Some(words.list())),
            Kind::Bytes => (None, None),
        };
        let written = Written {
            format: FORMAT,
            version: VERSION,
            kind: self.kind(),
            characters: characters.as_deref(),
            words,
        };
        serde_json::to_string(&written).map_err(|e| Error::data(format!("cannot write the tokenizer: {e}")))
    }

    /// Writes [`to_json`](Self::to_json) to `path`, first beside it and then in one
    /// rename, so that an interruption leaves no half file.
    ///
    /// # Errors
    /// The folder does not exist or cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut name = path.file_name().map_or_else(OsString::new, OsString::from);
        name.push(".partial");
        let partial = path.with_file_name(name);
        std::fs::write(&partial, self.to_json()?).map_err(|e| Error::io("write", &partial, &e))?;
        std::fs::rename(&partial, path).map_err(|e| Error::io("write", path, &e))
    }

    /// The ids of `text`. No token is added at either end. In a Hugging Face tokenizer
    /// the written form of an added token (`<|endoftext|>`) becomes that token.
    ///
    /// # Errors
    /// A character outside the vocabulary (characters), or text that the Hugging Face
    /// model has no token for.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match &self.0 {
            Kind::Characters(characters) => characters.encode(text),
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Kind::Words(words) => Ok(words.encode(text)?.into_iter().map(|(id, _)| id).collect()),
            Kind::HuggingFace(tokenizer) => tokenizer.encode(text),
        }
    }

    /// The ids of `text` as by [`encode`](Self::encode), each with the bytes of `text` that it
    /// stands for: what a loss by word or by line is added up with. Tokens that share a character
    /// have the bytes of all of it.
    ///
    /// # Errors
    /// Those of [`encode`](Self::encode).
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        match &self.0 {
            Kind::Characters(characters) => {
                let ends = text.char_indices().map(|(start, character)| start..start + character.len_utf8());
                Ok(characters.encode(text)?.into_iter().zip(ends).collect())
            }
            Kind::Bytes => {
                Ok(text.bytes().enumerate().map(|(place, b)| (b.into(), place..place + 1)).collect())
            }
            Kind::Words(words) => words.encode(text),
            Kind::HuggingFace(tokenizer) => tokenizer.encode_with_offsets(text),
        }
    }

    /// The id of a token in its written form, special ones included.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        match &self.0 {
            Kind::Words(words) => words.id_of(token),
            Kind::HuggingFace(tokenizer) => tokenizer.id_of(token),
            Kind::Characters(_) | Kind::Bytes => self.encode(token).ok().filter(|ids| ids.len() == 1)?.pop(),
        }
    }

    /// The text of `ids`, special tokens in their written form. Bytes that are not
    /// UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        match &self.0 {
            Kind::Characters(characters) => characters.decode(ids),
            Kind::Bytes => bytes::decode(ids),
            Kind::Words(words) => words.decode(ids),
            Kind::HuggingFace(tokenizer) => tokenizer.decode(ids),
        }
    }

    /// A decoder for ids that arrive one by one.
    pub fn decoder(&self) -> Decoder {
        Decoder::new(self.clone())
    }

    /// One more than the highest id: the rows an embedding must have.
    pub fn vocabulary_size(&self) -> usize {
        match &self.0 {
            Kind::Characters(characters) => characters.len(),
            Kind::Bytes => bytes::VOCABULARY_SIZE,
            Kind::Words(words) => words.list().len(),
            Kind::HuggingFace(tokenizer) => tokenizer.vocabulary_size(),
        }
    }

    /// The token that ends a document: `<|endoftext|>`, `</s>` or `<eos>`, the first of
    /// these among the added tokens of a Hugging Face tokenizer; `</s>` or `<|endoftext|>` of a
    /// list of words, whose `<eos>` ends a line.
    pub fn end_of_text(&self) -> Option<u32> {
        match &self.0 {
            Kind::HuggingFace(tokenizer) => tokenizer.end_of_text(),
            Kind::Words(words) => words.end_of_text(),
            Kind::Characters(_) | Kind::Bytes => None,
        }
    }

    /// The token that stands for what is not in the vocabulary, where there is one.
    pub fn unknown(&self) -> Option<u32> {
        match &self.0 {
            Kind::HuggingFace(tokenizer) => ["<unk>", "[UNK]"].iter().find_map(|name| tokenizer.id_of(name)),
            Kind::Words(words) => words.unknown(),
            Kind::Characters(_) | Kind::Bytes => None,
        }
    }

    /// The token that fills up, where there is one. Batches of this crate need none.
    pub fn pad(&self) -> Option<u32> {
        match &self.0 {
            Kind::HuggingFace(tokenizer) => ["<pad>", "[PAD]"].iter().find_map(|name| tokenizer.id_of(name)),
            Kind::Words(words) => words.pad(),
            Kind::Characters(_) | Kind::Bytes => None,
        }
    }

    /// Kind and size, for people.
    pub fn describe(&self) -> String {
        format!("{}, {} tokens", self.kind(), self.vocabulary_size())
    }

    /// A number that tells tokenizers apart, from the content of their files.
    pub fn fingerprint(&self) -> String {
        // What cannot be written, which does not happen, has no tokens either.
        let json = self.to_json().unwrap_or_default();
        format!("{:016x}", json.bytes().fold(0, |hash, byte| mix(hash ^ u64::from(byte))))
    }

    /// Whether a text may be cut between `before` and `after`, its parts around the cut: these have
    /// the same tokens one by one and joined.
    pub(crate) fn is_clean_cut(&self, before: &str, after: &str) -> bool {
        let Kind::HuggingFace(tokenizer) = &self.0 else { return true };
        let joined = tokenizer.encode(&[before, after].concat());
        match (joined, tokenizer.encode(before), tokenizer.encode(after)) {
            (Ok(joined), Ok(before), Ok(after)) => joined == [before, after].concat(),
            // The error comes where the text is encoded.
            _ => true,
        }
    }

    /// "characters", "bytes", "words" or "hugging-face".
    pub fn kind(&self) -> &'static str {
        match &self.0 {
            Kind::Characters(_) => "characters",
            Kind::Bytes => "bytes",
            Kind::Words(_) => "words",
            Kind::HuggingFace(_) => "hugging-face",
        }
    }
}

/// The error of an id outside a vocabulary.
fn unknown_id(id: u32, vocabulary_size: usize) -> Error {
    Error::data(format!("token {id} is outside the tokenizer's vocabulary of {vocabulary_size} tokens"))
        .hint("use the tokenizer the model was trained with; padded rows of an embedding have no text")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_json(json: &str) -> Result<Tokenizer> {
        Tokenizer::from_json(json, Path::new("some/tokenizer.json"))
    }

    #[test]
    fn own_format_round_trip() {
        let characters = Tokenizer::characters_of("hello \"wörld\"\n");
        let json = characters.to_json().unwrap();
        assert_eq!(
            json,
            r#"{"format":"xlstm-tokenizer","version":1,"kind":"characters","characters":"\n \"dehlorwö"}"#
        );
        let read = from_json(&json).unwrap();
        assert_eq!(read.encode("wörld").unwrap(), characters.encode("wörld").unwrap());
        assert_eq!((read.kind(), read.vocabulary_size(), read.end_of_text()), ("characters", 11, None));

        for file in [r#"["a","<unk>","</s>"]"#, r#"{"</s>":2,"a":0,"<unk>":1}"#] {
            let json = from_json(file).unwrap().to_json().unwrap();
            let words =
                r#"{"format":"xlstm-tokenizer","version":1,"kind":"words","words":["a","<unk>","</s>"]}"#;
            assert_eq!(json, words);
            let read = from_json(&json).unwrap();
            assert_eq!(read.encode("b a </s>").unwrap(), [1, 0, 2]);
            assert_eq!((read.kind(), read.unknown(), read.end_of_text()), ("words", Some(1), Some(2)));
        }

        let json = Tokenizer::bytes().to_json().unwrap();
        assert_eq!(json, r#"{"format":"xlstm-tokenizer","version":1,"kind":"bytes"}"#);
        assert_eq!(from_json(&json).unwrap().vocabulary_size(), 256);
    }

    #[test]
    fn save_and_from_file() {
        let folder = std::env::temp_dir().join(format!("xlstm-tokenizer-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("tokenizer.json");
        Tokenizer::characters_of("abc").save(&path).unwrap();
        assert_eq!(Tokenizer::from_file(&path).unwrap().decode(&[2, 0]).unwrap(), "ca");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "no partial file is left");

        assert!(Tokenizer::from_file(&folder).unwrap_err().to_string().contains("found a folder"));
        std::fs::write(&path, [b'{', 0xFF]).unwrap();
        assert!(Tokenizer::from_file(&path).unwrap_err().to_string().contains("not UTF-8 at byte 1"));
        std::fs::write(folder.join("words.txt"), "the\ncat\n").unwrap();
        assert_eq!(Tokenizer::from_file(&folder.join("words.txt")).unwrap().id_of("cat"), Some(1));
        let missing = Tokenizer::from_file(&folder.join("missing.json")).unwrap_err();
        assert_eq!(missing.kind(), crate::ErrorKind::Io);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn damaged_files_are_named() {
        let message = |json: &str| from_json(json).unwrap_err().to_string();
        assert!(message("hello").contains("expected a JSON tokenizer at some/tokenizer.json"));
        assert!(message(r#"{"a": "b"}"#).contains("neither"));
        assert!(message(r#"{"format":"xlstm-tokenizer","version":2,"kind":"bytes"}"#).contains("found 2"));
        assert!(message(r#"{"format":"xlstm-tokenizer","version":1,"kind":"wards"}"#).contains("wards"));
        assert!(message(r#"{"format":"xlstm-tokenizer","version":1,"kind":"characters"}"#).contains("none"));
        let twice = r#"{"format":"xlstm-tokenizer","version":1,"kind":"characters","characters":"aba"}"#;
        assert!(message(twice).contains("'a' twice"));
        assert!(message(r#"{"model": {"type": "Unheard"}}"#).contains("Hugging Face"));
    }

    #[test]
    fn foreign_characters_and_ids_are_named() {
        let tokenizer = Tokenizer::characters_of("añb");
        let error = tokenizer.encode("añ€").unwrap_err().to_string();
        assert!(error.contains("'€' (U+20AC) at byte 3"), "{error}");
        let error = tokenizer.decode(&[0, 3]).unwrap_err().to_string();
        assert!(error.contains("token 3 is outside the tokenizer's vocabulary of 3 tokens"), "{error}");
        let error = Tokenizer::bytes().decode(&[65, 256]).unwrap_err().to_string();
        assert!(error.contains("token 256 is outside the tokenizer's vocabulary of 256 tokens"), "{error}");
    }

    #[test]
    fn bytes_decode_lossily() {
        let tokenizer = Tokenizer::bytes();
        let ids = tokenizer.encode("é🙂").unwrap();
        assert_eq!(ids.len(), 6);
        assert_eq!(tokenizer.decode(&ids).unwrap(), "é🙂");
        assert_eq!(tokenizer.decode(&ids[1..4]).unwrap(), "\u{FFFD}\u{FFFD}");
    }
}
