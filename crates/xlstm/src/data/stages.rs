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
        let long = [stages[0], Stage { first: 3, batch_size: 2, length: 2000 }];
        assert!(Stages::new(&corpus(1000), Batching::Windows, &long, 1).is_err());
    }
}
