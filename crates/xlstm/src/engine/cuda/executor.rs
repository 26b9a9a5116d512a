//! Replays a tape on a GPU: the twin of [`Executor`](crate::engine::Executor).

use std::sync::Arc;

use super::compiler::Source as KernelSource;
use super::context::{Blocks, Buffer, Gpu, NAN, arguments};
use super::event::Event;
use super::few_rows::Next;
use super::graph::Graph;
use super::launch::{CudaBackward, CudaForward, Queue};
use super::parameters::{CudaParameters, CudaTensors};
use super::{Precision, from_bf16, to_bf16};
use crate::engine::executor::Culprit;
use crate::engine::operation::MAX_SLOTS;
use crate::engine::plan::Plan;
use crate::engine::profile::{OperationTime, Profile};
use crate::engine::tape::{Ids, Mode, Source, Tape, Var};
use crate::error::{Error, ErrorKind, Result};

/// Slots start at multiples of this: what bulk copies and wide loads ask for.
const ALIGNMENT: usize = 1024;

/// A tape with its buffers on a GPU.
#[derive(Debug)]
pub struct CudaExecutor {
    tape: Tape,
    /// What each value and its gradient are stored in.
    types: Vec<Precision>,
    plan: Plan,
    arena: Buffer,
    /// Where each slot of the plan starts in the arena.
    offsets: Vec<u64>,
    ids: Buffer,
    ids_offsets: Vec<u64>,
    /// The integers as the caller has set them, in the layout of `ids`.
    staged: Vec<u32>,
    /// Whether `ids` holds them.
    are_uploaded: bool,
    /// The forward pass, by which of two places the values that are fed back are in, with the
    /// parameters that it was captured over.
    graphs: [Graph; 2],
    is_swapped: bool,
    captured_over: (u64, Option<u64>),
    /// The inputs of each node whose gradients, of parameters, nothing has reached before it in backward
    /// and which it can write whole; and those parameters, first elements and numbers of elements.
    written: (Vec<u32>, Vec<(usize, usize, usize)>),
    notes: Notes,
    queue: Queue,
}

/// Where a replay in training notes that a number is not finite: at the end of every part of
/// the model, on its way forward and backward.
#[derive(Debug)]
struct Notes {
    /// Two a part: forward, backward.
    flags: Buffer,
    /// The last node of each part, and its first.
    ends: Vec<(usize, usize)>,
}

const NOTES: KernelSource = KernelSource::new("notes", include_str!("notes.cu"));

impl CudaExecutor {
    /// Plans and allocates the buffers of `tape`.
    ///
    /// # Errors
    /// When memory runs out, or when the tape mixes types: an operation reads another's f32 where
    /// it wants elements, or the other way round.
    pub fn new(tape: Tape, precision: Precision, gpu: &Arc<Gpu>) -> Result<CudaExecutor> {
        let types = types(&tape, precision)?;
        // In generation an operation may leave its work to the next, or to the one after that.
        let linger = if tape.mode() == Mode::Evaluate { 2 } else { 0 };
        let plan = Plan::new(&tape, |value| bytes_of(&tape, &types, value), linger);
        let (offsets, bytes) = offsets(plan.slots.iter().copied());
        let (ids_offsets, ids_bytes) = self::offsets(tape.ids.iter().map(|len| len * 4));
        let mut ends: Vec<(usize, usize)> = Vec::new();
        for (i, node) in tape.nodes.iter().enumerate() {
            match ends.last_mut() {
                Some((last, first)) if tape.nodes[*first].scope == node.scope => *last = i,
                _ => ends.push((i, i)),
            }
        }
        let written = written(&tape, &plan);
        Ok(CudaExecutor {
            arena: Buffer::zeros(gpu, bytes)?,
            ids: Buffer::zeros(gpu, ids_bytes)?,
            queue: Queue::new(gpu, precision)?,
            tape,
            types,
            plan,
            offsets,
            ids_offsets,
            staged: vec![0; ids_bytes / 4],
            are_uploaded: true,
            graphs: Default::default(),
            is_swapped: false,
            captured_over: (0, None),
            written,
            notes: Notes { flags: Buffer::zeros(gpu, ends.len() * 8)?, ends },
        })
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        self.arena.bytes() + self.ids.bytes() + self.queue.bytes()
    }

