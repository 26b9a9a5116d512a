//! Runs a model on sequences, the state staying on the device between calls: prefill and
//! decode. A pass is recorded once for every (batch, length) met, and kept.

use std::collections::HashMap;
use std::sync::Arc;

use super::feature_model::FeatureModel;
use super::interface::Model;
use super::language_model::LanguageModel;
use super::objective::check_length;
use crate::engine::operation::Element;
use crate::engine::{Device, Ids, Mode, Program, Storable, Tape, Var};
use crate::error::{Error, ErrorKind, Result};
use crate::marks::PAD;
use crate::nn::{Context, Weights};
use crate::ops::draw::draw;
use crate::state::State;

/// Which positions logits, or the outputs of features, are wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Logits {
    /// (B, S, V).
    All,
    /// (B, 1, V): enough to go on from.
    Last,
}

/// How a token is drawn from logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// In [0, 1): how far into the running sum of probabilities, in the order of ids.
    pub uniform: f64,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Ids from here on are not drawn.
    pub vocabulary: usize,
}

/// Logits that no token can be drawn from.
pub(crate) fn not_numbers() -> Error {
    Error::new(ErrorKind::NonFinite, "the model's logits are not numbers")
        .hint("the model is damaged, or its training diverged")
}

/// The most tokens a pass is recorded for on the processor; longer inputs go through in pieces.
pub const PIECE: usize = 512;
/// The same on a GPU, which short pieces leave idle, where logits of all of them are not wanted.
#[cfg(feature = "cuda")]
const LONG_PIECE: usize = 2048;

/// What a pass is recorded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    batch: usize,
    length: usize,
    logits: Logits,
    /// Some sequences are shorter than the others.
    padded: bool,
    /// With a token drawn for each.
    drawn: bool,
}

/// A model that reads sequences, and stands somewhere in them.
#[derive(Debug)]
pub struct Runner<T, M = LanguageModel> {
    model: Arc<M>,
    weights: Weights<T>,
    device: Device,
    passes: HashMap<Key, Pass<T>>,
    /// Tokens that each sequence has seen.
    tokens: Vec<u64>,
    standing: Standing<T>,
    /// Whether the model has no state, so that a sequence is read at once.
    whole: bool,
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
    inputs: Ids,
    marks: Option<Ids>,
    /// Each part of the state after the tokens, and before them.
    state: Vec<(Var, Var)>,
    outputs: Var,
    /// How tokens are drawn, and they.
    drawn: Option<(Var, Var)>,
}

/// What is asked of a pass.
enum Wanted<'a, T> {
    /// That the state goes on.
    Nothing,
    Outputs,
    /// Tokens drawn with these settings.
    Tokens(&'a [T]),
}

impl<T: Element, M: Model> Runner<T, M> {
    /// A runner of `model` with `weights` on `device`, before the first token of one sequence.
    pub fn new(model: Arc<M>, weights: Weights<T>, device: Device) -> Runner<T, M> {
        let layout = model.state_layout(1);
        let (standing, whole) = (Standing::Given(State::empty(&layout)), layout.is_empty());
        Runner { model, weights, device, passes: HashMap::new(), tokens: vec![0], standing, whole }
    }

    /// The model.
    pub fn model(&self) -> &Arc<M> {
        &self.model
    }

    /// Goes back to before the first token, of `batch` sequences.
    pub fn reset(&mut self, batch: usize) {
        self.tokens = vec![0; batch];
        self.standing = Standing::Given(State::empty(&self.model.state_layout(batch)));
    }

    /// The state after the last token read; of each sequence after its own.
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn state(&self) -> Result<State<T>> {
        match &self.standing {
            Standing::Given(state) => Ok(state.clone()),
            Standing::Before(key) => {
                let pass = &self.passes[key];
                let parts = pass.state.iter().map(|&(_, before)| pass.program.value(before));
                State::from_parts(&self.model.state_layout(key.batch), parts, self.tokens.clone())
            }
        }
    }

    /// Goes to where `state` was taken.
    ///
    /// # Errors
    /// When it belongs to another model.
    pub fn set_state(&mut self, state: &State<T>) -> Result<()> {
        state.check(&self.model.state_layout(state.batch()))?;
        self.tokens = state.tokens().to_vec();
        self.standing = Standing::Given(state.clone());
        Ok(())
    }

