//! The recorded pass that training and scoring replay: tokens -> loss, with the state in
//! and out where it is carried from batch to batch.

use super::language_model::LanguageModel;
use crate::data::Batch;
use crate::engine::executor::Culprit;
use crate::engine::operation::Element;
use crate::engine::{Executor, Ids, Mode, Tape, Var};
use crate::error::{Error, Result};
use crate::nn::Context;
use crate::ops::cross_entropy::cross_entropy;

/// What the state does between batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carry {
    /// Every batch starts from an empty state; no marks within.
    Fresh,
    /// Every batch starts from an empty state, documents begin and end within.
    Marked,
    /// The state is carried from one batch to the next.
    Carried,
}

/// A replayable pass for one batch shape.
#[derive(Debug)]
pub struct Objective<T> {
    executor: Executor<T>,
    shape: [usize; 2],
    vocabulary: usize,
    tokens: Ids,
    targets: Ids,
    marks: Option<Ids>,
    seed: Ids,
    scale: Var,
    before: Vec<Var>,
    after: Vec<Var>,
    loss: Var,
    token_losses: Var,
}

impl<T: Element> Objective<T> {
    /// Records the pass for batches of `shape` (sequences, tokens).
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn new(model: &LanguageModel, mode: Mode, shape: [usize; 2], carry: Carry) -> Result<Objective<T>> {
        let mut tape = Tape::new(mode);
        let count = shape[0] * shape[1];
        let (tokens, targets, seed) = (tape.ids(count), tape.ids(count), tape.ids(4));
        let marks = (carry != Carry::Fresh).then(|| tape.ids(count));
        let scale = tape.input([1]);
        let layout = if carry == Carry::Carried { model.state_layout(shape[0]) } else { Vec::new() };
        let before: Vec<Var> = layout.iter().map(|(_, shape)| tape.input(shape.dims())).collect();
        let mut context = Context::new(marks, Some(seed));
        let state = (carry == Carry::Carried).then_some(&before[..]);
        let (features, after) = model.features(&mut tape, tokens, shape, state, &mut context)?;
        let logits = model.logits(&mut tape, features)?;
        tape.scope("loss");
        let (loss, token_losses) = cross_entropy(&mut tape, logits, targets, scale)?;
        tape.keep(loss);
        tape.keep(token_losses);
        tape.seed_gradient(loss);
        let after = if carry == Carry::Carried { after } else { Vec::new() };
        after.iter().for_each(|&var| tape.keep(var));
        let mut executor = Executor::new(tape);
        executor.seed_mut(loss).fill(T::ONE);
        let vocabulary = model.config().vocab_size;
        Ok(Objective {
            executor,
            shape,
            vocabulary,
            tokens,
            targets,
            marks,
            seed,
            scale,
            before,
            after,
            loss,
            token_losses,
        })
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        self.executor.bytes()
    }

    /// What dropout counts from.
    pub fn set_seed(&mut self, seed: u64, step: u64, micro_batch: u32) {
        let values = [seed as u32, (seed >> 32) as u32, step as u32, micro_batch];
        self.executor.ids_mut(self.seed).copy_from_slice(&values);
    }

    /// Runs forward on a batch; returns the sum of the token losses times `scale`.
    ///
    /// # Errors
    /// When the batch has another shape, or a token lies outside the vocabulary.
    pub fn forward(&mut self, parameters: &[Vec<T>], batch: &Batch, scale: f64) -> Result<f64> {
        if [batch.batch_size, batch.length] != self.shape {
            return Err(Error::shape(format!(
                "a batch of {}x{} for a pass recorded for {}x{}",
                batch.batch_size, batch.length, self.shape[0], self.shape[1]
            )));
        }
        check_tokens(&batch.inputs, self.vocabulary)?;
        self.executor.ids_mut(self.tokens).copy_from_slice(&batch.inputs);
        self.executor.ids_mut(self.targets).copy_from_slice(&batch.targets);
        if let Some(marks) = self.marks {
            self.executor.ids_mut(marks).copy_from_slice(&batch.marks);
        }
        self.executor.input_mut(self.scale).fill(T::from_f64(scale));
        self.executor.forward(parameters);
        Ok(self.executor.value(self.loss)[0].to_f64())
    }

    /// Runs backward after forward, adding to `gradients`.
    pub fn backward(&mut self, parameters: &[Vec<T>], gradients: &mut [Vec<T>]) {
        self.executor.backward(parameters, gradients);
    }

    /// The loss of every token of the last batch, in nats; 0 where it has no target.
    pub fn token_losses(&self) -> &[T] {
        self.executor.value(self.token_losses)
    }

    /// Makes the state after the last batch the state before the next.
    pub fn carry_state(&mut self) {
        for (&after, &before) in self.after.iter().zip(&self.before) {
            self.executor.feed_back(after, before);
        }
    }

    /// Makes an empty state the state before the next batch.
    pub fn clear_state(&mut self) {
        for &before in &self.before {
            self.executor.input_mut(before).fill(T::ZERO);
        }
    }

    /// The state before the next batch, part by part.
    pub fn state(&self) -> Vec<Vec<T>> {
        self.before.iter().map(|&var| self.executor.value(var).to_vec()).collect()
    }

    /// Sets the state before the next batch.
    ///
    /// # Errors
    /// When it is of another model or batch size.
    pub fn set_state(&mut self, state: &[Vec<T>]) -> Result<()> {
        let fits = state.len() == self.before.len()
            && state
                .iter()
                .zip(&self.before)
                .all(|(part, &var)| part.len() == self.executor.value(var).len());
        if !fits {
            return Err(Error::checkpoint("the carried state belongs to another model or batch size"));
        }
        for (part, &var) in state.iter().zip(&self.before) {
            self.executor.input_mut(var).copy_from_slice(part);
        }
        Ok(())
    }

    /// After a pass that was not finite: the first operation to blame.
    pub fn find_non_finite(&mut self, parameters: &[Vec<T>], gradients: &mut [Vec<T>]) -> Option<Culprit> {
        self.executor.find_non_finite(parameters, Some(gradients))
    }
}

/// Refuses token ids outside a vocabulary.
pub(super) fn check_tokens(tokens: &[u32], vocabulary: usize) -> Result<()> {
    match tokens.iter().position(|&token| token as usize >= vocabulary) {
        None => Ok(()),
        Some(at) => Err(Error::data(format!(
            "token {} at position {at} lies outside the model's vocabulary of {vocabulary}",
            tokens[at]
        ))
        .hint("the tokenizer does not belong to this model")),
    }
}