    /// The number of nodes on the tape.
    pub fn nodes(&self) -> usize {
        self.tape.nodes.len()
    }

    pub(crate) fn queue(&self) -> &Queue {
        &self.queue
    }

    fn slot(&self, slot: usize) -> u64 {
        self.arena.pointer() + self.offsets[slot]
    }

    fn value_pointer(&self, var: Var) -> Option<u64> {
        self.plan.value[var.index()].map(|slot| self.slot(slot))
    }

    fn gradient_pointer(&self, var: Var) -> Option<u64> {
        self.plan.gradient[var.index()].map(|slot| self.slot(slot))
    }

    /// Fills all work space and every slot that the caller does not own with NaN.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn poison(&mut self) -> Result<()> {
        let gpu = self.queue.gpu();
        gpu.enter()?;
        let values = &self.tape.values;
        let inputs = (0..values.len()).filter(|&v| values[v].source == Source::Input);
        let seeds = (0..values.len()).filter(|&v| values[v].seeded);
        let owned: Vec<usize> = inputs
            .filter_map(|v| self.plan.value[v])
            .chain(seeds.filter_map(|v| self.plan.gradient[v]))
            .collect();
        for (slot, &bytes) in self.plan.slots.iter().enumerate() {
            if !owned.contains(&slot) {
                gpu.fill(self.slot(slot), NAN, bytes)?;
            }
        }
        self.queue.poison()
    }

    /// Sets an input before a replay.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn set_input(&mut self, var: Var, values: &[f32]) -> Result<()> {
        self.upload(self.value_pointer(var), var, values)
    }

    /// Sets integers before a replay.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn set_ids(&mut self, ids: Ids, values: &[u32]) -> Result<()> {
        debug_assert_eq!(values.len(), self.tape.ids[ids.index()]);
        let first = self.ids_offsets[ids.index()] as usize / 4;
        self.staged[first..first + values.len()].copy_from_slice(values);
        self.are_uploaded = false;
        Ok(())
    }

    /// All integers as they have been set.
    pub(crate) fn staged_ids(&self) -> &[u32] {
        &self.staged
    }

    /// Queues a copy of all integers from the GPU's memory, where they lie as
    /// [`staged_ids`](Self::staged_ids) has them.
    pub(crate) fn copy_ids(&mut self, from: u64) -> Result<()> {
        self.are_uploaded = true;
        self.queue.gpu().copy(self.ids.pointer(), from, self.staged.len() * 4)
    }

    /// Queues a copy of a value that is f32 to elsewhere in the GPU's memory.
    pub(crate) fn copy_value(&self, var: Var, to: u64) -> Result<()> {
        debug_assert_eq!(self.types[var.index()], Precision::F32);
        let Some(from) = self.value_pointer(var) else { return Ok(()) };
        self.queue.gpu().copy(to, from, self.tape.shape(var).len() * 4)
    }

    /// Copies an input of another executor on the same GPU into one of this one.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn copy_input(&mut self, to: Var, other: &CudaExecutor, from: Var) -> Result<()> {
        debug_assert_eq!(self.tape.shape(to), other.tape.shape(from));
        debug_assert_eq!(self.types[to.index()], other.types[from.index()]);
        let gpu = self.queue.gpu();
        gpu.enter()?;
        match (other.value_pointer(from), self.value_pointer(to)) {
            (Some(from), Some(at)) => gpu.copy(at, from, bytes_of(&self.tape, &self.types, to.index())),
            _ => Ok(()),
        }
    }

    /// Sets the gradient that backward starts from, of a value marked by `seed_gradient`.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn set_seed(&mut self, var: Var, values: &[f32]) -> Result<()> {
        self.upload(self.gradient_pointer(var), var, values)
    }

    fn upload(&self, to: Option<u64>, var: Var, values: &[f32]) -> Result<()> {
        debug_assert_eq!(values.len(), self.tape.shape(var).len());
        let Some(to) = to else { return Ok(()) };
        let gpu = self.queue.gpu();
        gpu.enter()?;
        match self.types[var.index()] {
            Precision::F32 => gpu.upload(to, values),
            Precision::Bf16 => gpu.upload(to, &values.iter().map(|x| to_bf16(*x)).collect::<Vec<_>>()),
        }
    }

    /// A kept value or an input, after a replay.
    ///
    /// # Errors
    /// When the copy, or work before it, fails.
    pub fn value(&self, var: Var) -> Result<Vec<f32>> {
        self.download(self.value_pointer(var), var)
    }

    /// The gradient of an input, after backward. Empty where no gradient flows.
    ///
    /// # Errors
    /// When the copy, or work before it, fails.
    pub fn gradient(&self, var: Var) -> Result<Vec<f32>> {
        self.download(self.gradient_pointer(var), var)
    }

    fn download(&self, from: Option<u64>, var: Var) -> Result<Vec<f32>> {
        let Some(from) = from else { return Ok(Vec::new()) };
        let gpu = self.queue.gpu();
        gpu.enter()?;
        let len = self.tape.shape(var).len();
        match self.types[var.index()] {
            Precision::F32 => {
                let mut values = vec![0.0; len];
                gpu.download(&mut values, from)?;
                Ok(values)
            }
            Precision::Bf16 => {
                let mut values = vec![0; len];
                gpu.download(&mut values, from)?;
                Ok(values.into_iter().map(from_bf16).collect())
            }
        }
    }

    /// Copies a kept value into an input of the same shape. (Not a swap, as on the CPU and in
    /// [`forward`](Self::forward): a captured step knows both by address.)
    ///
    /// # Errors
    /// When the copy fails.
    pub fn feed_back(&mut self, value: Var, input: Var) -> Result<()> {
        debug_assert_eq!(self.tape.shape(value), self.tape.shape(input));
        debug_assert_eq!(self.types[value.index()], self.types[input.index()]);
        let gpu = self.queue.gpu();
        gpu.enter()?;
        match (self.value_pointer(value), self.value_pointer(input)) {
            (Some(from), Some(to)) => {
                gpu.copy(to, from, self.tape.shape(value).len() * self.types[value.index()].bytes())
            }
            _ => Ok(()),
        }
    }

    /// Exchanges the places of a kept value and of the input that it becomes.
    fn swap(&mut self, value: Var, input: Var) {
        debug_assert_eq!(self.tape.shape(value), self.tape.shape(input));
        debug_assert_eq!(self.types[value.index()], self.types[input.index()]);
        if let (Some(a), Some(b)) = (self.plan.value[value.index()], self.plan.value[input.index()]) {
            self.offsets.swap(a, b);
        }
    }

    /// Runs every node in order, and then makes the first value of each pair in `fed` the next
    /// replay's input that the second one is; from the second time on as one graph.
    /// `parameters` are those that the tape was recorded over, `fed` is always the same.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    pub fn forward(&mut self, parameters: &CudaParameters, fed: &[(Var, Var)]) -> Result<()> {
        let gpu = self.queue.gpu().clone();
        gpu.enter()?;
        if !self.are_uploaded {
            gpu.upload(self.ids.pointer(), &self.staged)?;
            self.are_uploaded = true;
        }
        let over = (parameters.masters(), parameters.copies());
        if self.captured_over != over {
            (self.graphs, self.captured_over) = (Default::default(), over);
        }
        // A graph knows by address what is swapped below: there are two.
        let which = usize::from(self.is_swapped);
        let mut graph = std::mem::take(&mut self.graphs[which]);
        let done = graph.run(&gpu, || self.queue_forward(parameters));
        self.graphs[which] = graph;
        done?;
        fed.iter().for_each(|&(value, input)| self.swap(value, input));
        self.is_swapped ^= !fed.is_empty();
        Ok(())
    }

    /// Queues every node in order, over the integers in the GPU's memory.
    pub(crate) fn queue_forward(&mut self, parameters: &CudaParameters) -> Result<()> {
        self.check(parameters)?;
        self.queue.gpu().enter()?;
        self.queue.forget_waiting();
        let training = self.tape.mode() == Mode::Train;
        let mut part = 0;
        for i in 0..self.tape.nodes.len() {
            self.forward_node(i, parameters)?;
            if self.notes.ends.get(part).is_some_and(|&(last, _)| last == i) {
                if training && let Some(&var) = self.tape.nodes[i].outputs.first() {
                    self.note(self.value_pointer(var), var, 2 * part)?;
                }
                part += 1;
            }
        }
        Ok(())
    }

    /// Notes in flag `flag` whether x, a value or gradient of `var`, is not finite.
    fn note(&self, x: Option<u64>, var: Var, flag: usize) -> Result<()> {
        let Some(x) = x else { return Ok(()) };
        let n = self.tape.shape(var).len();
        let blocks = n.div_ceil(256 * 16).clamp(1, 256);
        let arguments = arguments![x, n as u64, self.notes.flags.pointer() + 4 * flag as u64];
        let precision = self.types[var.index()];
        let gpu = self.queue.gpu();
        let blocks = Blocks { grid: [blocks, 1, 1], block: [256, 1], shared: 0, early: false };
        gpu.launch(&NOTES, precision, "note_non_finite", &blocks, arguments)
    }

    /// Forgets the notes of earlier replays.
    pub(crate) fn forget_non_finite(&self) -> Result<()> {
        self.queue.gpu().fill(self.notes.flags.pointer(), 0, self.notes.ends.len() * 8)
    }

    /// The first part of the model that replays in training have noted a number in that is not
    /// finite.
    ///
    /// # Errors
    /// When the copy, or work before it, fails.
    pub fn find_non_finite(&self) -> Result<Option<Culprit>> {
        let gpu = self.queue.gpu();
        gpu.enter()?;
        let mut flags = vec![0u32; 2 * self.notes.ends.len()];
        gpu.download(&mut flags, self.notes.flags.pointer())?;
        let forward = (0..self.notes.ends.len()).find(|part| flags[2 * part] != 0);
        let backward = (0..self.notes.ends.len()).rev().find(|part| flags[2 * part + 1] != 0);
        Ok(forward.or(backward).map(|part| Culprit {
            scope: self.tape.scopes[self.tape.nodes[self.notes.ends[part].0].scope].clone(),
            operation: None,
            backward: forward.is_none(),
        }))
    }

    /// Queues every node backward, adding to `gradients`.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    pub fn backward(&mut self, parameters: &CudaParameters, gradients: &mut CudaTensors) -> Result<()> {
        self.queue_backward(parameters, gradients, false)
    }

    /// As [`backward`](Self::backward); with `first`, what `gradients` hold is arbitrary and is lost. Most
    /// are then written whole, which spares clearing and reading them.
    pub(crate) fn queue_backward(
        &mut self,
        parameters: &CudaParameters,
        gradients: &mut CudaTensors,
        first: bool,
    ) -> Result<()> {
        self.check(parameters)?;
        self.queue.gpu().enter()?;
        if first {
            gradients.clear_outside(&self.written.1)?;
        }
        let mut part = self.notes.ends.len();
        for i in (0..self.tape.nodes.len()).rev() {
            self.backward_node(i, parameters, gradients, first)?;
            if part > 0 && self.notes.ends[part - 1].1 == i {
                part -= 1;
                if let Some(Some(var)) = self.tape.nodes[i].inputs.first().copied() {
                    self.note(self.gradient_pointer(var), var, 2 * part + 1)?;
                }
            }
        }
        Ok(())
    }

    /// Runs forward and backward node by node, with a mark behind each; returns the time of each
    /// operation on the GPU, the most expensive first. Where the host launches more slowly than the
    /// GPU works, that is in it.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    pub fn profile(
        &mut self,
        parameters: &CudaParameters,
        gradients: &mut CudaTensors,
    ) -> Result<Vec<OperationTime>> {
        let gpu = self.queue.gpu().clone();
        gpu.enter()?;
        let count = self.tape.nodes.len();
        let order = || (0..count).map(|i| (i, true)).chain((0..count).rev().map(|i| (i, false)));
        let marks = (0..2 * count + 1).map(|_| Event::new()).collect::<Result<Vec<_>>>()?;
        marks[0].record(&gpu)?;
        for ((i, is_forward), mark) in order().zip(&marks[1..]) {
            if is_forward {
                self.forward_node(i, parameters)?;
            } else {
                self.backward_node(i, parameters, gradients, true)?;
            }
            mark.record(&gpu)?;
        }
        gpu.synchronize()?;
        let mut profile = Profile::default();
        for ((i, is_forward), pair) in order().zip(marks.windows(2)) {
            let spent = f64::from(pair[1].since(&pair[0])?);
            profile.add(self.tape.nodes[i].operation.name(), is_forward, spent);
        }
        Ok(profile.finish())
    }

    fn check(&self, parameters: &CudaParameters) -> Result<()> {
        let (wanted, given) = (self.queue.precision(), parameters.precision());
        if wanted != given {
            let message = format!("a tape in {wanted:?} is given parameters in {given:?}");
            return Err(Error::new(ErrorKind::Device, message));
        }
        Ok(())
    }

    fn forward_node(&mut self, i: usize, parameters: &CudaParameters) -> Result<()> {
        let node = &self.tape.nodes[i];
        let mut inputs = [None; MAX_SLOTS];
        let mut outputs = [0; MAX_SLOTS];
        for (slot, var) in node.inputs.iter().enumerate() {
            inputs[slot] = var.and_then(|var| self.read(i, slot, var, parameters));
        }
        for (output, &var) in outputs.iter_mut().zip(&node.outputs) {
            *output = self.value_pointer(var).unwrap_or(0);
        }
        let ids = self.ids_of(i);
        self.queue.restart()?;
        let next = self.next(i);
        let mut io = CudaForward { inputs, outputs, ids, shapes: &node.shapes, next, queue: &mut self.queue };
        node.operation.forward_on_gpu(&mut io)
    }

    /// What follows node `i`.
    fn next(&self, i: usize) -> Next {
        let (node, next) = (&self.tape.nodes[i], self.tape.nodes.get(i + 1));
        let Some(next) = next.filter(|next| next.operation.multiplies()) else { return Next::Other };
        match (self.tape.mode(), next.inputs[0]) {
            (Mode::Train, _) | (_, None) => Next::Other,
            (Mode::Evaluate, rows) if rows == node.outputs.first().copied() => Next::MultipliesOutput,
            (Mode::Evaluate, rows) if rows == node.inputs[0] => Next::MultipliesInput,
            _ => Next::Other,
        }
    }

    fn backward_node(
        &mut self,
        i: usize,
        parameters: &CudaParameters,
        gradients: &mut CudaTensors,
        first: bool,
    ) -> Result<()> {
        let node = &self.tape.nodes[i];
        let reached = node.outputs.iter().any(|v| self.plan.gradient[v.index()].is_some());
        let overwritten = node.operation.overwrites();
        let mut fresh = if first { self.written.0[i] } else { 0 };
        for &var in &self.plan.first[i] {
            let at = node.inputs.iter().position(|input| input.is_some_and(|input| input.index() == var));
            if let Some(at) = at.filter(|&at| reached && overwritten.input(at)) {
                fresh |= 1 << at;
            } else if let Some(slot) = self.plan.gradient[var] {
                self.queue.gpu().fill(self.slot(slot), 0, bytes_of(&self.tape, &self.types, var))?;
            }
        }
        if !reached {
            return Ok(());
        }
        let reads = node.operation.reads();
        let (mut inputs, mut input_gradients) = ([None; MAX_SLOTS], [None; MAX_SLOTS]);
        let (mut outputs, mut output_gradients) = ([0; MAX_SLOTS], [None; MAX_SLOTS]);
        for (slot, var) in node.inputs.iter().enumerate() {
            let Some(var) = *var else { continue };
            if reads.input(slot) {
                inputs[slot] = self.read(i, slot, var, parameters);
            }
            input_gradients[slot] = match self.tape.values[var.index()].source {
                Source::Parameter { index, offset } => Some(gradients.at(index, offset)),
                _ => self.gradient_pointer(var),
            };
        }
        for (slot, &var) in node.outputs.iter().enumerate() {
            if reads.output(slot) {
                outputs[slot] = self.value_pointer(var).unwrap_or(0);
            }
            output_gradients[slot] = self.gradient_pointer(var);
        }
        let ids = self.ids_of(i);
        self.queue.restart()?;
        let mut io = CudaBackward {
            inputs,
            outputs,
            output_gradients,
            input_gradients,
            fresh,
            ids,
            shapes: &node.shapes,
            queue: &mut self.queue,
        };
        node.operation.backward_on_gpu(&mut io)
    }

    /// Where node `node` finds input `slot`, which is `var`.
    fn read(&self, node: usize, slot: usize, var: Var, parameters: &CudaParameters) -> Option<u64> {
        match self.tape.values[var.index()].source {
            Source::Parameter { index, offset } => {
                let full = self.tape.nodes[node].operation.full_precision().input(slot);
                Some(parameters.at(index, offset, full))
            }
            _ => self.value_pointer(var),
        }
    }

    fn ids_of(&self, node: usize) -> [u64; 3] {
        let mut ids = [0; 3];
        for (to, var) in ids.iter_mut().zip(&self.tape.nodes[node].ids) {
            *to = self.ids.pointer() + self.ids_offsets[var.index()];
        }
        ids
    }
}

