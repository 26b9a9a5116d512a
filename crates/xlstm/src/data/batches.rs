//! Training batches: shuffled windows, packed documents, or parallel streams.
//!
//! All are random access: batch `index` is computed from (seed, index) alone. Epochs
//! need not end with a batch. A batch in which an epoch ends takes its remaining rows or
//! places from the next one, so that nothing is dropped and a corpus smaller than a
//! batch works.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::batch::{Batch, check_shape};
use super::corpus::Corpus;
use crate::rng::{Permutation, Rng};
use crate::{Error, Result};

/// The random stream of window offsets.
const OFFSET_STREAM: u64 = 0x57_494E_444F_5753;

/// How a corpus is cut into training batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Batching {
    /// Windows of the batch's length that do not overlap, shuffled anew in each epoch,
    /// each from a cleared state. Where the first window begins is random in each epoch,
    /// so that epochs see different cuts.
    Windows,
    /// Documents in an order that is shuffled anew in each epoch, one after another, packed into
    /// rows: each begins from a cleared state, and so does what a row's end cuts off a document.
    /// Keeps documents whole as far as they fit, and needs 16 bytes of memory a document.
    Documents,
    /// Each row walks through its own part of the corpus, and batch `index` goes on
    /// where batch `index` - 1 ended: the trainer carries the state on and cuts only
    /// the gradient (truncated back-propagation through time). Not shuffled.
    Stream,
}

/// The training batches of a corpus.
#[derive(Debug, Clone)]
pub struct Batches {
    corpus: Arc<Corpus>,
    batching: Batching,
    batch_size: usize,
    length: usize,
    seed: u64,
    /// Windows in an epoch, or tokens in the part of a row.
    period: usize,
    /// How many places for the first window an epoch chooses from.
    offsets: usize,
    /// Tokens that batches of another shape gave before batch 0.
    before: u64,
    packing: Option<Arc<Packing>>,
}

impl Batches {
    /// Batches of `batch_size` rows of `length` tokens from `corpus`.
    ///
    /// # Errors
    /// A batch size or length of zero; a corpus of fewer tokens than one window with
    /// its last target (`Windows`: length + 1), or than one batch (`Stream`:
    /// batch_size * length + 1).
    pub fn new(
        corpus: Arc<Corpus>,
        batching: Batching,
        batch_size: usize,
        length: usize,
        seed: u64,
    ) -> Result<Self> {
        check_shape(batch_size, length)?;
        let tokens = corpus.len();
        let (needed, hint) = match batching {
            Batching::Windows | Batching::Documents => {
                (length.saturating_add(1), "use a smaller length, or more text")
            }
            Batching::Stream => (
                batch_size.saturating_mul(length).saturating_add(1),
                "use a smaller length or batch size, or more text",
            ),
        };
        if tokens < needed {
            let shape = match batching {
                Batching::Windows | Batching::Documents => format!("a window of length {length}"),
                Batching::Stream => format!("{batch_size} streams of length {length}"),
            };
            return Err(Error::data(format!(
                "expected a corpus of at least {needed} tokens for {shape}, found {tokens} tokens"
            ))
            .hint(hint));
        }
        let (period, offsets) = match batching {
            Batching::Windows => {
                // As many windows as fit whatever the offset, so that all epochs are
                // alike; a corpus of less than two windows has one.
                let windows = ((tokens - length) / length).max(1);
                (windows, length.min(tokens - windows * length))
            }
            // The last token of a document, and so of the corpus, is only a target.
            Batching::Documents => (corpus.target_count(), 1),
            Batching::Stream => ((tokens - 1) / batch_size, 1),
        };
        if period == 0 {
            return Err(Error::data(
                "expected a corpus with something to predict, found documents of one token each",
            )
            .hint("use more text"));
        }
        let packing = (batching == Batching::Documents).then(|| Arc::new(Packing::new(&corpus)));
        Ok(Batches { corpus, batching, batch_size, length, seed, period, offsets, before: 0, packing })
    }

    /// The same, going on where batches of other shapes ended that gave this many tokens.
    pub(super) fn after(mut self, tokens: u64) -> Self {
        self.before = tokens;
        self
    }

    /// Fills `batch` with batch `index`, whatever it held before; allocates only what
    /// it lacks.
    pub fn fill(&self, index: u64, batch: &mut Batch) {
        batch.clear(self.batch_size, self.length);
        for row in 0..self.batch_size {
            match self.batching {
                Batching::Windows => self.push_window(index, row, batch),
                Batching::Documents => self.push_documents(index, row, batch),
                Batching::Stream => self.push_stream(index, row, batch),
            }
        }
    }

