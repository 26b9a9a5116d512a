//! A fixed walk over a corpus for evaluation: no shuffle, every target exactly once.
//!
//! Two ways to measure. [`sequential`] reads the corpus as one stream and carries the
//! state on, so that a recurrent model sees each document from its beginning however
//! long it is: what a perplexity should be. [`validation_batches`] cuts windows that each
//! start from nothing, many at a time: what training on windows sees, cheaper and with
//! the slightly worse loss of short contexts.

use std::sync::Arc;

use super::batch::{Batch, check_shape};
use super::corpus::Corpus;
use super::unscored::Unscored;
use crate::{Error, Result};

/// Batches that together hold each target of a corpus once, the last one padded.
#[derive(Debug, Clone)]
pub struct Evaluation {
    corpus: Arc<Corpus>,
    batch_size: usize,
    length: usize,
    /// Tokens from the beginning of a window to that of the next.
    stride: usize,
    carries_state: bool,
    unscored: Unscored,
}

/// One row that walks through `corpus` in chunks of `length`; the state is carried from
/// chunk to chunk.
///
/// # Errors
/// A length of zero; a corpus without a target (fewer than two tokens in every document).
pub fn sequential(corpus: Arc<Corpus>, length: usize) -> Result<Evaluation> {
    Evaluation::new(corpus, 1, length, length, true)
}

/// Windows of `length` that do not overlap, in order, `batch_size` at a time, each from a
/// cleared state.
///
/// # Errors
/// A batch size or length of zero; a corpus without a target.
pub fn validation_batches(corpus: Arc<Corpus>, batch_size: usize, length: usize) -> Result<Evaluation> {
    Evaluation::new(corpus, batch_size, length, length, false)
}

/// Windows of `length` of which each begins `stride` after the one before, `batch_size` at a time,
/// each from a cleared state. Every target is scored once, in the first window that holds it, so
/// that all but those of the first window have at least `length - stride` tokens before them.
///
/// # Errors
/// A batch size, length or stride of zero; a stride above the length; a corpus without a target.
pub fn strided_batches(
    corpus: Arc<Corpus>,
    batch_size: usize,
    length: usize,
    stride: usize,
) -> Result<Evaluation> {
    if stride == 0 || stride > length {
        return Err(Error::config(format!("the stride is {stride}, the length of a window {length}"))
            .hint("the stride is at least 1 and at most the length of a window"));
    }
    Evaluation::new(corpus, batch_size, length, stride, false)
}

impl Evaluation {
    fn new(
        corpus: Arc<Corpus>,
        batch_size: usize,
        length: usize,
        stride: usize,
        carries_state: bool,
    ) -> Result<Self> {
        check_shape(batch_size, length)?;
        if corpus.target_count() == 0 {
            return Err(Error::data(format!(
                "expected a corpus with something to predict, found {} documents of one token each",
                corpus.document_count()
            ))
            .hint("evaluate on more text"));
        }
        let unscored = Unscored::default();
        Ok(Evaluation { corpus, batch_size, length, stride, carries_state, unscored })
    }

    /// The same walk, with these tokens read and not predicted.
    #[must_use]
    pub fn without(self, unscored: Unscored) -> Evaluation {
        Evaluation { unscored, ..self }
    }

    /// The number of batches.
    pub fn batch_count(&self) -> u64 {
        // The first window scores all of its length, each later one a stride more.
        let windows = 1 + self.inputs().saturating_sub(self.length).div_ceil(self.stride);
        windows.div_ceil(self.batch_size) as u64
    }

    /// The number of targets in all batches together.
    pub fn target_count(&self) -> usize {
        self.corpus.target_count() - self.unscored.target_count(&self.corpus)
    }

    /// Whether the state is carried from each batch to the next ([`sequential`]); if
    /// not, every row begins with a reset.
    pub fn carries_state(&self) -> bool {
        self.carries_state
    }

    /// The corpus that is walked through.
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    /// All tokens but the last, after which nothing comes.
    fn inputs(&self) -> usize {
        self.corpus.len() - 1
    }

    /// The inputs whose targets are scored by the end of `window`.
    fn scored(&self, window: usize) -> usize {
        window.saturating_mul(self.stride).saturating_add(self.length).min(self.inputs())
    }