/// See [`CudaExecutor`]'s field.
fn written(tape: &Tape, plan: &Plan) -> (Vec<u32>, Vec<(usize, usize, usize)>) {
    let (mut slots, mut pieces) = (vec![0; tape.nodes.len()], Vec::new());
    let mut reached: Vec<(usize, usize, usize)> = Vec::new();
    for (i, node) in tape.nodes.iter().enumerate().rev() {
        if node.outputs.iter().all(|v| plan.gradient[v.index()].is_none()) {
            continue;
        }
        let overwrites = node.operation.overwrites();
        for (slot, var) in node.inputs.iter().enumerate() {
            let Some(value) = var.map(|var| &tape.values[var.index()]) else { continue };
            let Source::Parameter { index, offset } = value.source else { continue };
            let piece = (index, offset, value.shape.len());
            let overlaps = |&(other, start, n): &(usize, usize, usize)| {
                other == index && start < offset + piece.2 && offset < start + n
            };
            if overwrites.input(slot) && !reached.iter().any(overlaps) {
                slots[i] |= 1 << slot;
                pieces.push(piece);
            }
            reached.push(piece);
        }
    }
    (slots, pieces)
}

/// Bytes of a value or its gradient; whole words, since memory is filled by words.
fn bytes_of(tape: &Tape, types: &[Precision], value: usize) -> usize {
    (tape.values[value].shape.len() * types[value].bytes()).next_multiple_of(4)
}

