//! One token a character: the tokenizer of the small character models.

use std::path::Path;

use super::unknown_id;
use crate::{Error, Result};

/// What the table holds for a code point that is not in the vocabulary.
const ABSENT: u32 = u32::MAX;

/// A list of distinct characters and its inverse.
#[derive(Debug)]
pub(super) struct Characters {
    /// The character of each id.
    characters: Vec<char>,
    /// The id of each code point up to the highest of the vocabulary. Dense, since
    /// encoding a corpus looks up every character: at most 4.5 MB, for text a few kB.
    ids: Vec<u32>,
}

impl Characters {
    /// The distinct characters of `text`, sorted by code point.
    pub(super) fn of(text: &str) -> Self {
        let highest = text.chars().max().map_or(0, |c| c as usize + 1);
        let mut ids = vec![ABSENT; highest];
        for character in text.chars() {
            ids[character as usize] = 0;
        }
        let mut characters = Vec::new();
        for (code_point, id) in (0u32..).zip(&mut ids) {
            if let (0, Some(character)) = (*id, char::from_u32(code_point)) {
                *id = characters.len() as u32;
                characters.push(character);
            }
        }
        Characters { characters, ids }
    }

    /// The vocabulary whose id i is the i-th character of `list`, read from `origin`.
    pub(super) fn from_list(list: &str, origin: &Path) -> Result<Self> {
        let characters: Vec<char> = list.chars().collect();
        let Some(&highest) = characters.iter().max() else {
            return Err(Error::data(format!("the tokenizer {} lists no characters", origin.display())));
        };
        let mut ids = vec![ABSENT; highest as usize + 1];
        for (id, &character) in (0u32..).zip(&characters) {
            let slot = &mut ids[character as usize];
            if *slot != ABSENT {
                return Err(Error::data(format!(
                    "the tokenizer {} lists the character {character:?} twice",
                    origin.display()
                ))
                .hint("the file is damaged; every character has one id"));
            }
            *slot = id;
        }
        Ok(Characters { characters, ids })
    }

    /// All characters in the order of their ids.
    pub(super) fn list(&self) -> String {
        self.characters.iter().collect()
    }

    /// The number of characters.
    pub(super) fn len(&self) -> usize {
        self.characters.len()
    }

    /// The id of each character of `text`.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        // Exact for ASCII; elsewhere too much, never too little.
        let mut encoded = Vec::with_capacity(text.len());
        for (offset, character) in text.char_indices() {
            match self.ids.get(character as usize) {
                Some(&id) if id != ABSENT => encoded.push(id),
                _ => return Err(self.foreign(character, offset)),
            }
        }
        Ok(encoded)
    }

    fn foreign(&self, character: char, offset: usize) -> Error {
        Error::data(format!(
            "the character {character:?} (U+{:04X}) at byte {offset} is not among the {} characters of the \
             tokenizer",
            u32::from(character),
            self.len()
        ))
        .hint("a character tokenizer knows its training text only; remove the character, or train with bytes")
    }

    /// The characters of `ids`.
    pub(super) fn decode(&self, ids: &[u32]) -> Result<String> {
        ids.iter().map(|&id| self.character(id)).collect()
    }

    /// The character of `id`.
    pub(super) fn character(&self, id: u32) -> Result<char> {
        self.characters.get(id as usize).copied().ok_or_else(|| unknown_id(id, self.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorted_distinct_and_dense() {
        let tokenizer = Characters::of("hello\n🙂");
        assert_eq!(tokenizer.list(), "\nehlo🙂");
        assert_eq!(tokenizer.encode("hole🙂").unwrap(), [2, 4, 3, 1, 5]);
        assert_eq!(tokenizer.decode(&[2, 4, 3, 1, 5]).unwrap(), "hole🙂");
    }

    #[test]
    fn no_text_no_vocabulary() {
        let tokenizer = Characters::of("");
        assert_eq!(tokenizer.len(), 0);
        assert!(tokenizer.encode("").unwrap().is_empty());
        assert!(tokenizer.encode("a").is_err());
        assert!(tokenizer.decode(&[0]).is_err());
    }

    #[test]
    fn any_listed_order_is_kept() {
        let tokenizer = Characters::from_list("zab", Path::new("t")).unwrap();
        assert_eq!(tokenizer.encode("abz").unwrap(), [1, 2, 0]);
        assert!(Characters::from_list("", Path::new("t")).is_err());
    }
}
