//! Tokenizers: text to token ids and back, whole or as a stream.
//!
//! Three kinds stand behind one type. Characters and bytes need no training and no
//! file from elsewhere, and are what small experiments use; everything else is a
//! Hugging Face `tokenizer.json`. A run saves its tokenizer beside the model, since
//! the ids of a model mean nothing without it.

mod bytes;
mod characters;
mod decoder;
mod hugging_face;
mod training;

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::rng::mix;
use crate::{Error, Result};
use characters::Characters;
use hugging_face::HuggingFace;

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
}

/// Just enough of a JSON file to tell our format from Hugging Face's.
#[derive(Deserialize)]
struct Probe {
    format: Option<String>,
    version: Option<serde_json::Value>,
    kind: Option<String>,
    characters: Option<String>,
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

    /// Reads a Hugging Face `tokenizer.json` or a file written by [`save`](Self::save);
    /// which of the two it is shows in its content.
    ///
    /// # Errors
    /// A file that is missing, a folder, not JSON, or neither of the two formats.
    pub fn from_file(path: &Path) -> Result<Self> {
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
        Self::from_json(&json, path)
    }

    /// The tokenizer that `json` describes, in one of the two formats of
    /// [`from_file`](Self::from_file); `origin` is named in errors.
    ///
    /// # Errors
    /// Text that is not JSON or is neither of the two formats, or a damaged vocabulary.
    pub fn from_json(json: &str, origin: &Path) -> Result<Self> {
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
            .hint("use a Hugging Face tokenizer.json (not vocab.json or tokenizer_config.json)"));
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
            (kind, _) => Err(Error::data(format!(
                "expected the kind \"characters\" or \"bytes\" in the tokenizer {}, found {kind:?}",
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
        let characters = match &self.0 {
            Kind::HuggingFace(tokenizer) => return Ok(tokenizer.source().to_string()),
            Kind::Characters(characters) => Some(characters.list()),
            Kind::Bytes => None,
        };
        let written = Written {
            format: FORMAT,
            version: VERSION,
            kind: self.kind(),
            characters: characters.as_deref(),
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
            Kind::HuggingFace(tokenizer) => tokenizer.encode(text),
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
            Kind::HuggingFace(tokenizer) => tokenizer.vocabulary_size(),
        }
    }

    /// The token that ends a document: `<|endoftext|>`, `</s>` or `<eos>`, the first of
    /// these among the added tokens of a Hugging Face tokenizer.
    pub fn end_of_text(&self) -> Option<u32> {
        match &self.0 {
            Kind::HuggingFace(tokenizer) => tokenizer.end_of_text(),
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

    /// "characters", "bytes" or "hugging-face".
    pub fn kind(&self) -> &'static str {
        match &self.0 {
            Kind::Characters(_) => "characters",
            Kind::Bytes => "bytes",
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
        let missing = Tokenizer::from_file(&folder.join("missing.json")).unwrap_err();
        assert_eq!(missing.kind(), crate::ErrorKind::Io);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn damaged_files_are_named() {
        let message = |json: &str| from_json(json).unwrap_err().to_string();
        assert!(message("hello").contains("expected a JSON tokenizer at some/tokenizer.json"));
        assert!(message(r#"{"a": 1}"#).contains("neither"));
        assert!(message(r#"{"format":"xlstm-tokenizer","version":2,"kind":"bytes"}"#).contains("found 2"));
        assert!(message(r#"{"format":"xlstm-tokenizer","version":1,"kind":"words"}"#).contains("words"));
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