/// What each value is stored in: as the node that writes it says, inputs as their first reader
/// says. (Of a parameter there are both: each node reads the one that it says.)
fn types(tape: &Tape, precision: Precision) -> Result<Vec<Precision>> {
    let of = |full: bool| if full { Precision::F32 } else { precision };
    let mut types: Vec<Option<Precision>> = vec![None; tape.values.len()];
    for node in &tape.nodes {
        let full = node.operation.full_precision();
        let fault = |slot: usize, what: &str| {
            let (name, scope) = (node.operation.name(), &tape.scopes[node.scope]);
            Err(Error::new(
                ErrorKind::Device,
                format!("input {slot} of {name} in {scope} {what}: a mistake in the model's code"),
            ))
        };
        for (slot, var) in node.inputs.iter().enumerate() {
            let Some(var) = var else { continue };
            let wanted = of(full.input(slot));
            if matches!(tape.values[var.index()].source, Source::Parameter { .. }) {
                continue;
            }
            if wanted != Precision::F32 && node.operation.weights() >> slot & 1 == 1 {
                return fault(slot, "is a weight, but no parameter");
            }
            let found = *types[var.index()].get_or_insert(wanted);
            if found != wanted {
                return fault(slot, &format!("is stored in {found:?}, not in {wanted:?}"));
            }
        }
        for (slot, var) in node.outputs.iter().enumerate() {
            types[var.index()] = Some(of(full.output(slot)));
        }
    }
    // Nobody reads the rest.
    Ok(types.into_iter().map(|found| found.unwrap_or(Precision::F32)).collect())
}

