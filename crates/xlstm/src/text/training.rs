//! A byte-level BPE vocabulary trained on a corpus, in GPT-2's form.

use std::path::Path;

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, TokenizerBuilder};

use super::Tokenizer;
use crate::{Error, Result};

/// The token that ends a document; its id is 0.
const END_OF_TEXT: &str = "<|endoftext|>";

impl Tokenizer {
    /// Trains a byte-level BPE of `size` tokens on `texts`: the 256 bytes, `<|endoftext|>`, and
    /// the merges of the pairs that occur most often, at least twice. Fewer tokens where the
    /// texts have no more such pairs. Memory grows with the number of different words.
    ///
    /// # Errors
    /// A size below 257; a failure of the tokenizers library.
    pub fn train_bpe(texts: impl Iterator<Item = String> + Send, size: usize) -> Result<Self> {
        if size < 257 {
            return Err(Error::config(format!("a byte-level vocabulary of {size} tokens"))
                .hint("the 256 bytes and the end of text alone are 257 tokens"));
        }
        let failed = |e: tokenizers::Error| Error::data(format!("cannot train the tokenizer: {e}"));
        let mut trainer = BpeTrainerBuilder::new()
            .vocab_size(size)
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let byte_level = ByteLevel::new(false, true, true);
        let builder =
            TokenizerBuilder::<BPE, NormalizerWrapper, ByteLevel, PostProcessorWrapper, ByteLevel>::new();
        let builder = builder.with_model(BPE::default()).with_normalizer(None);
        let builder = builder.with_pre_tokenizer(Some(byte_level)).with_post_processor(None);
        let mut tokenizer = builder.with_decoder(Some(byte_level)).build().map_err(failed)?;
        tokenizer.train(&mut trainer, texts).map_err(failed)?;
        Tokenizer::from_json(&tokenizer.to_string(false).map_err(failed)?, Path::new("the trained tokenizer"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_learns_what_is_frequent_and_covers_the_rest() {
        let texts = ["the cat and the hat", "the cat sat; the hat sat"];
        let train = |size| Tokenizer::train_bpe(texts.iter().map(|text| (*text).to_owned()), size).unwrap();
        let tokenizer = train(262);
        assert_eq!((tokenizer.vocabulary_size(), tokenizer.end_of_text()), (262, Some(0)));
        assert!(tokenizer.encode("the the the").unwrap().len() < 10);
        for text in ["the cat", "Größe 🙂\r\n\t x", "a<|endoftext|>b", ""] {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
        }
        assert_eq!(tokenizer.fingerprint(), train(262).fingerprint(), "training is deterministic");
        assert!(train(4000).vocabulary_size() < 300);
        assert!(Tokenizer::train_bpe(std::iter::empty(), 256).is_err());
    }
}