    /// Reads places row by row after those read so far; returns the outputs row by row.
    fn read_whole(&mut self, inputs: &[u32], logits: Logits) -> Result<Vec<T>> {
        let (batch, width) = (self.tokens.len(), self.model.inputs().width());
        if inputs.is_empty() || !inputs.len().is_multiple_of(batch * width) {
            let unit =
                if width == 1 { String::from("tokens") } else { format!("features in rows of {width}") };
            return Err(Error::shape(format!("{} {unit} for a batch of {batch} sequences", inputs.len())));
        }
        let rows: Vec<&[u32]> = inputs.chunks_exact(inputs.len() / batch).collect();
        let length = self.check(&rows)?[0];
        if length > self.most(length, logits) {
            return Ok(self.read_rows(&rows, logits)?.concat());
        }
        // In one piece, all of it is outputs: nothing is cut and copied.
        let key = Key { batch, length, logits, padded: false, drawn: false };
        self.piece(key, inputs, &vec![length; batch], Wanted::Outputs)
    }

    /// Reads sequences of any lengths at once, each after what it has read so far; returns the
    /// outputs of each. Those that are shorter than the longest are padded.
    fn read_rows(&mut self, rows: &[&[u32]], logits: Logits) -> Result<Vec<Vec<T>>> {
        let (batch, width) = (self.tokens.len(), self.model.inputs().width());
        let lengths = self.check(rows)?;
        let longest = lengths.iter().copied().max().unwrap_or_default();
        let mut outputs = vec![Vec::new(); batch];
        let most = self.most(longest, logits);
        for start in (0..longest).step_by(most) {
            let end = longest.min(start + most);
            // Where each sequence ends in this piece.
            let ends: Vec<usize> = lengths.iter().map(|length| (*length).clamp(start, end)).collect();
            let mut inputs = Vec::with_capacity(batch * (end - start) * width);
            for (b, row) in rows.iter().enumerate() {
                inputs.extend_from_slice(&row[(start * width).min(row.len())..(end * width).min(row.len())]);
                inputs.resize((b + 1) * (end - start) * width, 0);
            }
            let padded = ends.iter().any(|e| *e < end);
            let key = Key { batch, length: end - start, logits, padded, drawn: false };
            let is_last = |b: usize| start < lengths[b] && lengths[b] <= end;
            let wanted = logits == Logits::All || (0..batch).any(is_last);
            let own: Vec<usize> = ends.iter().map(|end| end - start).collect();
            let piece =
                self.piece(key, &inputs, &own, if wanted { Wanted::Outputs } else { Wanted::Nothing })?;
            let (size, each) = (self.model.output_width(), piece.len() / batch);
            for (b, output) in outputs.iter_mut().enumerate().filter(|_| wanted) {
                let own = &piece[b * each..(b + 1) * each];
                match logits {
                    Logits::All if each == key.length * size => {
                        output.extend_from_slice(&own[..(ends[b] - start) * size]);
                    }
                    _ if is_last(b) => output.extend_from_slice(own),
                    _ => {}
                }
            }
        }
        Ok(outputs)
    }

    /// Places of each sequence.
    ///
    /// # Errors
    /// When there are not as many sequences as the runner has, or they cannot be read.
    fn check(&self, rows: &[&[u32]]) -> Result<Vec<usize>> {
        let (batch, width) = (self.tokens.len(), self.model.inputs().width());
        if rows.len() != batch {
            return Err(Error::shape(format!("{} sequences for a batch of {batch}", rows.len()))
                .hint("reset the runner, or give it a state, of as many sequences"));
        }
        for row in rows {
            self.model.inputs().check(row)?;
            if !row.len().is_multiple_of(width) {
                return Err(Error::shape(format!("{} features are not rows of {width}", row.len())));
            }
        }
        if self.whole && self.tokens.iter().any(|tokens| *tokens > 0) {
            return Err(Error::shape(
                "this model reads sequences from both ends, and these have begun already",
            )
            .hint("reset the runner, and give it whole sequences"));
        }
        let lengths: Vec<usize> = rows.iter().map(|row| row.len() / width).collect();
        if let Some(most) = self.model.most_tokens() {
            let ends = self.tokens.iter().zip(&lengths).map(|(before, length)| *before as usize + length);
            check_length(ends.max().unwrap_or_default(), most)?;
        }
        Ok(lengths)
    }

    /// The most places of a piece, where the longest sequence has so many.
    fn most(&self, longest: usize, logits: Logits) -> usize {
        match (&self.device, logits) {
            _ if self.whole => longest.max(1),
            #[cfg(feature = "cuda")]
            (Device::Cuda(..), Logits::Last) => LONG_PIECE,
            _ => PIECE,
        }
    }