    fn push_window(&self, index: u64, row: usize, batch: &mut Batch) {
        let number = self.before / self.length as u64 + index * self.batch_size as u64 + row as u64;
        let windows = self.period as u64;
        let (epoch, place) = (number / windows, number % windows);
        let window = Permutation::new(self.seed, epoch, windows).at(place) as usize;
        let start = self.offset(epoch) + window * self.length;
        batch.push_tokens(&self.corpus, start, start + self.length, true);
    }

    fn push_documents(&self, index: u64, row: usize, batch: &mut Batch) {
        let Some(packing) = &self.packing else { return };
        let row = index * self.batch_size as u64 + row as u64;
        let mut place = self.before + row * self.length as u64;
        let mut missing = self.length;
        while missing > 0 {
            let (epoch, within) = (place / self.period as u64, (place % self.period as u64) as usize);
            let order = packing.order(self.seed, epoch);
            let slot = order.ends.partition_point(|&end| end <= within);
            let document = order.permutation.at(slot as u64) as usize;
            let (start, end) = packing.document(document);
            // From here to the last token of the document, which is only a target.
            let start = end - 1 - (order.ends[slot] - within).min(end - 1 - start);
            let count = missing.min(end - 1 - start);
            batch.push_tokens(&self.corpus, start, start + count, missing == self.length);
            (missing, place) = (missing - count, place + count as u64);
        }
    }

    /// Where the first window of `epoch` begins. One number of a stream and not a draw
    /// without bias, which could need a second one; the bias is below 2^-32.
    fn offset(&self, epoch: u64) -> usize {
        let random = Rng::new(self.seed, OFFSET_STREAM).at(epoch);
        ((u128::from(random) * self.offsets as u128) >> 64) as usize
    }

    fn push_stream(&self, index: u64, row: usize, batch: &mut Batch) {
        let part = row * self.period;
        let walked = self.before / self.batch_size as u64 + index * self.length as u64;
        let mut place = (walked % self.period as u64) as usize;
        let mut missing = self.length;
        while missing > 0 {
            let count = missing.min(self.period - place);
            batch.push_tokens(&self.corpus, part + place, part + place + count, place == 0);
            missing -= count;
            place = 0;
        }
    }

    /// The number of batches after which all of an epoch has been seen, rounded up.
    pub fn batches_per_epoch(&self) -> u64 {
        self.units().0.div_ceil(self.units().1)
    }

    /// The number of batches that `epochs` are, with its fraction.
    pub(super) fn batches_in(&self, epochs: f64) -> f64 {
        epochs * self.units().0 as f64 / self.units().1 as f64
    }

    /// The epoch, from 0, in which batch `index` begins.
    pub fn epoch_of(&self, index: u64) -> u64 {
        index * self.units().1 / self.units().0
    }

    /// What an epoch and what a batch hold, in windows or in tokens of a row.
    fn units(&self) -> (u64, u64) {
        match self.batching {
            Batching::Windows => (self.period as u64, self.batch_size as u64),
            Batching::Documents => (self.period as u64, (self.batch_size * self.length) as u64),
            Batching::Stream => (self.period as u64, self.length as u64),
        }
    }

    /// How the corpus is cut; with [`Batching::Stream`] the state is to be carried on.
    pub fn batching(&self) -> Batching {
        self.batching
    }

    /// The number of rows of a batch.
    pub fn batch_size(&self) -> usize {
        self.batch_size
    }

    /// The number of tokens in a row.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The corpus that the batches are cut from.
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }
}

/// Documents in shuffled orders.
#[derive(Debug)]
struct Packing {
    /// Where each document begins, and the end of the last.
    starts: Vec<usize>,
    /// The order of the epoch that was asked for last.
    current: Mutex<Option<(u64, u64, Arc<Order>)>>,
}

/// An epoch's order.
#[derive(Debug)]
struct Order {
    permutation: Permutation,
    /// Inputs of all documents up to each in this order, it included.
    ends: Vec<usize>,
}

impl Packing {
    fn new(corpus: &Corpus) -> Packing {
        let mut starts: Vec<usize> = corpus.starts_within(0..=corpus.len() - 1).collect();
        starts.push(corpus.len());
        Packing { starts, current: Mutex::new(None) }
    }

    fn document(&self, index: usize) -> (usize, usize) {
        (self.starts[index], self.starts[index + 1])
    }

