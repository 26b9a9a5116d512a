//! The recorded pass that training and scoring replay: inputs -> loss, with the state in and out
//! where it is carried from batch to batch.
//!
//! A carried state enters a batch as a constant, by rule: it is an input of the tape that has no
//! gradient. So back-propagation through a stream is truncated at the batches' borders, and a
//! stream of any length takes the memory of one batch.

use super::interface::{Inputs, Model};
use super::runner::Logits;
use crate::data::Batch;
#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaExecutor, CudaParameters, CudaTensors, launch::Queue};
use crate::engine::executor::Culprit;
use crate::engine::operation::Element;
use crate::engine::{Device, Gradients, Ids, Mode, OperationTime, Program, Shape, Tape, Values, Var};
#[cfg(feature = "cuda")]
use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::nn::Context;

/// What the state does between batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carry {
    /// Every batch starts from an empty state; no marks within.
    Fresh,
    /// Every batch starts from an empty state, documents begin and end within.
    Marked,
    /// The state is carried from one batch to the next; gradients are not.
    Carried,
}

/// A replayable pass for one batch shape.
#[derive(Debug)]
pub struct Objective<T> {
    program: Program<T>,
    mode: Mode,
    carry: Carry,
    shape: [usize; 2],
    kind: Inputs,
    inputs: Ids,
    targets: Ids,
    /// Integers of the inputs and of the targets.
    lengths: [usize; 2],
    marks: Option<Ids>,
    seed: Ids,
    scale: Var,
    /// Shapes of the carried state.
    layout: Vec<Shape>,
    before: Vec<Var>,
    after: Vec<Var>,
    loss: Var,
    losses: Var,
}

impl<T: Element> Objective<T> {
    /// Records the pass for batches of `shape` (sequences, places), to be run on `device`.
    ///
    /// # Errors
    /// When shapes do not fit, or a GPU's memory runs out.
    pub fn new(
        model: &dyn Model,
        mode: Mode,
        shape: [usize; 2],
        carry: Carry,
        device: &Device,
    ) -> Result<Objective<T>> {
        if let Some(most) = model.most_tokens() {
            if carry == Carry::Carried {
                return Err(Error::config(
                    "the model has learned positions, which end, so that its state cannot be carried from \
                     batch to batch",
                )
                .hint("read windows or documents, or use model.transformer.positions: rotary"));
            }
            check_length(shape[1], most)?;
        }
        let mut tape = Tape::new(mode);
        let count = shape[0] * shape[1];
        let kind = model.inputs();
        let lengths = [count * kind.width(), model.target_len(shape)];
        let (inputs, targets, seed) = (tape.ids(lengths[0]), tape.ids(lengths[1]), tape.ids(4));
        let marks = (carry != Carry::Fresh).then(|| tape.ids(count));
        let scale = tape.input([1]);
        let layout = if carry == Carry::Carried { model.state_layout(shape[0]) } else { Vec::new() };
        let before: Vec<Var> = layout.iter().map(|(_, shape)| tape.input(shape.dims())).collect();
        let mut context = Context::new(marks, Some(seed));
        let state = (carry == Carry::Carried).then_some(&before[..]);
        let (features, after) = model.features(&mut tape, inputs, shape, Logits::All, state, &mut context)?;
        let (loss, losses) = model.loss(&mut tape, features, targets, scale)?;
        tape.keep(loss);
        tape.keep(losses);
        tape.seed_gradient(loss);
        let after = if carry == Carry::Carried { after } else { Vec::new() };
        after.iter().for_each(|&var| tape.keep(var));
        let mut program = Program::new(tape, device)?;
        if mode == Mode::Train {
            program.set_seed(loss, &[T::ONE])?;
        }
        Ok(Objective {
            program,
            mode,
            carry,
            shape,
            kind,
            inputs,
            targets,
            lengths,
            marks,
            seed,
            scale,
            layout: layout.into_iter().map(|(_, shape)| shape).collect(),
            before,
            after,
            loss,
            losses,
        })
    }

    /// Sequences and tokens of a batch.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Records the pass anew for batches of another shape; a state is carried on if the number
    /// of sequences stays.
    ///
    /// # Errors
    /// As [`new`](Objective::new).
    pub fn reshape(&mut self, model: &dyn Model, shape: [usize; 2], device: &Device) -> Result<()> {
        let state = if shape[0] == self.shape[0] { Some(self.state()?) } else { None };
        *self = Objective::new(model, self.mode, shape, self.carry, device)?;
        state.map_or(Ok(()), |state| self.set_state(&state))
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        self.program.bytes()
    }

    /// What dropout counts from.
    ///
    /// # Errors
    /// When a copy to a GPU fails.
    pub fn set_seed(&mut self, seed: u64, step: u64, micro_batch: u32) -> Result<()> {
        let values = [seed as u32, (seed >> 32) as u32, step as u32, micro_batch];
        self.program.set_ids(self.seed, &values)
    }

    /// What the sum of the losses is multiplied by.
    ///
    /// # Errors
    /// When a copy to a GPU fails.
    pub fn set_scale(&mut self, scale: f64) -> Result<()> {
        self.program.set_input(self.scale, &[T::from_f64(scale)])
    }

