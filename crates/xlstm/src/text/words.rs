//! One token a word: the tokenizer of word-level language models, from a list of words.
//!
//! A vocabulary file is one word a line, whose id is the number of the line from 0, or JSON: a list
//! of words in the order of their ids, or an object from word to id, with every id from 0 up once.
//! Words with a meaning are known by their spelling:
//! - `<unk>` or `[UNK]` stands for every word that is not in the list;
//! - `<eos>` ends a line: every line break of a text becomes it, as the word-level literature has
//!   it; without it line breaks are white space like any other;
//! - `</s>` or `<|endoftext|>` ends a document;
//! - `<pad>` or `[PAD]` fills up.
//!
//! Words are what white space separates. Decoding puts one space between them, and line breaks for
//! `<eos>`: text that is spaced so comes back exactly.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::unknown_id;
use crate::{Error, Result};

const UNKNOWN: [&str; 2] = ["<unk>", "[UNK]"];
const END_OF_LINE: [&str; 1] = ["<eos>"];
const END_OF_TEXT: [&str; 2] = ["</s>", "<|endoftext|>"];
const PAD: [&str; 2] = ["<pad>", "[PAD]"];

/// A list of distinct words and its inverse.
#[derive(Debug)]
pub(super) struct Words {
    words: Vec<String>,
    ids: HashMap<String, u32>,
    unknown: Option<u32>,
    end_of_line: Option<u32>,
}

impl Words {
    /// The vocabulary whose id i is the i-th word of `words`, read from `origin`.
    pub fn from_list(words: Vec<String>, origin: &Path) -> Result<Self> {
        if words.is_empty() {
            return Err(Error::data(format!("the vocabulary {} lists no words", origin.display())));
        }
        let mut ids = HashMap::with_capacity(words.len());
        for (id, word) in (0..).zip(&words) {
            if word.is_empty() || word.contains(char::is_whitespace) {
                return Err(Error::data(format!(
                    "expected a word without white space as entry {id} of the vocabulary {}, found {word:?}",
                    origin.display()
                ))
                .hint("a vocabulary file holds one word a line; the id of a word is its line from 0"));
            }
            if let Some(first) = ids.insert(word.clone(), id) {
                return Err(Error::data(format!(
                    "the vocabulary {} lists {word:?} twice, as entries {first} and {id}",
                    origin.display()
                ))
                .hint("every word has one id; remove one of the two"));
            }
        }
        let named = |names: &[&str]| names.iter().find_map(|name| ids.get(*name).copied());
        let (unknown, end_of_line) = (named(&UNKNOWN), named(&END_OF_LINE));
        Ok(Words { words, ids, unknown, end_of_line })
    }

    /// The vocabulary in `text`, one word a line.
    pub fn from_lines(text: &str, origin: &Path) -> Result<Self> {
        let text = text.trim_start_matches('\u{FEFF}');
        Words::from_list(text.lines().map(str::to_owned).collect(), origin)
    }

    /// The vocabulary in an object from word to id.
    pub fn from_ids(ids: HashMap<String, u32>, origin: &Path) -> Result<Self> {
        let mut words: Vec<(u32, String)> = ids.into_iter().map(|(word, id)| (id, word)).collect();
        words.sort_unstable();
        if let Some((expected, (id, word))) = (0..).zip(&words).find(|(expected, (id, _))| expected != id) {
            return Err(Error::data(format!(
                "expected the id {expected} in the vocabulary {}, found {id} for {word:?}",
                origin.display()
            ))
            .hint("ids go from 0 up, each to one word"));
        }
        Words::from_list(words.into_iter().map(|(_, word)| word).collect(), origin)
    }

    /// All words in the order of their ids.
    pub fn list(&self) -> &[String] {
        &self.words
    }

    /// The id of a word of the list.
    pub fn id_of(&self, word: &str) -> Option<u32> {
        self.ids.get(word).copied()
    }

    /// The id that stands for words that are not in the list.
    pub fn unknown(&self) -> Option<u32> {
        self.unknown
    }

    /// The id that ends a document.
    pub fn end_of_text(&self) -> Option<u32> {
        END_OF_TEXT.iter().find_map(|name| self.id_of(name))
    }

    /// The id that fills up.
    pub fn pad(&self) -> Option<u32> {
        PAD.iter().find_map(|name| self.id_of(name))
    }

