//! A batch: token ids in, token ids to predict, and marks for the state; or features in and
//! classes or numbers to predict, as integers all the same.
//!
//! All arrays are row-major, (batch, length). A row is cut from the corpus; it does not
//! matter to the model where, since the marks tell what to do with the state.

use std::ops::Range;

use super::corpus::Corpus;
use crate::marks::{IGNORE, PAD, RESET};
use crate::{Error, Result};

/// Inputs, targets and marks of shape (batch_size, length).
///
/// Of features, `inputs` are the bits of (batch_size, length, features) numbers, and there are as
/// many targets as the model has: see [`Batch::of_sequences`].
///
/// Made empty by `Batch::default()` and filled by [`Batches::fill`](super::Batches::fill)
/// or [`Evaluation::fill`](super::Evaluation::fill), which keep the allocations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// The number of rows.
    pub batch_size: usize,
    /// The number of places in a row.
    pub length: usize,
    /// Token ids, or the bits of features; 0 where the mark is [`PAD`].
    pub inputs: Vec<u32>,
    /// The token after each input, a class, or the bits of a number; or [`IGNORE`].
    pub targets: Vec<u32>,
    /// A bit set of [`RESET`] and [`PAD`] for each input.
    pub marks: Vec<u32>,
    /// How many targets are not [`IGNORE`]: what a mean of losses is divided by.
    pub target_count: usize,
}

impl Batch {
    /// Empties the batch and gives it its shape; rows are then pushed in order.
    pub(super) fn clear(&mut self, batch_size: usize, length: usize) {
        let size = batch_size * length;
        (self.batch_size, self.length, self.target_count) = (batch_size, length, 0);
        for array in [&mut self.inputs, &mut self.targets, &mut self.marks] {
            array.clear();
            array.reserve(size);
        }
    }

    /// Appends the tokens of `corpus` from `start` to before `end`, which must not be
    /// its very last token, as nothing comes after that. With `reset` the first of them
    /// starts from a cleared state even within a document.
    pub(super) fn push_tokens(&mut self, corpus: &Corpus, start: usize, end: usize, reset: bool) {
        let place = self.inputs.len();
        let count = end - start;
        corpus.tokens(start..end, &mut self.inputs);
        corpus.tokens(start + 1..end + 1, &mut self.targets);
        self.marks.resize(place + count, 0);
        self.target_count += count;
        for document in corpus.starts_within(start..=end) {
            if document < end {
                self.marks[place + document - start] |= RESET;
            }
            if document > start {
                // The first token of a document does not follow from the one before it.
                self.targets[place + document - start - 1] = IGNORE;
                self.target_count -= 1;
            }
        }
        if reset && count > 0 {
            self.marks[place] |= RESET;
        }
    }

    /// Forgets the targets of these of the last `length` places.
    pub(super) fn ignore(&mut self, length: usize, places: Range<usize>) {
        let start = self.targets.len() - length;
        for target in &mut self.targets[start..][places] {
            self.target_count -= usize::from(*target != IGNORE);
            *target = IGNORE;
        }
    }

    /// Appends `count` places that hold no token.
    pub(super) fn push_padding(&mut self, count: usize) {
        let size = self.inputs.len() + count;
        self.inputs.resize(size, 0);
        self.targets.resize(size, IGNORE);
        self.marks.resize(size, PAD);
    }
}

/// Refuses a batch without rows or places.
pub(super) fn check_shape(batch_size: usize, length: usize) -> Result<()> {
    if batch_size == 0 || length == 0 {
        return Err(Error::config(format!(
            "expected a batch size and a length of at least 1, found batch size {batch_size} and length {length}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_meet_inside_a_row() {
        // Three documents: 10 11 12 | 20 | 30 31.
        let corpus = Corpus::from_tokens(&[10, 11, 12, 20, 30, 31], &[0, 3, 4], 6, 3).unwrap();
        let mut batch = Batch::default();
        batch.clear(1, 7);
        batch.push_tokens(&corpus, 1, 5, true);
        batch.push_padding(1);
        batch.push_tokens(&corpus, 1, 3, false);
        assert_eq!(batch.inputs, [11, 12, 20, 30, 0, 11, 12]);
        assert_eq!(batch.targets, [12, IGNORE, IGNORE, 31, IGNORE, 12, IGNORE]);
        assert_eq!(batch.marks, [RESET, 0, RESET, RESET, PAD, 0, 0]);
        assert_eq!(batch.target_count, 3);
    }

    #[test]
    fn clearing_keeps_the_allocation() {
        let mut batch = Batch::default();
        batch.clear(4, 8);
        batch.push_padding(32);
        let pointer = batch.inputs.as_ptr();
        batch.clear(4, 8);
        batch.push_padding(32);
        assert_eq!(batch.inputs.as_ptr(), pointer);
    }
}