    /// Reads one piece, of which `lengths` places count in each sequence.
    fn piece(
        &mut self,
        key: Key,
        inputs: &[u32],
        lengths: &[usize],
        wanted: Wanted<'_, T>,
    ) -> Result<Vec<T>> {
        let mut pass = self.take_pass(key)?;
        let read = self.read_with(&mut pass, key, inputs, lengths, wanted);
        self.passes.insert(key, pass);
        let outputs = read?;
        self.standing = Standing::Before(key);
        self.tokens.iter_mut().zip(lengths).for_each(|(tokens, length)| *tokens += *length as u64);
        Ok(outputs)
    }

    /// The pass of `key`, recorded where it is the first time; to be put back.
    fn take_pass(&mut self, key: Key) -> Result<Pass<T>> {
        match self.passes.remove(&key) {
            Some(pass) => Ok(pass),
            None => Pass::record(&*self.model, key, &self.device),
        }
    }

    /// Puts the state to where the pass of `key` reads it.
    fn bring_state(&self, pass: &mut Pass<T>, key: Key) -> Result<()> {
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
        Ok(())
    }

    fn read_with(
        &self,
        pass: &mut Pass<T>,
        key: Key,
        inputs: &[u32],
        lengths: &[usize],
        wanted: Wanted<'_, T>,
    ) -> Result<Vec<T>> {
        self.bring_state(pass, key)?;
        pass.program.set_ids(pass.inputs, inputs)?;
        if let Some(marks) = pass.marks {
            let row = |length: usize| (0..key.length).map(move |t| if t < length { 0 } else { PAD });
            let values: Vec<u32> = lengths.iter().copied().flat_map(row).collect();
            pass.program.set_ids(marks, &values)?;
        }
        if let (Wanted::Tokens(settings), Some((how, _))) = (&wanted, pass.drawn) {
            pass.program.set_input(how, settings)?;
        }
        let (program, state, values) = (&mut pass.program, &pass.state, self.weights.values());
        self.device.install(|| program.forward_feeding(values, state))?;
        match (wanted, pass.drawn) {
            (Wanted::Outputs, _) => pass.program.value(pass.outputs),
            (Wanted::Tokens(_), Some((_, tokens))) => pass.program.value(tokens),
            _ => Ok(Vec::new()),
        }
    }
}

impl<T: Element> Runner<T> {
    /// Reads tokens (B S, row by row) after those read so far; returns the logits asked for.
    ///
    /// # Errors
    /// When tokens lie outside the vocabulary or are not a whole number of rows, or go beyond the
    /// end of learned positions, or a GPU fails.
    pub fn read(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<T>> {
        self.read_whole(tokens, logits)
    }

    /// Where passes run.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether tokens are to be drawn where the logits are, by [`read_and_draw`](Self::read_and_draw): on a
    /// GPU, from which they would have to come.
    pub fn draws(&self) -> bool {
        !matches!(self.device, Device::Cpu(..))
    }

    /// Reads a token of each sequence after those read so far, and draws the next of each.
    ///
    /// # Errors
    /// As [`read`](Self::read); when there are not as many tokens and draws as sequences, or the model's
    /// logits are not numbers.
    pub fn read_and_draw(&mut self, tokens: &[u32], draws: &[Draw]) -> Result<Vec<u32>> {
        let batch = self.tokens.len();
        let rows: Vec<&[u32]> = tokens.chunks_exact(1).collect();
        self.check(&rows)?;
        if draws.len() != batch {
            return Err(Error::shape(format!("{} draws for a batch of {batch} sequences", draws.len())));
        }
        let numbers = |draw: &Draw| [draw.uniform, draw.temperature, draw.vocabulary as f64].map(T::from_f64);
        let settings: Vec<T> = draws.iter().flat_map(numbers).collect();
        let key = Key { batch, length: 1, logits: Logits::Last, padded: false, drawn: true };
        let drawn = self.piece(key, tokens, &vec![1; batch], Wanted::Tokens(&settings))?;
        let token = |drawn: T| {
            let id = drawn.to_f64();
            if id.is_nan() { Err(not_numbers()) } else { Ok(id as u32) }
        };
        drawn.into_iter().map(token).collect()
    }

    /// Puts the state to where the pass reads it that takes a token of each sequence, as in generation: what
    /// the first of them would do, and no other.
    ///
    /// # Errors
    /// When a GPU fails.
    pub(crate) fn prepare_step(&mut self) -> Result<()> {
        let (batch, drawn) = (self.tokens.len(), self.draws());
        let key = Key { batch, length: 1, logits: Logits::Last, padded: false, drawn };
        let mut pass = self.take_pass(key)?;
        let done = self.bring_state(&mut pass, key);
        self.passes.insert(key, pass);
        done?;
        self.standing = Standing::Before(key);
        Ok(())
    }

    /// The logits of the last pass, of all positions that it was asked for.
    ///
    /// # Errors
    /// When nothing was read yet, or a GPU fails.
    pub fn logits(&self) -> Result<Vec<T>> {
        match &self.standing {
            Standing::Before(key) => self.passes[key].program.value(self.passes[key].outputs),
            Standing::Given(_) => Err(Error::data("there are no logits: nothing was read")),
        }
    }

    /// Reads sequences of any lengths at once, each after what it has read so far; returns the
    /// logits after the last token of each, or after all of them. To the state a sequence is read
    /// as if alone; the cost is that of the longest. One without tokens stands still and has no
    /// logits.
    ///
    /// # Errors
    /// When there are not as many sequences as the runner has, tokens lie outside the vocabulary,
    /// or a GPU fails.
    pub fn read_batch(&mut self, sequences: &[&[u32]], logits: Logits) -> Result<Vec<Vec<T>>> {
        self.read_rows(sequences, logits)
    }
}

impl<T: Element> Runner<T, FeatureModel> {
    /// Reads rows of features (B S, row by row) after those read so far, one or many; returns the
    /// outputs asked for. A model that pools has one a sequence, of all that was read.
    ///
    /// # Errors
    /// When features are not finite or not a whole number of rows, or a GPU fails.
    pub fn read(&mut self, features: &[f32], outputs: Logits) -> Result<Vec<T>> {
        self.read_whole(&bits(features), outputs)
    }