    /// Fills `batch` with batch `index`, whatever it held before. Beyond the last batch
    /// there is only padding.
    pub fn fill(&self, index: u64, batch: &mut Batch) {
        batch.clear(self.batch_size, self.length);
        let inputs = self.inputs();
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        for row in 0..self.batch_size {
            let window = index.saturating_mul(self.batch_size).saturating_add(row);
            let scored = if window == 0 { 0 } else { self.scored(window - 1) };
            let start = window.saturating_mul(self.stride).min(inputs);
            let end = if scored < inputs { self.scored(window) } else { start };
            if start < end {
                batch.push_tokens(&self.corpus, start, end, !self.carries_state);
                batch.ignore(end - start, 0..scored.saturating_sub(start));
                for &place in self.unscored.within(start + 1, end + 1) {
                    batch.ignore(end - start, place - 1 - start..place - start);
                }
            }
            batch.push_padding(self.length - (end - start));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{IGNORE, PAD, RESET};
    use super::*;

    fn corpus(tokens: usize, documents: &[usize]) -> Arc<Corpus> {
        let ids: Vec<u32> = (0..tokens as u32).collect();
        Arc::new(Corpus::from_tokens(&ids, documents, tokens as u64, 1).unwrap())
    }

    #[test]
    fn every_target_once() {
        for (tokens, batch_size, length) in [(100, 1, 16), (97, 3, 8), (97, 1, 8), (3, 1, 200), (3, 5, 200)] {
            let corpus = corpus(tokens, &[0, 1]);
            let walks = [
                validation_batches(corpus.clone(), batch_size, length).unwrap(),
                sequential(corpus.clone(), length).unwrap(),
            ];
            for walk in walks {
                let mut seen = vec![0; tokens];
                let mut count = 0;
                let mut batch = Batch::default();
                let mut next = 0;
                for index in 0..walk.batch_count() {
                    walk.fill(index, &mut batch);
                    count += batch.target_count;
                    assert!(batch.target_count > 0, "no batch is all padding");
                    assert_eq!(batch.inputs.len(), batch.batch_size * length);
                    for (place, &input) in batch.inputs.iter().enumerate() {
                        let (target, mark) = (batch.targets[place], batch.marks[place]);
                        if mark & PAD != 0 {
                            assert_eq!((input, target, mark), (0, IGNORE, PAD));
                            continue;
                        }
                        // In order, without a gap, padding only at the end.
                        assert_eq!(input, next);
                        next += 1;
                        let first = !walk.carries_state() && place % length == 0;
                        assert_eq!(mark == RESET, first || input < 2);
                        if target != IGNORE {
                            assert_eq!(target, input + 1);
                            seen[target as usize] += 1;
                        }
                    }
                }
                assert_eq!(next as usize, tokens - 1);
                assert_eq!(count, walk.target_count());
                assert_eq!(seen[..2], [0, 0]);
                assert!(seen[2..].iter().all(|&times| times == 1));
                walk.fill(walk.batch_count(), &mut batch);
                assert!(batch.target_count == 0 && batch.marks.iter().all(|&mark| mark == PAD));
                walk.fill(u64::MAX, &mut batch);
                assert_eq!(batch.target_count, 0);
            }
        }
    }

    #[test]
    fn strided_windows_score_every_target_once_with_context() {
        for (tokens, batch_size, length, stride) in
            [(100, 3, 16, 4), (100, 1, 16, 16), (21, 2, 8, 3), (5, 2, 8, 1)]
        {
            let corpus = corpus(tokens, &[0]);
            let walk = strided_batches(corpus, batch_size, length, stride).unwrap();
            let (mut seen, mut batch) = (vec![0; tokens], Batch::default());
            for index in 0..walk.batch_count() {
                walk.fill(index, &mut batch);
                let scored = batch.targets.iter().filter(|target| **target != IGNORE).count();
                assert_eq!(batch.target_count, scored);
                assert!(scored > 0, "no batch is all padding");
                for (place, &target) in
                    batch.targets.iter().enumerate().filter(|(_, target)| **target != IGNORE)
                {
                    seen[target as usize] += 1;
                    let context = place % length + 1;
                    assert!(context > length - stride || context == target as usize, "{target}");
                }
            }
            assert_eq!(seen.iter().sum::<i32>() as usize, walk.target_count());
            assert!(seen[1..].iter().all(|&times| times == 1), "{seen:?}");
        }
        assert!(strided_batches(corpus(9, &[0]), 1, 4, 5).is_err());
    }

    /// Each target but the unscored ones is predicted once, whatever the walk; those are read all the same.
    #[test]
    fn what_is_not_scored_is_read() {
        let tokenizer = crate::text::Tokenizer::bytes();
        let texts = ["one <unk> two <unk>", "<unk> three"];
        let corpus = Arc::new(Corpus::from_texts(&texts, &tokenizer).unwrap());
        let unscored = Unscored::find(&corpus, &tokenizer, "<unk>").unwrap();
        for walk in [
            sequential(corpus.clone(), 4).unwrap(),
            validation_batches(corpus.clone(), 2, 7).unwrap(),
            strided_batches(corpus.clone(), 2, 8, 3).unwrap(),
        ] {
            let walk = walk.without(unscored.clone());
            let (mut predicted, mut count, mut batch) = (Vec::new(), 0, Batch::default());
            for index in 0..walk.batch_count() {
                walk.fill(index, &mut batch);
                count += batch.target_count;
                predicted.extend(batch.targets.iter().filter(|&&t| t != IGNORE).map(|&t| t as u8));
            }
            // The first token of a document is never predicted.
            assert_eq!(String::from_utf8(predicted).unwrap(), "ne two three");
            assert_eq!((count, walk.target_count()), (12, 12));
        }
    }

    #[test]
    fn nothing_to_evaluate() {
        assert!(sequential(corpus(1, &[0]), 8).unwrap_err().to_string().contains("1 documents"));
        assert!(sequential(corpus(2, &[0, 1]), 8).is_err());
        assert!(sequential(corpus(9, &[0]), 0).is_err());
        assert!(validation_batches(corpus(9, &[0]), 0, 8).is_err());
    }
}
