//! Hugging Face tokenizers (`tokenizer.json`), and their incremental decoding.

use std::ops::Range;
use std::path::Path;

use super::unknown_id;
use crate::{Error, Result};

/// Tokens that end a document, the most specific name first.
const END_OF_TEXT: [&str; 3] = ["<|endoftext|>", "</s>", "<eos>"];

/// A tokenizer and the file content that it was made from.
#[derive(Debug)]
pub(super) struct HuggingFace {
    tokenizer: tokenizers::Tokenizer,
    /// Kept to be written beside a model byte for byte: what the library would write
    /// differs between its versions.
    source: String,
    vocabulary_size: usize,
    end_of_text: Option<u32>,
}

impl HuggingFace {
    pub(super) fn from_json(json: &str, origin: &Path) -> Result<Self> {
        let unusable = |e: tokenizers::Error| {
            Error::data(format!("expected a Hugging Face tokenizer at {}, found: {e}", origin.display()))
                .hint("the file may be of a newer format than the tokenizers library 0.23 reads")
        };
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(json).map_err(unusable)?;
        // Files often carry the truncation of their training, which would silently cut
        // a corpus to its first 512 tokens.
        tokenizer.with_truncation(None).map_err(unusable)?;
        tokenizer.with_padding(None);
        // Ids may have holes, so that the count of tokens is not the size.
        let highest = tokenizer.get_vocab(true).into_values().max();
        let vocabulary_size = highest.map_or(0, |id| id as usize + 1);
        let added = tokenizer.get_added_tokens_decoder();
        let end_of_text = END_OF_TEXT
            .iter()
            .find_map(|name| added.iter().find(|(_, token)| token.content == *name).map(|(&id, _)| id));
        Ok(HuggingFace { tokenizer, source: json.to_string(), vocabulary_size, end_of_text })
    }

    pub(super) fn source(&self) -> &str {
        &self.source
    }

    pub(super) fn vocabulary_size(&self) -> usize {
        self.vocabulary_size
    }

    pub(super) fn end_of_text(&self) -> Option<u32> {
        self.end_of_text
    }

    /// Whole texts only: where a text may be cut without changing its tokens depends
    /// on the tokenizer's normalizer and pattern.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|e| cannot_encode(text, &e))?;
        Ok(encoding.get_ids().to_vec())
    }

    pub(super) fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.tokenizer.encode(text, false).map_err(|e| cannot_encode(text, &e))?;
        let ranges = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(ranges).collect())
    }

    pub(super) fn id_of(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    pub(super) fn decode(&self, ids: &[u32]) -> Result<String> {
        for &id in ids {
            // The library leaves out what it does not know.
            self.token(id)?;
        }
        self.decode_known(ids)
    }

    fn decode_known(&self, ids: &[u32]) -> Result<String> {
        if ids.is_empty() {
            // Some decoders of the library panic on an empty list.
            return Ok(String::new());
        }
        self.tokenizer
            .decode(ids, false)
            .map_err(|e| Error::data(format!("the tokenizer cannot decode {} tokens: {e}", ids.len())))
    }

    fn token(&self, id: u32) -> Result<String> {
        self.tokenizer.id_to_token(id).ok_or_else(|| unknown_id(id, self.vocabulary_size))
    }
}

fn cannot_encode(text: &str, error: &tokenizers::Error) -> Error {
    Error::data(format!("the tokenizer cannot encode a text of {} bytes: {error}", text.len()))
        .hint("a vocabulary without an unknown token covers only text made of its own words")
}

/// How many of the last ids a shortened window keeps.
const KEPT: usize = 16;
/// From how many ids on a window is shortened.
const LONGEST: usize = 48;

/// The last ids of a stream, and how much of their text has left.
///
/// A decoder of this library maps a list of tokens to text and has no state to carry
/// on; some treat the first token differently, some join bytes over tokens. So the last
/// ids are decoded anew with each one that arrives, and what is longer than before
/// leaves. The window is bounded, so that a stream costs the same per token however
/// long it is.
#[derive(Debug, Clone, Default)]
pub(super) struct Window {
    ids: Vec<u32>,
    /// Bytes of the window's text that have left.
    emitted: usize,
}

