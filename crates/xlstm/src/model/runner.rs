//! Runs a model on tokens, state in, state out: prefill and decode. A pass is recorded once
//! for every (batch, length) met, and kept.

use std::collections::HashMap;
use std::sync::Arc;

use super::language_model::LanguageModel;
use super::objective::check_tokens;
use crate::engine::operation::Element;
use crate::engine::{Device, Executor, Ids, Mode, Tape, Var};
use crate::error::{Error, Result};
use crate::nn::{Context, Parameters};
use crate::ops::last_token::last_token;
use crate::state::State;

/// Which positions logits are wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Logits {
    /// (B, S, V).
    All,
    /// (B, 1, V): enough to go on from.
    Last,
}

/// The most tokens a pass is recorded for; longer inputs go through in pieces.
pub const PIECE: usize = 512;

/// A model with its parameters, ready to run.
#[derive(Debug)]
pub struct Runner<T> {
    model: Arc<LanguageModel>,
    parameters: Arc<Parameters<T>>,
    device: Device,
    passes: HashMap<(usize, usize, Logits), Pass<T>>,
}

#[derive(Debug)]
struct Pass<T> {
    executor: Executor<T>,
    tokens: Ids,
    before: Vec<Var>,
    after: Vec<Var>,
    logits: Var,
}

impl<T: Element> Runner<T> {
    /// A runner of `model` with `parameters` on `device`.
    pub fn new(model: Arc<LanguageModel>, parameters: Arc<Parameters<T>>, device: Device) -> Runner<T> {
        Runner { model, parameters, device, passes: HashMap::new() }
    }

    /// The model.
    pub fn model(&self) -> &Arc<LanguageModel> {
        &self.model
    }

    /// The state of `batch` sequences that have not begun.
    pub fn empty_state(&self, batch: usize) -> State<T> {
        State::empty(&self.model.state_layout(batch))
    }

    /// Runs tokens (B S, row by row) after `state`: the logits asked for, and the state after
    /// the last token. `state` itself is not changed.
    ///
    /// # Errors
    /// When tokens lie outside the vocabulary, are not a whole number of rows, or the state
    /// belongs to another model.
    pub fn forward(
        &mut self,
        tokens: &[u32],
        state: &State<T>,
        logits: Logits,
    ) -> Result<(Vec<T>, State<T>)> {
        let batch = state.batch();
        check_tokens(tokens, self.model.config().vocab_size)?;
        if tokens.is_empty() || !tokens.len().is_multiple_of(batch) {
            return Err(Error::shape(format!("{} tokens for a batch of {batch} sequences", tokens.len())));
        }
        let length = tokens.len() / batch;
        let mut state = state.clone();
        let mut pieces = Vec::new();
        for start in (0..length).step_by(PIECE) {
            let end = length.min(start + PIECE);
            let rows =
                tokens.chunks_exact(length).flat_map(|row| &row[start..end]).copied().collect::<Vec<_>>();
            let wanted = logits == Logits::All || end == length;
            pieces.push((end - start, self.piece(&rows, [batch, end - start], &mut state, logits, wanted)?));
        }
        let vocabulary = self.model.config().vocab_size;
        let mut joined = Vec::new();
        for row in 0..batch {
            for (length, piece) in &pieces {
                let rows = if logits == Logits::All { *length } else { 1 };
                let width = if piece.is_empty() { 0 } else { rows * vocabulary };
                joined.extend_from_slice(&piece[row * width..(row + 1) * width]);
            }
        }
        Ok((joined, state))
    }

    /// One token of one sequence: [`forward`](Runner::forward) with a length of 1, the state
    /// replaced by the one after it and the logits left in `logits`.
    ///
    /// # Errors
    /// As [`forward`](Runner::forward).
    pub fn step(&mut self, token: u32, state: &mut State<T>, logits: &mut Vec<T>) -> Result<()> {
        check_tokens(&[token], self.model.config().vocab_size)?;
        *logits = self.piece(&[token], [1, 1], state, Logits::Last, true)?;
        Ok(())
    }

    fn piece(
        &mut self,
        tokens: &[u32],
        shape: [usize; 2],
        state: &mut State<T>,
        logits: Logits,
        wanted: bool,
    ) -> Result<Vec<T>> {
        let key = (shape[0], shape[1], logits);
        if !self.passes.contains_key(&key) {
            self.passes.insert(key, Pass::record(&self.model, shape, logits)?);
        }
        let (Some(pass), parameters) = (self.passes.get_mut(&key), &self.parameters) else {
            return Err(Error::shape("no recorded pass"));
        };
        state.check(&self.model.state_layout(shape[0]))?;
        pass.executor.ids_mut(pass.tokens).copy_from_slice(tokens);
        for (part, &var) in state.parts().zip(&pass.before) {
            pass.executor.input_mut(var).copy_from_slice(part);
        }
        let executor = &mut pass.executor;
        self.device.install(|| executor.forward(&parameters.values));
        for (part, &var) in state.parts_mut().zip(&pass.after) {
            part.copy_from_slice(pass.executor.value(var));
        }
        state.advance(shape[1] as u64);
        Ok(if wanted { pass.executor.value(pass.logits).to_vec() } else { Vec::new() })
    }
}

impl<T: Element> Pass<T> {
    fn record(model: &LanguageModel, shape: [usize; 2], logits: Logits) -> Result<Pass<T>> {
        let mut tape = Tape::new(Mode::Evaluate);
        let tokens = tape.ids(shape[0] * shape[1]);
        let layout = model.state_layout(shape[0]);
        let before: Vec<Var> = layout.iter().map(|(_, shape)| tape.input(shape.dims())).collect();
        let mut context = Context::default();
        let (features, after) = model.features(&mut tape, tokens, shape, Some(&before), &mut context)?;
        let features = match logits {
            Logits::All => features,
            Logits::Last => last_token(&mut tape, features)?,
        };
        let logits = model.logits(&mut tape, features)?;
        after.iter().chain([&logits]).for_each(|&var| tape.keep(var));
        Ok(Pass { executor: Executor::new(tape), tokens, before, after, logits })
    }
}
