//! Passes over text from which a tokenizer is made.

use super::documents::{Documents, TextOptions};
use super::source::Source;
use super::tokenize::Progress;
use crate::Result;
use crate::text::Tokenizer;

/// All characters that occur in `sources`, by code point.
///
/// # Errors
/// Those of reading the sources.
pub fn distinct_characters(sources: &[Source], options: &TextOptions) -> Result<String> {
    // A flag for every code point: looking up each character of a corpus has to be cheap.
    let mut seen = vec![false; char::MAX as usize + 1];
    let mut documents = Documents::new(sources.to_vec(), options.clone(), None);
    while let Some(block) = documents.next_block()? {
        for character in block.pieces.iter().flat_map(|piece| piece.text.chars()) {
            seen[character as usize] = true;
        }
    }
    let code_points = (0..).zip(seen).filter(|(_, seen)| *seen).map(|(code_point, _)| code_point);
    Ok(code_points.filter_map(char::from_u32).collect())
}

/// A byte-level BPE of `size` tokens, trained on all text of `sources`.
///
/// # Errors
/// Those of reading the sources and of [`Tokenizer::train_bpe`].
pub fn train_bpe(
    sources: &[Source],
    options: &TextOptions,
    size: usize,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Tokenizer> {
    let mut documents = Documents::new(sources.to_vec(), options.clone(), None);
    let mut done = Progress { bytes: sources.iter().map(|source| source.bytes).sum(), ..Progress::default() };
    // The library takes texts, not errors: the first one ends the texts and is looked at after.
    let mut failure = None;
    let blocks = std::iter::from_fn(|| match documents.next_block() {
        Ok(block) => block.map(|block| {
            done.bytes_done = block.bytes_done;
            progress(done);
            block.pieces.into_iter().map(|piece| piece.text)
        }),
        Err(error) => {
            failure = Some(error);
            None
        }
    });
    let tokenizer = Tokenizer::train_bpe(blocks.flatten(), size);
    match failure {
        Some(error) => Err(error),
        None => tokenizer,
    }
}