impl Window {
    pub(super) fn push(&mut self, tokenizer: &HuggingFace, id: u32) -> Result<String> {
        let token = tokenizer.token(id)?;
        self.ids.push(id);
        if is_byte(&token) {
            // A run of byte tokens is text or U+FFFD as a whole (`ByteFallback`): the
            // next byte can still change all of it.
            return Ok(String::new());
        }
        let text = match tokenizer.decode_known(&self.ids) {
            Ok(text) => text,
            Err(error) => {
                self.ids.pop();
                return Err(error);
            }
        };
        let settled = settled(&text);
        let Some(fresh) = text.get(self.emitted..settled) else { return Ok(String::new()) };
        let fresh = fresh.to_string();
        self.emitted = settled;
        self.shorten(tokenizer, &text)?;
        Ok(fresh)
    }

    /// Forgets all but the last ids, when the text of these tells the same about what
    /// has left as `text`, that of the whole window.
    fn shorten(&mut self, tokenizer: &HuggingFace, text: &str) -> Result<()> {
        if self.ids.len() < LONGEST {
            return Ok(());
        }
        let kept = &self.ids[self.ids.len() - KEPT..];
        let kept_text = tokenizer.decode_known(kept)?;
        let kept_settled = settled(&kept_text);
        // Without text before it, the next token would pass for the first of the stream.
        let same_end = (kept_settled == kept_text.len()) == (self.emitted == text.len());
        if kept_settled > 0 && same_end {
            self.ids = kept.to_vec();
            self.emitted = kept_settled;
        }
        Ok(())
    }

    pub(super) fn finish(&mut self, tokenizer: &HuggingFace) -> String {
        // Every id was known when it came, so that there is nothing to fail on.
        let text = tokenizer.decode_known(&self.ids).unwrap_or_default();
        let rest = text.get(self.emitted..).unwrap_or_default().to_string();
        *self = Window::default();
        rest
    }
}

/// Whether `token` is of the form `<0x1F>`, which `ByteFallback` reads as a byte.
fn is_byte(token: &str) -> bool {
    token.len() == 6
        && token.starts_with("<0x")
        && token.ends_with('>')
        && token.get(3..5).is_some_and(|digits| u8::from_str_radix(digits, 16).is_ok())
}

/// The length of `text` that later tokens cannot change: a U+FFFD at the end may be a
/// character whose last bytes are still to come.
fn settled(text: &str) -> usize {
    text.strip_suffix(char::REPLACEMENT_CHARACTER).unwrap_or(text).len()
}

#[cfg(test)]
mod tests {
    use super::super::{Kind, Tokenizer};
    use super::*;
    use crate::rng::Rng;
    use serde_json::{Value, json};

    /// The characters that stand for the 256 bytes in byte-level vocabularies (GPT-2's
    /// `bytes_to_unicode`).
    fn byte_characters() -> Vec<String> {
        let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
        let mut others = 256..;
        (0..256)
            .map(|b| if printable(b) { b } else { others.next().unwrap() })
            .map(|c| char::from_u32(c).unwrap().to_string())
            .collect()
    }