    /// The order of `epoch`, kept until another is asked for.
    fn order(&self, seed: u64, epoch: u64) -> Arc<Order> {
        // Whoever died with the lock left an order or none.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        match &*current {
            Some((for_seed, for_epoch, order)) if (*for_seed, *for_epoch) == (seed, epoch) => order.clone(),
            _ => {
                let documents = self.starts.len() - 1;
                let permutation = Permutation::new(seed, epoch, documents as u64);
                let ends = (0..documents as u64).scan(0, |end, slot| {
                    let (start, stop) = self.document(permutation.at(slot) as usize);
                    *end += stop - 1 - start;
                    Some(*end)
                });
                let order = Arc::new(Order { ends: ends.collect(), permutation });
                *current = Some((seed, epoch, order.clone()));
                order
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{IGNORE, PAD, RESET};
    use super::*;

    /// Token i has the value i, so that a value tells its place.
    fn corpus(tokens: usize, documents: &[usize]) -> Arc<Corpus> {
        let ids: Vec<u32> = (0..tokens as u32).collect();
        Arc::new(Corpus::from_tokens(&ids, documents, tokens as u64, 1).unwrap())
    }

    fn batch(batches: &Batches, index: u64) -> Batch {
        let mut batch = Batch::default();
        batches.fill(index, &mut batch);
        batch
    }

    /// What must hold of every training batch.
    fn check(batches: &Batches, batch: &Batch) {
        let size = batches.batch_size() * batches.length();
        assert_eq!((batch.batch_size, batch.length), (batches.batch_size(), batches.length()));
        assert_eq!((batch.inputs.len(), batch.targets.len(), batch.marks.len()), (size, size, size));
        let corpus = batches.corpus();
        let documents: Vec<usize> = corpus.starts_within(0..=corpus.len() - 1).collect();
        let mut targets = 0;
        for place in 0..size {
            let (input, target, mark) = (batch.inputs[place], batch.targets[place], batch.marks[place]);
            let ends = documents.contains(&(input as usize + 1));
            assert_eq!(target, if ends { IGNORE } else { input + 1 });
            targets += usize::from(!ends);
            assert_eq!(mark & PAD, 0);
            if documents.contains(&(input as usize)) {
                assert_eq!(mark, RESET);
            }
            // Without a reset a token follows the one before it in the corpus.
            if mark == 0 && place % batch.length > 0 {
                assert_eq!(input, batch.inputs[place - 1] + 1);
            }
        }
        assert_eq!(batch.target_count, targets);
    }

    #[test]
    fn windows_cover_an_epoch_once_in_a_new_order() {
        for (tokens, batch_size, length) in
            [(1000, 4, 16), (103, 7, 10), (11, 3, 10), (25, 2, 10), (50, 64, 1)]
        {
            let batches =
                Batches::new(corpus(tokens, &[0, 5, 9]), Batching::Windows, batch_size, length, 1).unwrap();
            let windows = batches.period;
            assert!(windows * length < tokens && (windows + 2) * length + 1 > tokens);
            let mut starts = Vec::new();
            for index in 0..(3 * windows as u64).div_ceil(batch_size as u64) {
                let batch = batch(&batches, index);
                check(&batches, &batch);
                for row in 0..batch_size {
                    assert_eq!(batch.marks[row * length] & RESET, RESET);
                    starts.push(batch.inputs[row * length] as usize);
                }
            }
            for epoch in starts.chunks(windows).take(3) {
                let mut sorted = epoch.to_vec();
                sorted.sort_unstable();
                assert!(sorted[0] < length);
                assert!(sorted.windows(2).all(|pair| pair[1] == pair[0] + length), "{sorted:?}");
            }
            if windows > 20 {
                assert_ne!(starts[..windows], starts[windows..2 * windows], "epochs differ");
                let step = |start: &usize| start / length;
                assert!(!starts[..windows].is_sorted_by_key(step), "shuffled");
            }
        }
    }

    #[test]
    fn every_offset_occurs() {
        let batches = Batches::new(corpus(1000, &[0]), Batching::Windows, 1, 8, 3).unwrap();
        let offsets: std::collections::BTreeSet<usize> =
            (0..200).map(|epoch| batches.offset(epoch)).collect();
        assert_eq!(offsets, (0..8).collect());
    }

    #[test]
    fn a_batch_depends_on_seed_and_index_only() {
        for batching in [Batching::Windows, Batching::Documents, Batching::Stream] {
            let batches = |seed| Batches::new(corpus(997, &[0, 100, 101]), batching, 3, 16, seed).unwrap();
            let in_order: Vec<Batch> = (0..60).map(|index| batch(&batches(5), index)).collect();
            let resumed = batches(5);
            let mut reused = Batch::default();
            for index in [59, 17, 0, 18, 17] {
                resumed.fill(index, &mut reused);
                assert_eq!(reused, in_order[index as usize]);
            }
            let other = batch(&batches(6), 0);
            assert_eq!(other == in_order[0], batching == Batching::Stream);
        }
    }

    #[test]
    fn documents_are_packed_whole_in_a_new_order() {
        let documents = [0, 1, 8, 9, 10, 30, 31, 90];
        for (batch_size, length) in [(1, 8), (3, 16), (2, 64)] {
            let batches =
                Batches::new(corpus(100, &documents), Batching::Documents, batch_size, length, 1).unwrap();
            assert_eq!(batches.period, 92);
            let mut stream = Vec::new();
            for index in 0..2 * batches.batches_per_epoch() + 1 {
                let batch = batch(&batches, index);
                for place in 0..batch_size * length {
                    let (input, target, mark) =
                        (batch.inputs[place], batch.targets[place], batch.marks[place]);
                    assert_eq!(target, input + 1, "every input has its target");
                    let begins = documents.contains(&(input as usize));
                    assert_eq!(mark, if begins || place % length == 0 { RESET } else { 0 });
                    if mark == 0 {
                        assert_eq!(input, batch.inputs[place - 1] + 1);
                    }
                    stream.push(input);
                }
            }
            // Row after row is one stream of whole documents, each once an epoch.
            let mut epochs = stream.chunks_exact(92);
            let (first, second) = (epochs.next().unwrap(), epochs.next().unwrap());
            assert_ne!(first, second);
            for epoch in [first, second] {
                let mut sorted = epoch.to_vec();
                sorted.sort_unstable();
                let ends = [0, 7, 8, 9, 29, 30, 89, 99];
                let expected: Vec<u32> = (0..100).filter(|token| !ends.contains(token)).collect();
                assert_eq!(sorted, expected);
                let jumps =
                    epoch.windows(2).filter(|pair| pair[1] != pair[0] + 1).map(|pair| pair[1] as usize);
                assert!(jumps.into_iter().all(|start| documents.contains(&start)));
            }
        }
        assert!(Batches::new(corpus(3, &[0, 1, 2]), Batching::Documents, 1, 1, 1).is_err());
    }

    #[test]
    fn streams_go_on_and_wrap() {
        for (tokens, batch_size, length) in [(1000, 4, 16), (97, 3, 32), (33, 1, 32), (500, 5, 1)] {
            let documents = [0, 5, 9, 29];
            let batches =
                Batches::new(corpus(tokens, &documents), Batching::Stream, batch_size, length, 1).unwrap();
            let part = (tokens - 1) / batch_size;
            let mut seen = vec![0usize; tokens];
            for index in 0..3 * batches.batches_per_epoch() {
                let batch = batch(&batches, index);
                check(&batches, &batch);
                for place in 0..batch_size * length {
                    let (row, column) = (place / length, place % length);
                    let walked = index as usize * length + column;
                    let expected = row * part + walked % part;
                    assert_eq!(batch.inputs[place] as usize, expected);
                    let reset = walked.is_multiple_of(part) || documents.contains(&expected);
                    assert_eq!(batch.marks[place], if reset { RESET } else { 0 });
                    if walked < part {
                        seen[expected] += 1;
                        assert_eq!(batches.epoch_of(index), 0);
                    }
                }
            }
            let covered = part * batch_size;
            assert!(seen[..covered].iter().all(|&times| times == 1));
            assert!(seen[covered..].iter().all(|&times| times == 0) && tokens - covered <= batch_size);
        }
    }

    #[test]
    fn epochs_are_counted() {
        // 61 windows of 16, whatever the offset, by 4 rows: 15.25 batches.
        let batches = Batches::new(corpus(1000, &[0]), Batching::Windows, 4, 16, 1).unwrap();
        assert_eq!(batches.period, 61);
        assert_eq!(batches.batches_per_epoch(), 16);
        assert_eq!([0, 15, 16, 30, 31].map(|index| batches.epoch_of(index)), [0, 0, 1, 1, 2]);
        // Parts of 249 tokens: 15.6 batches.
        let batches = Batches::new(corpus(1000, &[0]), Batching::Stream, 4, 16, 1).unwrap();
        assert_eq!(batches.batches_per_epoch(), 16);
        assert_eq!([0, 15, 16, 31, 32].map(|index| batches.epoch_of(index)), [0, 0, 1, 1, 2]);
    }

    #[test]
    fn too_little_text() {
        let make = |tokens, batching, batch_size, length| {
            Batches::new(corpus(tokens, &[0]), batching, batch_size, length, 1).map(|_| ())
        };
        make(17, Batching::Windows, 8, 16).unwrap();
        let error = make(16, Batching::Windows, 8, 16).unwrap_err();
        assert!(error.to_string().contains("at least 17 tokens for a window of length 16, found 16 tokens"));
        assert!(error.hint_text().unwrap().contains("smaller length"));
        make(129, Batching::Stream, 8, 16).unwrap();
        let error = make(128, Batching::Stream, 8, 16).unwrap_err();
        assert!(error.to_string().contains("at least 129 tokens for 8 streams"), "{error}");
        assert!(make(100, Batching::Windows, 0, 16).is_err());
        assert!(make(100, Batching::Stream, 8, 0).is_err());
        assert!(make(100, Batching::Stream, usize::MAX, 16).is_err());
    }
}
