//! Training batches whose length and size change in the course of a run.

use std::sync::Arc;

use super::batch::Batch;
use super::batches::{Batches, Batching};
use super::corpus::Corpus;
use crate::Result;

/// A shape of batches and the first batch that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage {
    /// The index of the first batch of this shape.
    pub first: u64,
    /// Rows of a batch.
    pub batch_size: usize,
    /// Tokens of a row.
    pub length: usize,
}

/// The batches of a run: those of one stage after those of another.
///
/// A stage goes on in the corpus where the one before ended. With windows and documents its order
/// is another, so that in the epoch of a change some text comes twice and some not at all; with
/// streams it goes on exactly there, as long as the number of rows stays.
#[derive(Debug, Clone)]
pub struct Stages {
    /// The index of the first batch of each stage, the first 0, and its batches.
    stages: Vec<(u64, Batches)>,
}

impl Stages {
    /// Batches of `corpus` in these stages, which are in order and of which the first begins at 0.
    ///
    /// # Errors
    /// Those of [`Batches::new`], for any of the stages.
    pub fn new(corpus: &Arc<Corpus>, batching: Batching, stages: &[Stage], seed: u64) -> Result<Stages> {
        let mut before = 0;
        let mut all = Vec::with_capacity(stages.len());
        for (index, stage) in stages.iter().enumerate() {
            let batches = Batches::new(corpus.clone(), batching, stage.batch_size, stage.length, seed)?;
            all.push((stage.first, batches.after(before)));
            let end = stages.get(index + 1).map_or(stage.first, |next| next.first);
            before += (end - stage.first) * (stage.batch_size * stage.length) as u64;
        }
        Ok(Stages { stages: all })
    }

    /// Rows and tokens in a row of batch `index`.
    pub fn shape(&self, index: u64) -> [usize; 2] {
        self.stage(index).map_or([0, 0], |(_, batches)| [batches.batch_size(), batches.length()])
    }

    /// The number of batches after which the corpus has been seen `epochs` times, rounded up.
    pub fn batches_in(&self, epochs: f64) -> u64 {
        let mut left = epochs;
        for (place, (first, batches)) in self.stages.iter().enumerate() {
            // A fraction that only rounding made is no batch.
            let needed = (batches.batches_in(left) - 1e-6).ceil() as u64;
            match self.stages.get(place + 1) {
                Some((next, _)) if first.saturating_add(needed) > *next => {
                    left -= (next - first) as f64 / batches.batches_in(1.0);
                }
                _ => return first.saturating_add(needed),
            }
        }
        0
    }

    fn stage(&self, index: u64) -> Option<&(u64, Batches)> {
        let next = self.stages.partition_point(|(first, _)| *first <= index);
        self.stages[..next].last()
    }

    /// Fills `batch` with batch `index`, whatever it held before.
    pub fn fill(&self, index: u64, batch: &mut Batch) {
        if let Some((first, batches)) = self.stage(index) {
            batches.fill(index - first, batch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus(tokens: u32) -> Arc<Corpus> {
        let ids: Vec<u32> = (0..tokens).collect();
        Arc::new(Corpus::from_tokens(&ids, &[0], 1, 1).unwrap())
    }

    #[test]
    fn epochs_in_batches() {
        let stage = [Stage { first: 0, batch_size: 3, length: 4 }];
        for (batching, epoch) in [
            // 249 windows in threes, 999 targets in twelves, streams of 333 in fours.
            (Batching::Windows, 83.0),
            (Batching::Documents, 83.25),
            (Batching::Stream, 83.25),
        ] {
            let batches = Stages::new(&corpus(1000), batching, &stage, 1).unwrap();
            for epochs in [0.001, 0.1, 0.5, 1.0, 2.0, 3.3, 4.0] {
                let expected = (epochs * epoch - 1e-9_f64).ceil() as u64;
                assert_eq!(batches.batches_in(epochs), expected, "{batching:?}, {epochs}");
            }
        }
    }

    #[test]
    fn shapes_change_and_streams_go_on() {
        let stages = [
            Stage { first: 0, batch_size: 2, length: 4 },
            Stage { first: 3, batch_size: 2, length: 8 },
            Stage { first: 5, batch_size: 4, length: 8 },
        ];
        for batching in [Batching::Windows, Batching::Documents, Batching::Stream] {
            let batches = Stages::new(&corpus(1000), batching, &stages, 1).unwrap();
            let mut batch = Batch::default();
            let mut next = 0;
            for (index, shape) in
                [[2, 4], [2, 4], [2, 4], [2, 8], [2, 8], [4, 8], [4, 8]].into_iter().enumerate()
            {
                batches.fill(index as u64, &mut batch);
                assert_eq!([batch.batch_size, batch.length], shape);
                assert_eq!(batches.shape(index as u64), shape);
                if batching == Batching::Stream && shape[0] == 2 {
                    assert_eq!(batch.inputs[0], next, "batch {index}");
                    next += shape[1] as u32;
                }
            }
        }
        // 1000 tokens are 249 windows of 4 or 124 of 8; the first stages see 6 and 4 of them.
        let batches = Stages::new(&corpus(1000), Batching::Windows, &stages, 1).unwrap();
        let seen = |epochs: f64| 5.0 + (epochs - 6.0 / 249.0 - 4.0 / 124.0) * 31.0;
        for (epochs, count) in
            [(1.0, seen(1.0).ceil() as u64), (3.0 / 249.0, 2), (6.0 / 249.0, 3), (7.0 / 249.0, 4)]
        {
            assert_eq!(batches.batches_in(epochs), count, "{epochs}");
        }
        let long = [stages[0], Stage { first: 3, batch_size: 2, length: 2000 }];
        assert!(Stages::new(&corpus(1000), Batching::Windows, &long, 1).is_err());
    }
}
