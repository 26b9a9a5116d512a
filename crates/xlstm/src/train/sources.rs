//! Where a run's text and tokenizer come from: a word for what is built in, paths for the rest.
//!
//! A file that is named like one of the words is reached as `./word`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The word for the embedded text.
const SHAKESPEARE: &str = "shakespeare";
/// The word for a tokenizer made of the training text's characters.
const CHARACTERS: &str = "characters";
/// The word for the tokenizer of 256 bytes.
const BYTES: &str = "bytes";

/// One or more files, read in this order. In YAML: a path or a list of paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths(pub Vec<PathBuf>);

/// The training text. In YAML: `shakespeare`, a path or a list of paths.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum TextSource {
    /// The embedded text, Shakespeare's plays (1.1 MB).
    #[default]
    Shakespeare,
    /// Files; relative paths start at the current folder.
    Files(Paths),
}

/// The tokenizer. In YAML: `characters`, `bytes` or the path of a file that
/// [`Tokenizer::from_file`](crate::text::Tokenizer::from_file) reads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum TokenizerChoice {
    /// One token for each character that occurs in the training text.
    #[default]
    Characters,
    /// One token for each of the 256 bytes.
    Bytes,
    /// A file, for instance a `tokenizer.json` in Hugging Face's format.
    File(PathBuf),
}

impl Serialize for Paths {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            // A lone path reads best as itself, but a word would be read back as the word.
            [path] if path.as_os_str() != SHAKESPEARE => path.serialize(serializer),
            paths => paths.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Paths {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PathsVisitor)
    }
}

struct PathsVisitor;

impl<'de> Visitor<'de> for PathsVisitor {
    type Value = Paths;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a path or a list of paths")
    }

    fn visit_str<E: de::Error>(self, path: &str) -> Result<Paths, E> {
        if path.is_empty() {
            return Err(E::custom("the path is empty"));
        }
        Ok(Paths(vec![path.into()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Paths, A::Error> {
        let mut paths = Vec::new();
        while let Some(path) = items.next_element::<PathBuf>()? {
            paths.push(path);
        }
        if paths.is_empty() {
            return Err(de::Error::custom("the list of paths is empty"));
        }
        Ok(Paths(paths))
    }
}

impl Serialize for TextSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            TextSource::Shakespeare => serializer.serialize_str(SHAKESPEARE),
            TextSource::Files(paths) => paths.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for TextSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextSourceVisitor;
        impl<'de> Visitor<'de> for TextSourceVisitor {
            type Value = TextSource;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("`shakespeare`, a path or a list of paths")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<TextSource, E> {
                if word == SHAKESPEARE {
                    return Ok(TextSource::Shakespeare);
                }
                PathsVisitor.visit_str(word).map(TextSource::Files)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<TextSource, A::Error> {
                PathsVisitor.visit_seq(items).map(TextSource::Files)
            }
        }
        deserializer.deserialize_any(TextSourceVisitor)
    }
}

impl Serialize for TokenizerChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            TokenizerChoice::Characters => serializer.serialize_str(CHARACTERS),
            TokenizerChoice::Bytes => serializer.serialize_str(BYTES),
            TokenizerChoice::File(path) => path.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for TokenizerChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl FromStr for TokenizerChoice {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            CHARACTERS => Ok(TokenizerChoice::Characters),
            BYTES => Ok(TokenizerChoice::Bytes),
            "" => Err("the path is empty".into()),
            // A word that is no path is more likely a typo than a file.
            _ if !word.contains(['/', '\\', '.']) => {
                Err(format!("`{word}` is neither `{CHARACTERS}`, `{BYTES}` nor the path of a tokenizer"))
            }
            _ => Ok(TokenizerChoice::File(word.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn read<T: Serialize + de::DeserializeOwned + PartialEq + fmt::Debug>(yaml: &str) -> T {
        let value: T = serde_saphyr::from_str(yaml).unwrap_or_else(|e| panic!("{yaml}: {e}"));
        let again: T = serde_saphyr::from_str(&serde_saphyr::to_string(&value).unwrap()).unwrap();
        assert_eq!(value, again, "{yaml}");
        value
    }

    fn paths(paths: &[&str]) -> Paths {
        Paths(paths.iter().map(PathBuf::from).collect())
    }

    #[test]
    fn texts() {
        assert_eq!(read::<TextSource>("shakespeare"), TextSource::Shakespeare);
        assert_eq!(read::<TextSource>("a.txt"), TextSource::Files(paths(&["a.txt"])));
        assert_eq!(read::<TextSource>("[a.txt, b c.txt]"), TextSource::Files(paths(&["a.txt", "b c.txt"])));
        assert_eq!(read::<TextSource>("[shakespeare]"), TextSource::Files(paths(&["shakespeare"])));
        assert_eq!(read::<Option<Paths>>("null"), None);
        assert!(serde_saphyr::from_str::<TextSource>("[]").is_err());
        assert!(serde_saphyr::from_str::<TextSource>("{a: b}").is_err());
    }

    #[test]
    fn tokenizers() {
        assert_eq!(read::<TokenizerChoice>("characters"), TokenizerChoice::Characters);
        assert_eq!(read::<TokenizerChoice>("bytes"), TokenizerChoice::Bytes);
        assert_eq!(read::<TokenizerChoice>("t/x.json"), TokenizerChoice::File("t/x.json".into()));
        let error = serde_saphyr::from_str::<TokenizerChoice>("charakters").unwrap_err();
        assert!(error.to_string().contains("`charakters` is neither"), "{error}");
    }
}
