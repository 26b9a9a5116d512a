//! Perplexity by position: how much a longer context helps.
//!
//! The position of a target is the number of tokens that the model had read of its document, or of
//! its window where windows start from an empty state: 1 for the second token of a document, which
//! is the first one to be predicted. Positions go into buckets between powers of two: 1, 2 to 3,
//! 4 to 7, and so on.

use serde::Serialize;

use crate::data::Batch;
use crate::marks::{IGNORE, PAD, RESET};

/// The loss at the positions `first` to `last` of documents or windows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bucket {
    /// The lowest position: tokens read before the target, a power of two.
    pub first: u64,
    /// The highest position, `2 * first - 1`.
    pub last: u64,
    /// Targets at these positions.
    pub tokens: u64,
    /// Nats a token.
    pub loss: f64,
    /// e^loss.
    pub token_perplexity: f64,
}

/// Sums of token losses by position.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Positions {
    /// For each row of a batch, the tokens read since its last reset.
    read: Vec<u64>,
    /// Nats and targets of each bucket.
    sums: Vec<(f64, u64)>,
}

impl Positions {
    /// Adds the losses of a batch's targets, in nats, in the order of the batch. Each row goes on
    /// where it ended in the batch before, unless its first token is a reset.
    pub fn add(&mut self, batch: &Batch, losses: &[f64]) {
        self.read.resize(batch.batch_size, 0);
        for (place, (&loss, &mark)) in losses.iter().zip(&batch.marks).enumerate() {
            if mark & PAD != 0 {
                continue;
            }
            let read = &mut self.read[place / batch.length];
            *read = if mark & RESET != 0 { 1 } else { *read + 1 };
            if batch.targets[place] == IGNORE {
                continue;
            }
            let bucket = read.ilog2() as usize;
            if self.sums.len() <= bucket {
                self.sums.resize(bucket + 1, (0.0, 0));
            }
            let (nats, tokens) = &mut self.sums[bucket];
            (*nats, *tokens) = (*nats + loss, *tokens + 1);
        }
    }

    /// The buckets that hold a target, in order.
    pub fn buckets(&self) -> Vec<Bucket> {
        let filled = self.sums.iter().enumerate().filter(|(_, (_, tokens))| *tokens > 0);
        filled
            .map(|(power, &(nats, tokens))| {
                let (first, loss) = (1 << power, nats / tokens as f64);
                Bucket { first, last: 2 * first - 1, tokens, loss, token_perplexity: loss.exp() }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::data::{Corpus, Evaluation, Unscored, sequential, strided_batches, validation_batches};
    use crate::engine::Device;
    use crate::eval::{PASS, Reading, evaluate};
    use crate::model::{LanguageModel, Logits, ModelConfig, Runner};
    use crate::nn::{Parameters, Weights};

    /// Buckets whose loss at a target is the target itself: token i is i.
    fn of_tokens(walk: &Evaluation) -> Vec<(u64, u64, u64, f64)> {
        let (mut positions, mut batch) = (Positions::default(), Batch::default());
        for index in 0..walk.batch_count() {
            walk.fill(index, &mut batch);
            let losses: Vec<f64> = batch.targets.iter().map(|&target| f64::from(target)).collect();
            positions.add(&batch, &losses);
        }
        let sum = |b: &Bucket| (b.first, b.last, b.tokens, (b.loss * b.tokens as f64).round());
        positions.buckets().iter().map(sum).collect()
    }

    #[test]
    fn positions_are_counted_within_documents_and_windows() {
        // Documents 0 1 2 3 4 5 | 6 | 7 8 9 10.
        let ids: Vec<u32> = (0..11).collect();
        let corpus = Arc::new(Corpus::from_tokens(&ids, &[0, 6, 7], 11, 1).unwrap());
        // Carried from batch to batch, whatever the length of a batch.
        let whole = [(1, 1, 2, 1.0 + 8.0), (2, 3, 4, 2.0 + 3.0 + 9.0 + 10.0), (4, 7, 2, 4.0 + 5.0)];
        for length in [1, 2, 3, 4, 50] {
            assert_eq!(of_tokens(&sequential(corpus.clone(), length).unwrap()), whole, "{length}");
        }
        // Windows 0 1 2 | 3 4 5 | 6 7 8 | 9, in rows of three: every one begins anew.
        for rows in [1, 2, 3] {
            let walk = validation_batches(corpus.clone(), rows, 3).unwrap();
            let sums = [(1, 1, 4, 1.0 + 4.0 + 8.0 + 10.0), (2, 3, 4, 2.0 + 3.0 + 5.0 + 9.0)];
            assert_eq!(of_tokens(&walk), sums, "{rows}");
        }
        // Windows 0 1 2 3 | 2 3 4 5 | 4 5 6 7 | 6 7 8 9: what is not scored was read all the same.
        let walk = strided_batches(corpus, 2, 4, 2).unwrap();
        let sums = [(1, 1, 2, 1.0 + 8.0), (2, 3, 5, 2.0 + 3.0 + 5.0 + 9.0 + 10.0), (4, 7, 1, 4.0)];
        assert_eq!(of_tokens(&walk), sums);
    }

    /// The buckets of an evaluation are those of losses that are computed a token at a time.
    #[test]
    fn buckets_hold_the_losses_of_a_model() {
        let config =
            ModelConfig { vocab_size: 7, embedding_dim: 16, num_blocks: 2, ..ModelConfig::default() };
        let model = Arc::new(LanguageModel::new(&config).unwrap());
        let parameters = Arc::new(Parameters::<f64>::initialize(model.specs(), 3));
        let device = Device::cpu(1).unwrap();
        let weights = Weights::new(parameters, &device).unwrap();
        // A document that is longer than a pass of the evaluation, and short ones.
        let ids: Vec<u32> = (0..330_u32).map(|i| (i * i / 3 + i) % 7).collect();
        let starts = [0, 300, 301, 310];
        let corpus = Arc::new(Corpus::from_tokens(&ids, &starts, 330, 1).unwrap());
        let ends = starts[1..].iter().copied().chain([ids.len()]);
        let mut sums = std::collections::BTreeMap::new();
        for (&start, end) in starts.iter().zip(ends) {
            let mut runner = Runner::new(model.clone(), weights.clone(), device.clone());
            for place in start..end - 1 {
                let logits = runner.read(&ids[place..=place], Logits::Last).unwrap();
                let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
                let loss = total.ln() - logits[ids[place + 1] as usize];
                let mut first = 1;
                while 2 * first <= place + 1 - start {
                    first *= 2;
                }
                let (nats, tokens) = sums.entry(first as u64).or_insert((0.0, 0_u64));
                (*nats, *tokens) = (*nats + loss, *tokens + 1);
            }
        }
        let report =
            evaluate(&model, &weights, &corpus, Reading::Whole(PASS), Unscored::default(), &device, |_| {})
                .unwrap();
        assert_eq!(report.positions.len(), 9, "up to position 256 to 511");
        for (bucket, (first, (nats, tokens))) in report.positions.iter().zip(&sums) {
            assert_eq!((bucket.first, bucket.last, bucket.tokens), (*first, 2 * first - 1, *tokens));
            assert!((bucket.loss - nats / *tokens as f64).abs() < 1e-9, "{bucket:?}: {nats}");
            assert_eq!(bucket.token_perplexity, bucket.loss.exp());
        }
        let nats: f64 = report.positions.iter().map(|bucket| bucket.loss * bucket.tokens as f64).sum();
        assert!((nats / report.tokens as f64 - report.loss).abs() < 1e-12);
    }
}