    /// Sets inputs, targets and marks.
    ///
    /// # Errors
    /// When the batch has another shape, or inputs that the model cannot read.
    pub fn set_batch(&mut self, batch: &Batch) -> Result<()> {
        if [batch.batch_size, batch.length] != self.shape {
            return Err(Error::shape(format!(
                "a batch of {}x{} for a pass recorded for {}x{}",
                batch.batch_size, batch.length, self.shape[0], self.shape[1]
            )));
        }
        let found = [batch.inputs.len(), batch.targets.len()];
        if found != self.lengths {
            return Err(Error::shape(format!(
                "a batch of {} inputs and {} targets for a model that has {} and {}",
                found[0], found[1], self.lengths[0], self.lengths[1]
            )));
        }
        self.kind.check(&batch.inputs)?;
        self.program.set_ids(self.inputs, &batch.inputs)?;
        self.program.set_ids(self.targets, &batch.targets)?;
        self.marks.map_or(Ok(()), |marks| self.program.set_ids(marks, &batch.marks))
    }

    /// Runs forward on a batch; returns the sum of the losses times `scale`.
    ///
    /// # Errors
    /// When the batch has another shape, or inputs that the model cannot read, or a GPU fails.
    pub fn forward<'a>(
        &mut self,
        parameters: impl Into<Values<'a, T>>,
        batch: &Batch,
        scale: f64,
    ) -> Result<f64>
    where
        T: 'a,
    {
        self.set_batch(batch)?;
        self.set_scale(scale)?;
        self.program.forward(parameters)?;
        Ok(self.program.value(self.loss)?[0].to_f64())
    }

    /// Runs backward after forward, adding to `gradients`.
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn backward<'a>(
        &mut self,
        parameters: impl Into<Values<'a, T>>,
        gradients: impl Into<Gradients<'a, T>>,
    ) -> Result<()>
    where
        T: 'a,
    {
        self.program.backward(parameters, gradients)
    }

    /// The loss of every output of the last batch, such as of every token in nats; 0 where it has
    /// no target.
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn losses(&self) -> Result<Vec<T>> {
        self.program.value(self.losses)
    }

    /// Makes the state after the last batch the state before the next.
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn carry_state(&mut self) -> Result<()> {
        self.after
            .iter()
            .zip(&self.before)
            .try_for_each(|(&after, &before)| self.program.feed_back(after, before))
    }

    /// Makes an empty state the state before the next batch.
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn clear_state(&mut self) -> Result<()> {
        self.set_state(&self.layout.iter().map(|shape| vec![T::ZERO; shape.len()]).collect::<Vec<_>>())
    }

    /// The state before the next batch, part by part.
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn state(&self) -> Result<Vec<Vec<T>>> {
        self.before.iter().map(|&var| self.program.value(var)).collect()
    }

    /// Sets the state before the next batch.
    ///
    /// # Errors
    /// When it is of another model or batch size, or a GPU fails.
    pub fn set_state(&mut self, state: &[Vec<T>]) -> Result<()> {
        let fits = state.len() == self.layout.len()
            && state.iter().zip(&self.layout).all(|(part, shape)| part.len() == shape.len());
        if !fits {
            return Err(Error::checkpoint("the carried state belongs to another model or batch size"));
        }
        state.iter().zip(&self.before).try_for_each(|(part, &var)| self.program.set_input(var, part))
    }

    /// Runs the last batch again node by node; returns the time of each operation.
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn profile<'a>(
        &mut self,
        parameters: impl Into<Values<'a, T>>,
        gradients: impl Into<Gradients<'a, T>>,
    ) -> Result<Vec<OperationTime>>
    where
        T: 'a,
    {
        self.program.profile(parameters, gradients)
    }

    /// After a pass that was not finite: the first operation to blame.
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn find_non_finite<'a>(
        &mut self,
        parameters: impl Into<Values<'a, T>>,
        gradients: impl Into<Gradients<'a, T>>,
    ) -> Result<Option<Culprit>>
    where
        T: 'a,
    {
        self.program.find_non_finite(parameters, gradients)
    }
}

/// What a learner on a GPU queues.
#[cfg(feature = "cuda")]
impl Objective<f32> {
    fn executor(&mut self) -> Result<&mut CudaExecutor> {
        match &mut self.program {
            Program::Cuda(executor) => Ok(executor),
            Program::Cpu(_) => Err(Error::new(ErrorKind::Device, "this pass is not on a GPU")),
        }
    }

    /// All integers as they have been set, in the executor's layout.
    pub(crate) fn staged_ids(&mut self) -> Result<&[u32]> {
        Ok(self.executor()?.staged_ids())
    }

    /// Queues the pass, forward and backward, over integers in the GPU's memory at `ids`, laid
    /// out as [`staged_ids`](Self::staged_ids); the loss goes to `loss`, the state is carried. In the
    /// `first` micro-batch of a step, gradients are written, not added to.
    pub(crate) fn queue(
        &mut self,
        parameters: &CudaParameters,
        gradients: &mut CudaTensors,
        (ids, loss): (u64, u64),
        first: bool,
    ) -> Result<()> {
        let var = self.loss;
        let executor = self.executor()?;
        executor.copy_ids(ids)?;
        executor.queue_forward(parameters)?;
        executor.queue_backward(parameters, gradients, first)?;
        executor.copy_value(var, loss)?;
        self.carry_state()
    }

    /// Clears the notes that [`find_non_finite`](Self::find_non_finite) reads.
    pub(crate) fn forget_non_finite(&mut self) -> Result<()> {
        self.executor()?.forget_non_finite()
    }

    /// Where the work is queued.
    pub(crate) fn work_queue(&mut self) -> Result<&Queue> {
        Ok(self.executor()?.queue())
    }
}

/// Refuses documents of more tokens than there are learned positions.
pub(super) fn check_length(tokens: usize, most: usize) -> Result<()> {
    if tokens > most {
        return Err(Error::config(format!(
            "{tokens} tokens are longer than the model's context of {most}, where its learned positions end"
        ))
        .hint("use shorter sequences (data.length in training), or model.transformer.positions: rotary"));
    }
    Ok(())
}
