//! Text that is read but not scored, such as the `<unk>` that WikiText has in place of rare words: what
//! a model makes of it says nothing of its language.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::corpus::Corpus;
use crate::text::Tokenizer;
use crate::{Error, Result};

/// Where a text stands in a corpus.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unscored {
    /// The places of the tokens that are nothing but the text, or the text and a space before it, ascending.
    places: Vec<usize>,
    /// How often the text occurs.
    pub occurrences: u64,
    /// Bytes of the text.
    pub bytes: u64,
}

impl Unscored {
    /// Finds `text` in the documents of `corpus`, which were tokenised by `tokenizer`. A token that also
    /// holds what follows the text, or what comes before it, is scored.
    ///
    /// # Errors
    /// An empty text, or one with other characters than those of ASCII; tokens that the tokenizer does not know.
    pub fn find(corpus: &Corpus, tokenizer: &Tokenizer, text: &str) -> Result<Unscored> {
        if text.is_empty() || !text.is_ascii() {
            return Err(Error::config(format!("the text not to be scored is {text:?}"))
                .hint("it is one or more characters of ASCII, such as <unk>"));
        }
        // Where characters of several bytes are cut by tokens, decoding them one by one puts other
        // characters in their place; those of ASCII stay what they are.
        let mut known: HashMap<u32, String> = HashMap::new();
        let mut unscored = Unscored { bytes: text.len() as u64, ..Unscored::default() };
        let starts: Vec<usize> = corpus.starts_within(0..=corpus.len() - 1).collect();
        let ends = starts[1..].iter().copied().chain([corpus.len()]);
        for (&start, end) in starts.iter().zip(ends) {
            let (mut ids, mut document, mut cuts) = (Vec::new(), String::new(), vec![0]);
            corpus.tokens(start..end, &mut ids);
            for id in ids {
                document += match known.entry(id) {
                    Entry::Occupied(entry) => entry.into_mut(),
                    Entry::Vacant(entry) => entry.insert(tokenizer.decode(&[id])?),
                };
                cuts.push(document.len());
            }
            for (found, _) in document.match_indices(text) {
                let spaced = document[..found].ends_with(' ');
                let (from, to) = (found - usize::from(spaced), found + text.len());
                let first = cuts.partition_point(|&cut| cut < from);
                let after = cuts.partition_point(|&cut| cut <= to);
                // A token lies between two cuts.
                unscored.places.extend((first + 1..after).map(|cut| start + cut - 1));
                unscored.occurrences += 1;
            }
        }
        Ok(unscored)
    }

    /// The places from `start` to before `end`.
    pub(super) fn within(&self, start: usize, end: usize) -> &[usize] {
        let [first, after] = [start, end].map(|place| self.places.partition_point(|&p| p < place));
        &self.places[first..after.max(first)]
    }

    /// How many of the tokens would be predicted otherwise: all but those that begin a document.
    pub(super) fn target_count(&self, corpus: &Corpus) -> usize {
        let begins = |place: usize| corpus.starts_within(place..=place).next().is_some();
        self.places.iter().filter(|&&place| !begins(place)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Tokenizer;

    #[test]
    fn occurrences_are_found_in_whole_tokens() {
        // A byte a token; the second text begins with it, and has another with no space before it.
        let texts = ["an <unk> of é", "<unk>s-<unk>"];
        let tokenizer = Tokenizer::bytes();
        let corpus = Corpus::from_texts(&texts, &tokenizer).unwrap();
        let unscored = Unscored::find(&corpus, &tokenizer, "<unk>").unwrap();
        let places: Vec<usize> = (2..8).chain(14..19).chain(21..26).collect();
        assert_eq!((&unscored.places, unscored.occurrences, unscored.bytes), (&places, 3, 5));
        assert_eq!(unscored.within(7, 15), [7, 14]);
        assert_eq!(unscored.target_count(&corpus), places.len() - 1);
        assert_eq!(Unscored::find(&corpus, &tokenizer, "<unk>>").unwrap().occurrences, 0);
        for text in ["", "é"] {
            assert!(Unscored::find(&corpus, &tokenizer, text).unwrap_err().hint_text().is_some());
        }
    }

    /// Tokens of several characters: one that holds more than the text is scored.
    #[test]
    fn what_holds_more_is_scored() {
        let path = std::env::temp_dir().join(format!("xlstm-unscored-{}.txt", std::process::id()));
        std::fs::write(&path, "<unk>\n,\nword\n<pad>\n").unwrap();
        let tokenizer = Tokenizer::from_file(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let corpus = Corpus::from_texts(&["word , other , word"], &tokenizer).unwrap();
        let unscored = Unscored::find(&corpus, &tokenizer, "ord").unwrap();
        assert_eq!((unscored.places.len(), unscored.occurrences), (0, 2));
        assert_eq!(Unscored::find(&corpus, &tokenizer, "word").unwrap().places, [0, 4]);
    }
}