/// Where parts of these sizes start, each aligned, and their size in all.
fn offsets(sizes: impl Iterator<Item = usize>) -> (Vec<u64>, usize) {
    let mut total = 0;
    let offsets = sizes.map(|size| {
        let offset = total as u64;
        total += size.next_multiple_of(ALIGNMENT);
        offset
    });
    (offsets.collect(), total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Mode;
    use crate::ops::add::add;
    use crate::ops::embedding::embedding;
    use crate::ops::gates::gates;
    use crate::ops::linear::linear;

    #[test]
    fn values_are_stored_as_their_operations_say() -> Result<()> {
        let mut tape = Tape::new(Mode::Train);
        let (x, unread) = (tape.input([6, 8]), tape.input([3]));
        let weight = tape.parameter(0, 0, [8, 8].into());
        let y = linear(&mut tape, x, weight, None)?;
        let maps = [1, 2].map(|index| (tape.parameter(index, 0, [4, 8].into()), None));
        let [gate, _] = gates(&mut tape, y, maps, None)?;
        let found = types(&tape, Precision::Bf16)?;
        let of = |var: Var| found[var.index()];
        assert_eq!([x, y].map(of), [Precision::Bf16; 2]);
        assert_eq!([gate, unread].map(of), [Precision::F32; 2]);
        assert!(types(&tape, Precision::F32)?.iter().all(|found| *found == Precision::F32));

        // A gate is no activation.
        let other = tape.input([6, 4]);
        add(&mut tape, gate, other)?;
        let message = types(&tape, Precision::Bf16).expect_err("f32 read as bf16").to_string();
        assert!(message.contains("input 0 of add") && message.contains("F32, not in Bf16"), "{message}");
        assert!(types(&tape, Precision::F32).is_ok());
        Ok(())
    }

    /// A tied embedding is reached by the head first, which writes it whole; rows of one parameter each
    /// count for themselves, and a second reader of them adds.
    #[test]
    fn first_gradients_of_parameters() -> Result<()> {
        let mut tape = Tape::new(Mode::Train);
        let ids = tape.ids(6);
        let tied = tape.parameter(0, 0, [9, 8].into());
        let x = embedding(&mut tape, ids, tied, [2, 3])?;
        let mut rows = [x; 2];
        for (y, row) in rows.iter_mut().zip([0, 4]) {
            let weight = tape.parameter(1, row * 8, [4, 8].into());
            *y = linear(&mut tape, x, weight, None)?;
        }
        let again = tape.parameter(1, 0, [8, 8].into());
        let y = linear(&mut tape, x, again, None)?;
        let tied = tape.parameter(0, 0, [9, 8].into());
        let z = linear(&mut tape, y, tied, None)?;
        for y in [z, rows[0], rows[1]] {
            tape.seed_gradient(y);
        }
        let plan = Plan::new(&tape, |value| tape.values[value].shape.len(), 0);
        let (slots, pieces) = written(&tape, &plan);
        assert_eq!(slots, [0, 0, 0, 1 << 1, 1 << 1]);
        assert_eq!(pieces, [(0, 0, 72), (1, 0, 64)]);
        Ok(())
    }

    #[test]
    fn weights_in_bf16_are_parameters() -> Result<()> {
        let mut tape = Tape::new(Mode::Train);
        let (x, weight) = (tape.input([6, 8]), tape.input([8, 8]));
        linear(&mut tape, x, weight, None)?;
        assert!(types(&tape, Precision::F32).is_ok());
        let message = types(&tape, Precision::Bf16).expect_err("no parameter").to_string();
        assert!(message.contains("input 1 of linear"), "{message}");
        Ok(())
    }
}
