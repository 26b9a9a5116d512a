//! One token a byte, and the assembly of characters from bytes that arrive one by one.

use super::unknown_id;
use crate::Result;

/// One id for each value of a byte.
pub(super) const VOCABULARY_SIZE: usize = 256;

/// The byte of `id`.
pub(super) fn byte(id: u32) -> Result<u8> {
    u8::try_from(id).map_err(|_| unknown_id(id, VOCABULARY_SIZE))
}

/// The text of `ids`, with U+FFFD for what is not UTF-8.
pub(super) fn decode(ids: &[u32]) -> Result<String> {
    let bytes = ids.iter().map(|&id| byte(id)).collect::<Result<Vec<u8>>>()?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Assembles UTF-8 from single bytes, holding back an unfinished character (three bytes
/// at most). What comes out, joined, is `String::from_utf8_lossy` of what went in.
#[derive(Debug, Clone, Default)]
pub(super) struct Assembly {
    pending: Vec<u8>,
}

impl Assembly {
    /// Takes the next byte; returns the text that is complete with it.
    pub(super) fn push(&mut self, byte: u8) -> String {
        self.pending.push(byte);
        let mut complete = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(text) => {
                    complete.push_str(text);
                    self.pending.clear();
                    return complete;
                }
                Err(error) => {
                    let Some(invalid) = error.error_len() else { return complete };
                    // Nothing valid stands before: it would have left at an earlier push.
                    complete.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..error.valid_up_to() + invalid);
                }
            }
        }
    }

    /// The text of an unfinished character at the end: U+FFFD or nothing.
    pub(super) fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn a_character_leaves_with_its_last_byte() {
        let mut assembly = Assembly::default();
        let out: Vec<String> = "a🙂é".bytes().map(|b| assembly.push(b)).collect();
        assert_eq!(out, ["a", "", "", "", "🙂", "", "é"]);
        assert_eq!(assembly.finish(), "");
    }

    #[test]
    fn joined_it_is_the_lossy_text() {
        // Bytes that are often parts of characters, in every kind of wrong order.
        let parts =
            [0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xED, 0xA0, 0xF0, 0x9F, 0x99, 0xF4, 0xFF];
        let mut rng = Rng::new(1, 0);
        for _ in 0..2_000 {
            let length = rng.below(12);
            let bytes: Vec<u8> = (0..length).map(|_| parts[rng.below(parts.len() as u64) as usize]).collect();
            let mut assembly = Assembly::default();
            let mut text: String = bytes.iter().map(|&b| assembly.push(b)).collect();
            text.push_str(&assembly.finish());
            assert_eq!(text, String::from_utf8_lossy(&bytes), "{bytes:x?}");
        }
    }
}
