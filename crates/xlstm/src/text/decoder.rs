//! Decoding a stream: text leaves as soon as no later token can change it.

use super::bytes::{self, Assembly};
use super::hugging_face::Window;
use super::{Kind, Tokenizer};
use crate::Result;

/// Turns ids that arrive one by one into text.
///
/// All that [`push`](Self::push) returned and the end from [`finish`](Self::finish),
/// joined, equal [`Tokenizer::decode`] of all ids. Owns its share of the tokenizer, so
/// that a session can keep one.
#[derive(Debug, Clone)]
pub struct Decoder {
    tokenizer: Tokenizer,
    assembly: Assembly,
    window: Window,
    /// Whether a line of words begins.
    line_begins: bool,
}

impl Decoder {
    pub(super) fn new(tokenizer: Tokenizer) -> Self {
        Decoder { tokenizer, assembly: Assembly::default(), window: Window::default(), line_begins: true }
    }

    /// Takes the next id; returns the text that is complete with it, which is nothing
    /// while a character is spread over tokens still to come.
    ///
    /// # Errors
    /// An id outside the vocabulary; the decoder is then as before the call.
    pub fn push(&mut self, id: u32) -> Result<String> {
        match &self.tokenizer.0 {
            Kind::Characters(characters) => characters.character(id).map(String::from),
            Kind::Bytes => bytes::byte(id).map(|byte| self.assembly.push(byte)),
            Kind::Words(words) => {
                let (text, line_begins) = words.text(id, self.line_begins)?;
                self.line_begins = line_begins;
                Ok(text)
            }
            Kind::HuggingFace(tokenizer) => self.window.push(tokenizer, id),
        }
    }

    /// What was held back, now that no more ids come; the decoder is then as new.
    pub fn finish(&mut self) -> String {
        match &self.tokenizer.0 {
            Kind::Characters(_) => String::new(),
            Kind::Words(_) => {
                self.line_begins = true;
                String::new()
            }
            Kind::Bytes => self.assembly.finish(),
            Kind::HuggingFace(tokenizer) => self.window.finish(tokenizer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_leave_at_once() {
        let mut decoder = Tokenizer::characters_of("añb").decoder();
        assert_eq!(decoder.push(2).unwrap(), "ñ");
        assert!(decoder.push(3).is_err());
        assert_eq!(decoder.push(0).unwrap(), "a");
        assert_eq!(decoder.finish(), "");
    }

    #[test]
    fn words_have_spaces_between_them() {
        let tokenizer = Tokenizer::from_json(r#"["a", "b", "<eos>"]"#, std::path::Path::new("v")).unwrap();
        let ids = [0, 1, 2, 2, 1, 0];
        let mut decoder = tokenizer.decoder();
        let text: String = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
        assert_eq!(text, "a b\n\nb a");
        assert_eq!(text + &decoder.finish(), tokenizer.decode(&ids).unwrap());
        assert_eq!(decoder.push(1).unwrap(), "b");
    }

    #[test]
    fn bytes_are_held_back_and_errors_leave_no_trace() {
        let mut decoder = Tokenizer::bytes().decoder();
        assert_eq!(decoder.push(0xC3).unwrap(), "");
        assert!(decoder.push(256).is_err());
        assert_eq!(decoder.push(0xA9).unwrap(), "é");
        assert_eq!(decoder.push(0xC3).unwrap(), "");
        assert_eq!(decoder.finish(), "\u{FFFD}");
        assert_eq!(decoder.push(0x41).unwrap(), "A");
    }
}
