//! Runs a model on tokens, the state staying on the device between calls: prefill and
//! decode. A pass is recorded once for every (batch, length) met, and kept.

use std::collections::HashMap;
use std::sync::Arc;

use super::language_model::LanguageModel;
use super::objective::{check_length, check_tokens};
use crate::engine::operation::Element;
use crate::engine::{Device, Ids, Mode, Program, Tape, Var};
use crate::error::{Error, Result};
use crate::nn::{Context, Weights};
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

/// What a pass is recorded for: sequences, tokens, and which logits.
type Key = (usize, usize, Logits);

/// A model that reads sequences, and stands somewhere in them.
#[derive(Debug)]
pub struct Runner<T> {
    model: Arc<LanguageModel>,
    weights: Weights<T>,
    device: Device,
    passes: HashMap<Key, Pass<T>>,
    batch: usize,
    /// Tokens that each sequence has seen.
    tokens: u64,
    standing: Standing<T>,
}

/// Where the state before the next token is.
#[derive(Debug)]
enum Standing<T> {
    /// Given from outside.
    Given(State<T>),
    /// In the inputs of this pass.
    Before(Key),
}

#[derive(Debug)]
struct Pass<T> {
    program: Program<T>,
    tokens: Ids,
    /// Each part of the state after the tokens, and before them.
    state: Vec<(Var, Var)>,
    logits: Var,
}

impl<T: Element> Runner<T> {
    /// A runner of `model` with `weights` on `device`, before the first token of one sequence.
    pub fn new(model: Arc<LanguageModel>, weights: Weights<T>, device: Device) -> Runner<T> {
        let empty = State::empty(&model.state_layout(1));
        let standing = Standing::Given(empty);
        Runner { model, weights, device, passes: HashMap::new(), batch: 1, tokens: 0, standing }
    }

    /// The model.
    pub fn model(&self) -> &Arc<LanguageModel> {
        &self.model
    }

    /// Goes back to before the first token, of `batch` sequences.
    pub fn reset(&mut self, batch: usize) {
        (self.batch, self.tokens) = (batch, 0);
        self.standing = Standing::Given(State::empty(&self.model.state_layout(batch)));
    }

    /// The state after the last token read.
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn state(&self) -> Result<State<T>> {
        match &self.standing {
            Standing::Given(state) => Ok(state.clone()),
            Standing::Before(key) => {
                let pass = &self.passes[key];
                let parts = pass.state.iter().map(|&(_, before)| pass.program.value(before));
                State::from_parts(&self.model.state_layout(self.batch), parts, self.tokens)
            }
        }
    }

    /// Goes to where `state` was taken.
    ///
    /// # Errors
    /// When it belongs to another model.
    pub fn set_state(&mut self, state: &State<T>) -> Result<()> {
        state.check(&self.model.state_layout(state.batch()))?;
        (self.batch, self.tokens) = (state.batch(), state.tokens());
        self.standing = Standing::Given(state.clone());
        Ok(())
    }

    /// Reads tokens (B S, row by row) after those read so far; returns the logits asked for.
    ///
    /// # Errors
    /// When tokens lie outside the vocabulary or are not a whole number of rows, or go beyond the
    /// end of learned positions, or a GPU fails.
    pub fn read(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<T>> {
        let batch = self.batch;
        check_tokens(tokens, self.model.config().vocab_size)?;
        if tokens.is_empty() || !tokens.len().is_multiple_of(batch) {
            return Err(Error::shape(format!("{} tokens for a batch of {batch} sequences", tokens.len())));
        }
        let length = tokens.len() / batch;
        if let Some(most) = self.model.most_tokens() {
            check_length(self.tokens as usize + length, most)?;
        }
        if length <= PIECE {
            return self.piece(tokens, length, logits, true);
        }
        let mut pieces = Vec::new();
        for start in (0..length).step_by(PIECE) {
            let end = length.min(start + PIECE);
            let rows =
                tokens.chunks_exact(length).flat_map(|row| &row[start..end]).copied().collect::<Vec<_>>();
            let wanted = logits == Logits::All || end == length;
            pieces.push((end - start, self.piece(&rows, end - start, logits, wanted)?));
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
        Ok(joined)
    }

    fn piece(&mut self, tokens: &[u32], length: usize, logits: Logits, wanted: bool) -> Result<Vec<T>> {
        let key = (self.batch, length, logits);
        let mut pass = match self.passes.remove(&key) {
            Some(pass) => pass,
            None => Pass::record(&self.model, [self.batch, length], logits, &self.device)?,
        };
        let read = self.read_with(&mut pass, key, tokens, wanted);
        self.passes.insert(key, pass);
        let logits = read?;
        self.standing = Standing::Before(key);
        self.tokens += length as u64;
        Ok(logits)
    }

    fn read_with(&self, pass: &mut Pass<T>, key: Key, tokens: &[u32], wanted: bool) -> Result<Vec<T>> {
        match &self.standing {
            Standing::Before(other) if *other == key => {}
            Standing::Before(other) => {
                let other = &self.passes[other];
                for (&(_, to), &(_, from)) in pass.state.iter().zip(&other.state) {
                    pass.program.copy_input(to, &other.program, from)?;
                }
            }
            Standing::Given(state) => {
                for (part, &(_, before)) in state.parts().zip(&pass.state) {
                    pass.program.set_input(before, part)?;
                }
            }
        }
        pass.program.set_ids(pass.tokens, tokens)?;
        let (program, state, values) = (&mut pass.program, &pass.state, self.weights.values());
        self.device.install(|| program.forward_feeding(values, state))?;
        if wanted { pass.program.value(pass.logits) } else { Ok(Vec::new()) }
    }
}

impl<T: Element> Pass<T> {
    fn record(model: &LanguageModel, shape: [usize; 2], logits: Logits, device: &Device) -> Result<Pass<T>> {
        let Recording { tape, tokens, state, logits } = Recording::new(model, shape, logits)?;
        Ok(Pass { program: Program::new(tape, device)?, tokens, state, logits })
    }
}

/// A pass before it is on a device.
struct Recording {
    tape: Tape,
    tokens: Ids,
    state: Vec<(Var, Var)>,
    logits: Var,
}

impl Recording {
    fn new(model: &LanguageModel, shape: [usize; 2], logits: Logits) -> Result<Recording> {
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
        let state = after.into_iter().zip(before).collect();
        Ok(Recording { tape, tokens, state, logits })
    }
}

/// Whether each parameter of `model` may be in 16 bits where it runs on the processor: see
/// [`Tape::narrow_parameters`].
///
/// # Errors
/// When the model's shapes do not fit.
pub fn narrow_parameters(model: &LanguageModel) -> Result<Vec<bool>> {
    let recording = Recording::new(model, [1, 1], Logits::Last)?;
    Ok(recording.tape.narrow_parameters(model.specs().len()))
}