    fn file(model: Value, pre_tokenizer: Value, decoder: Value, added: &[(u32, &str)]) -> String {
        let added: Vec<Value> = added
            .iter()
            .map(|(id, content)| {
                json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                       "rstrip": false, "normalized": false, "special": true})
            })
            .collect();
        json!({"version": "1.0",
               "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
               "padding": null, "added_tokens": added, "normalizer": null, "pre_tokenizer": pre_tokenizer,
               "post_processor": null, "decoder": decoder, "model": model})
        .to_string()
    }

    fn vocabulary(tokens: &[String]) -> Value {
        Value::Object((0..).zip(tokens).map(|(id, token)| (token.clone(), Value::from(id))).collect())
    }

    /// A GPT-2 in small: 256 bytes, four merges, and an end of text after a hole.
    fn byte_level() -> String {
        let mut tokens = byte_characters();
        tokens.extend(["he", "Ġt", "Ġthe", "ðŁ"].map(String::from));
        let merges = json!(["h e", "Ġ t", "Ġt he", "ð Ł"]);
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
        let mut vocabulary = vocabulary(&tokens);
        vocabulary["<|endoftext|>"] = Value::from(262);
        let model = json!({"type": "BPE", "vocab": vocabulary, "merges": merges});
        file(model, byte_level.clone(), byte_level, &[(262, "<|endoftext|>")])
    }

    /// A Llama 2 in small: words with `▁`, and bytes for all else.
    fn byte_fallback() -> String {
        let mut tokens: Vec<String> = ["<unk>", "</s>", "▁", "▁a", "a", "b", "▁b"].map(String::from).into();
        tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
        let model = json!({"type": "BPE", "vocab": vocabulary(&tokens), "merges": ["▁ a", "▁ b"],
                           "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true});
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        file(model, Value::Null, decoder, &[(0, "<unk>"), (1, "</s>")])
    }

    fn words(decoder: Value) -> String {
        let tokens =
            ["the", "##ir", ".", "▁a", "▁", "cat</w>", "do", "n't", "|", "\u{FFFD}"].map(String::from);
        let model = json!({"type": "WordLevel", "vocab": vocabulary(&tokens), "unk_token": "[UNK]"});
        file(model, json!({"type": "Whitespace"}), decoder, &[])
    }

    fn load(json: &str) -> Tokenizer {
        Tokenizer::from_json(json, Path::new("tokenizer.json")).unwrap()
    }

    #[test]
    fn encode_decode_and_vocabulary() {
        let tokenizer = load(&byte_level());
        let text = "the thing\n<|endoftext|>é🙂 the";
        let ids = tokenizer.encode(text).unwrap();
        assert!(ids.len() > 5, "the file's truncation is not applied");
        assert!(ids.contains(&258) && ids.contains(&262));
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        assert_eq!(tokenizer.vocabulary_size(), 263);
        assert_eq!(tokenizer.end_of_text(), Some(262));
        assert_eq!(tokenizer.kind(), "hugging-face");
        assert_eq!(tokenizer.to_json().unwrap(), byte_level());
        for unknown in [261, 263] {
            let error = tokenizer.decode(&[104, unknown]).unwrap_err().to_string();
            assert!(error.contains(&format!("token {unknown} is outside")), "{error}");
            assert!(tokenizer.decoder().push(unknown).is_err());
        }
        assert_eq!(load(&byte_fallback()).end_of_text(), Some(1));
        assert_eq!(load(&words(Value::Null)).end_of_text(), None);
        assert!(load(&words(Value::Null)).encode("unheard").is_err());
    }

    #[test]
    fn offsets_are_bytes_of_the_text() {
        let tokenizer = load(&byte_level());
        let text = "é the<|endoftext|>🙂";
        let encoded = tokenizer.encode_with_offsets(text).unwrap();
        assert_eq!(encoded.iter().map(|(id, _)| *id).collect::<Vec<_>>(), tokenizer.encode(text).unwrap());
        let parts: Vec<&str> = encoded.iter().map(|(_, range)| &text[range.clone()]).collect();
        assert_eq!(parts, ["é", "é", " the", "<|endoftext|>", "🙂", "🙂", "🙂"]);
        assert_eq!(
            (tokenizer.id_of("Ġthe"), tokenizer.id_of("x y"), tokenizer.pad()),
            (Some(258), None, None)
        );
    }

    #[test]
    fn the_files_of_gpt_2_say_the_same() {
        let scratch = crate::files::tests::Scratch::new();
        let mut ids = serde_json::from_str::<Value>(&byte_level()).unwrap()["model"]["vocab"].take();
        ids["format"] = Value::from(261);
        std::fs::write(scratch.0.join("vocab.json"), ids.to_string()).unwrap();
        let merges = "#version: 0.2\nh e\nĠ t\nĠt he\nð Ł\n";
        std::fs::write(scratch.0.join("merges.txt"), merges).unwrap();
        let expected = load(&byte_level());
        for path in ["", "vocab.json", "merges.txt"] {
            let tokenizer = Tokenizer::from_file(&scratch.0.join(path)).unwrap();
            let text = "the thing\n<|endoftext|>é🙂 the";
            assert_eq!(tokenizer.encode(text).unwrap(), expected.encode(text).unwrap());
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
            assert_eq!(tokenizer.end_of_text(), Some(262));
        }
        std::fs::write(scratch.0.join("merges.txt"), "h e\nh e e\n").unwrap();
        let error = Tokenizer::from_file(&scratch.0).unwrap_err().to_string();
        assert!(error.contains("merges.txt, line 2"), "{error}");
    }

    #[test]
    fn a_character_over_tokens_is_held_back() {
        let tokenizer = load(&byte_level());
        let mut decoder = tokenizer.decoder();
        let ids = tokenizer.encode("a🙂b").unwrap();
        let out: Vec<String> = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
        assert_eq!(out, ["a", "", "", "🙂", "b"]);
    }

    /// Random lists of `ids` give the same text streamed and whole, from a short window.
    fn streams_exactly(json: &str, ids: &[u32]) {
        let tokenizer = load(json);
        let Kind::HuggingFace(inner) = &tokenizer.0 else { panic!("not a Hugging Face tokenizer") };
        let mut rng = Rng::new(11, 0);
        for length in [0, 1, 2, 3, 5, 17, 47, 48, 49, 50, 100, 300] {
            for _ in 0..20 {
                let drawn: Vec<u32> =
                    (0..length).map(|_| ids[rng.below(ids.len() as u64) as usize]).collect();
                let mut window = Window::default();
                let mut text = String::new();
                for &id in &drawn {
                    text.push_str(&window.push(inner, id).unwrap());
                    let held = window.ids.len();
                    assert!(held <= LONGEST + 16 || is_byte(&inner.token(id).unwrap()), "{held} ids held");
                }
                text.push_str(&window.finish(inner));
                assert_eq!(text, tokenizer.decode(&drawn).unwrap(), "{drawn:?}");
            }
        }
    }

    #[test]
    fn streamed_equals_whole_byte_level() {
        let every: Vec<u32> = (0..260).chain([262]).collect();
        streams_exactly(&byte_level(), &every);
        // The bytes of 🙂, €, é and the letter A, in any order: mostly damaged text.
        let ids = |bytes: &[u8]| -> Vec<u32> { bytes.iter().map(|&b| u32::from(b)).collect() };
        streams_exactly(&byte_level(), &ids("🙂€éA".as_bytes()));
        streams_exactly(&byte_level(), &[0x80, 0x99]);
        streams_exactly(&byte_level(), &[259, 0x99, 0x82]);
    }

    #[test]
    fn streamed_equals_whole_byte_fallback() {
        let byte = |b: u32| 7 + b;
        streams_exactly(&byte_fallback(), &(0..263).collect::<Vec<u32>>());
        streams_exactly(&byte_fallback(), &[2, 2, 3, 4, 5, 6]);
        streams_exactly(&byte_fallback(), &[2, 3, 5, byte(0xC3), byte(0xA9), byte(0x41)]);
    }

    #[test]
    fn streamed_equals_whole_words() {
        let ids: Vec<u32> = (0..10).collect();
        streams_exactly(&words(Value::Null), &ids);
        streams_exactly(&words(json!({"type": "WordPiece", "prefix": "##", "cleanup": true})), &ids);
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"});
        streams_exactly(&words(metaspace), &ids);
        streams_exactly(&words(json!({"type": "BPEDecoder", "suffix": "</w>"})), &ids);
    }
}