    /// The id of each word of `text` and the bytes that it stands for.
    pub fn encode(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let mut encoded = Vec::with_capacity(text.len() / 4);
        let mut start = None;
        for (place, character) in text.char_indices().chain([(text.len(), '\n')]) {
            match start {
                None if !character.is_whitespace() => start = Some(place),
                Some(begin) if character.is_whitespace() => {
                    encoded.push((self.id(text, begin..place)?, begin..place));
                    start = None;
                }
                _ => {}
            }
            if character == '\n' && place < text.len() {
                encoded.extend(self.end_of_line.map(|id| (id, place..place + 1)));
            }
        }
        Ok(encoded)
    }

    fn id(&self, text: &str, place: Range<usize>) -> Result<u32> {
        let word = &text[place.clone()];
        self.id_of(word).or(self.unknown).ok_or_else(|| {
            Error::data(format!(
                "the word {word:?} at byte {} is not among the {} words of the tokenizer",
                place.start,
                self.words.len()
            ))
            .hint("put <unk> into the vocabulary to stand for words that are not in it")
        })
    }

    /// The word of `id`.
    pub fn word(&self, id: u32) -> Result<&str> {
        self.words.get(id as usize).map(String::as_str).ok_or_else(|| unknown_id(id, self.words.len()))
    }

    /// The text of `id` after other text, or at the beginning of a line; and whether a line begins
    /// after it.
    pub fn text(&self, id: u32, line_begins: bool) -> Result<(String, bool)> {
        let word = self.word(id)?;
        Ok(match (Some(id) == self.end_of_line, line_begins) {
            (true, _) => ("\n".into(), true),
            (false, true) => (word.into(), false),
            (false, false) => (format!(" {word}"), false),
        })
    }

    /// The text of `ids`.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let (mut text, mut line_begins) = (String::new(), true);
        for &id in ids {
            let (part, begins) = self.text(id, line_begins)?;
            text.push_str(&part);
            line_begins = begins;
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(lines: &str) -> Result<Words> {
        Words::from_lines(lines, Path::new("vocab.txt"))
    }

    fn ids(words: &Words, text: &str) -> Vec<u32> {
        words.encode(text).unwrap().into_iter().map(|(id, _)| id).collect()
    }

    #[test]
    fn words_lines_and_unknowns() {
        let vocabulary = words("<pad>\n<unk>\n<eos>\nthe\ncat\n</s>\n").unwrap();
        assert_eq!(ids(&vocabulary, "the cat\nthe dog\n"), [3, 4, 2, 3, 1, 2]);
        assert_eq!(ids(&vocabulary, "  the\tcat </s>"), [3, 4, 5]);
        assert!(ids(&vocabulary, " ").is_empty());
        assert_eq!(
            vocabulary.encode("the dög\n").unwrap(),
            [(3, 0..3), (1, 4..8), (2, 8..9)],
            "offsets are bytes"
        );
        let text = "the cat\n\nthe cat the\n";
        assert_eq!(vocabulary.decode(&ids(&vocabulary, text)).unwrap(), text);
        assert_eq!(
            (vocabulary.unknown(), vocabulary.pad(), vocabulary.end_of_text()),
            (Some(1), Some(0), Some(5))
        );
        assert!(vocabulary.decode(&[6]).is_err());
    }

    #[test]
    fn damaged_vocabularies_are_named() {
        let message = |lines: &str| words(lines).unwrap_err().to_string();
        assert!(message("").contains("lists no words"));
        assert!(message("a\nb\na\n").contains("lists \"a\" twice, as entries 0 and 2"));
        assert!(message("a\n\nb\n").contains("entry 1"));
        assert!(message("a\nb c\n").contains("found \"b c\""));
        let ids = |pairs: &[(&str, u32)]| {
            Words::from_ids(
                pairs.iter().map(|(word, id)| ((*word).to_owned(), *id)).collect(),
                Path::new("v.json"),
            )
        };
        assert_eq!(ids(&[("b", 1), ("a", 0)]).unwrap().list(), ["a", "b"]);
        assert!(ids(&[("b", 2), ("a", 0)]).unwrap_err().to_string().contains("expected the id 1"));
        let error = words("a\n").unwrap().encode("a b").unwrap_err();
        assert!(error.to_string().contains("the word \"b\" at byte 2"), "{error}");
    }
}
