//! Evaluation of a language model on text.

mod positions;

pub use positions::{Bucket, Positions};

use std::sync::Arc;

use serde::Serialize;

use crate::data::{Batch, Corpus, Evaluation, Unscored, sequential, strided_batches, validation_batches};
use crate::engine::operation::Element;
use crate::engine::{Device, Mode};
use crate::error::Result;
use crate::model::objective::Carry;
use crate::model::{LanguageModel, Objective};
use crate::nn::Weights;

/// Tokens of one pass over a whole text unless something else is asked for: memory does not grow
/// with the text.
pub const PASS: usize = 256;

/// How a text is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// From beginning to end, so many tokens at a time, the state carried on: [`PASS`] of them for
    /// speed, one to read as generation does.
    Whole(usize),
    /// In windows of this many tokens, each from an empty state.
    Windows(usize),
    /// In windows of `length` tokens, each from an empty state and `stride` after the one before;
    /// every token is scored in the first window that holds it.
    Strided {
        /// Tokens of a window.
        length: usize,
        /// Tokens from one window's beginning to the next one's.
        stride: usize,
    },
}

/// The loss on a text, in the units that people compare.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Nats a token.
    pub loss: f64,
    /// e^loss.
    pub token_perplexity: f64,
    /// e^(nats a word); words are what white space separates.
    pub word_perplexity: f64,
    /// Bits a byte of the text.
    pub bits_per_byte: f64,
    /// Tokens predicted: all but the first of each document, and what is not scored.
    pub tokens: u64,
    /// Words of the text that are scored.
    pub words: u64,
    /// Bytes of the text that are scored.
    pub bytes: u64,
    /// Words that are not scored.
    pub unscored: u64,
    /// The loss by position in the document or window.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub positions: Vec<Bucket>,
}

impl Report {
    fn new(nats: f64, tokens: u64, corpus: &Corpus, unscored: [u64; 2], positions: &Positions) -> Report {
        let loss = nats / tokens as f64;
        let [occurrences, length] = unscored;
        let words = corpus.words().saturating_sub(occurrences);
        let bytes = corpus.bytes().saturating_sub(occurrences * length);
        Report {
            loss,
            token_perplexity: loss.exp(),
            word_perplexity: (nats / words as f64).exp(),
            bits_per_byte: nats / std::f64::consts::LN_2 / bytes as f64,
            tokens,
            words,
            bytes,
            unscored: occurrences,
            positions: positions.buckets(),
        }
    }
}

/// Scores every token of `corpus` but those that are `unscored`; `progress` hears the share done, from 0 to 1.
///
/// # Errors
/// When the corpus is too short, or its tokens do not fit the model.
pub fn evaluate<T: Element>(
    model: &LanguageModel,
    weights: &Weights<T>,
    corpus: &Arc<Corpus>,
    reading: Reading,
    unscored: Unscored,
    device: &Device,
    mut progress: impl FnMut(f64),
) -> Result<Report> {
    let batches = match reading {
        Reading::Whole(pass) => sequential(corpus.clone(), pass)?,
        Reading::Strided { length, stride } => {
            strided_batches(corpus.clone(), (4096 / length.max(1)).clamp(1, 64), length, stride)?
        }
        Reading::Windows(length) => validation_batches(corpus.clone(), (4096 / length).clamp(1, 64), length)?,
    };
    let left_out = [unscored.occurrences, unscored.bytes];
    let mut scorer = Scorer::new(model, batches.without(unscored), 0, device)?;
    let mut positions = Positions::default();
    let (nats, tokens) = scorer.score_each(weights, device, &mut progress, &mut |batch, losses| {
        positions.add(batch, losses);
    })?;
    Ok(Report::new(nats, tokens, corpus, left_out, &positions))
}

/// A recorded evaluation that can be repeated as training goes on.
#[derive(Debug)]
pub struct Scorer<T> {
    objective: Objective<T>,
    batches: Evaluation,
    limit: u64,
    batch: Batch,
}

impl<T: Element> Scorer<T> {
    /// Scores the first `limit` of `batches` (0: all) on `device`.
    ///
    /// # Errors
    /// When shapes do not fit, or a GPU's memory runs out.
    pub fn new(model: &LanguageModel, batches: Evaluation, limit: u64, device: &Device) -> Result<Scorer<T>> {
        let carry = if batches.carries_state() { Carry::Carried } else { Carry::Marked };
        let mut batch = Batch::default();
        batches.fill(0, &mut batch);
        let shape = [batch.batch_size, batch.length];
        let objective = Objective::new(model, Mode::Evaluate, shape, carry, device)?;
        let all = batches.batch_count();
        let limit = if limit == 0 { all } else { limit.min(all) };
        Ok(Scorer { objective, batches, limit, batch })
    }

    /// The sum of the token losses in nats, and the number of targets.
    ///
    /// # Errors
    /// When a token lies outside the vocabulary, or a GPU fails.
    pub fn score(
        &mut self,
        weights: &Weights<T>,
        device: &Device,
        progress: &mut impl FnMut(f64),
    ) -> Result<(f64, u64)> {
        self.score_each(weights, device, progress, &mut |_, _| {})
    }

    /// The same; `listen` hears of every batch and the loss of each of its tokens in nats, which is
    /// 0 where there is no target.
    ///
    /// # Errors
    /// As [`score`](Scorer::score).
    pub fn score_each(
        &mut self,
        weights: &Weights<T>,
        device: &Device,
        progress: &mut impl FnMut(f64),
        listen: &mut impl FnMut(&Batch, &[f64]),
    ) -> Result<(f64, u64)> {
        self.objective.clear_state()?;
        let (mut nats, mut targets) = (0.0, 0);
        for index in 0..self.limit {
            self.batches.fill(index, &mut self.batch);
            let (objective, batch) = (&mut self.objective, &self.batch);
            device.install(|| objective.forward(weights.values(), batch, 1.0))?;
            // Summed in f64: over a long text f32 would run out of digits.
            let losses: Vec<f64> = self.objective.losses()?.iter().map(|x| x.to_f64()).collect();
            nats += losses.iter().sum::<f64>();
            listen(&self.batch, &losses);
            targets += self.batch.target_count as u64;
            self.objective.carry_state()?;
            progress((index + 1) as f64 / self.limit as f64);
        }
        Ok((nats, targets))
    }
}