    /// Reads sequences of any lengths at once, as [`Runner::read_batch`] does those of tokens.
    ///
    /// # Errors
    /// When there are not as many sequences as the runner has, features are not finite or not a
    /// whole number of rows, or a GPU fails.
    pub fn read_batch(&mut self, sequences: &[&[f32]], outputs: Logits) -> Result<Vec<Vec<T>>> {
        let rows: Vec<Vec<u32>> = sequences.iter().map(|row| bits(row)).collect();
        self.read_rows(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), outputs)
    }
}

fn bits(features: &[f32]) -> Vec<u32> {
    features.iter().map(|x| x.to_bits()).collect()
}

impl<T: Element> Pass<T> {
    fn record(model: &impl Model, key: Key, device: &Device) -> Result<Pass<T>> {
        let Recording { tape, inputs, marks, state, outputs, drawn } = Recording::new(model, key)?;
        Ok(Pass { program: Program::new(tape, device)?, inputs, marks, state, outputs, drawn })
    }
}

/// A pass before it is on a device.
struct Recording {
    tape: Tape,
    inputs: Ids,
    marks: Option<Ids>,
    state: Vec<(Var, Var)>,
    outputs: Var,
    drawn: Option<(Var, Var)>,
}

impl Recording {
    fn new(model: &impl Model, key: Key) -> Result<Recording> {
        let Key { batch, length, logits, padded, drawn } = key;
        let mut tape = Tape::new(Mode::Evaluate);
        let inputs = tape.ids(batch * length * model.inputs().width());
        let marks = padded.then(|| tape.ids(batch * length));
        let layout = model.state_layout(batch);
        let before: Vec<Var> = layout.iter().map(|(_, shape)| tape.input(shape.dims())).collect();
        let mut context = Context::new(marks, None);
        let (features, after) =
            model.features(&mut tape, inputs, [batch, length], logits, Some(&before), &mut context)?;
        let outputs = model.outputs(&mut tape, features)?;
        let mut drawing = || {
            let how = tape.input([batch, 3]);
            let token = draw(&mut tape, outputs, how)?;
            tape.keep(token);
            Ok((how, token))
        };
        let drawn = drawn.then(&mut drawing).transpose()?;
        tape.keep(outputs);
        let state: Vec<(Var, Var)> = after.into_iter().zip(before).collect();
        state.iter().for_each(|&(after, before)| tape.keep_as(after, before));
        Ok(Recording { tape, inputs, marks, state, outputs, drawn })
    }
}

/// In how few bits each parameter of `model` may be where it runs on the processor: see
/// [`Tape::storable_parameters`].
///
/// # Errors
/// When the model's shapes do not fit.
pub fn storable_parameters(model: &LanguageModel) -> Result<Vec<Storable>> {
    let key = Key { batch: 1, length: 1, logits: Logits::Last, padded: false, drawn: false };
    Ok(Recording::new(model, key)?.tape.storable_parameters(model.specs().len()))
}
