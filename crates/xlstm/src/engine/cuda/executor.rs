//! Replays a tape on a GPU: the twin of [`Executor`](crate::engine::Executor).

use std::sync::Arc;
use std::time::Instant;

use super::context::{Buffer, Gpu, NAN};
use super::launch::{CudaBackward, CudaForward, Queue};
use super::parameters::{CudaParameters, CudaTensors};
use super::{Precision, from_bf16, to_bf16};
use crate::engine::operation::MAX_SLOTS;
use crate::engine::plan::Plan;
use crate::engine::tape::{Ids, Source, Tape, Var};
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
    queue: Queue,
}

impl CudaExecutor {
    /// Plans and allocates the buffers of `tape`.
    ///
    /// # Errors
    /// When memory runs out, or when the tape mixes types: an operation reads another's f32 where
    /// it wants elements, or the other way round.
    pub fn new(tape: Tape, precision: Precision, gpu: &Arc<Gpu>) -> Result<CudaExecutor> {
        let types = types(&tape, precision)?;
        let plan = Plan::new(&tape, |value| bytes_of(&tape, &types, value));
        let (offsets, bytes) = offsets(plan.slots.iter().copied());
        let (ids_offsets, ids_bytes) = self::offsets(tape.ids.iter().map(|len| len * 4));
        Ok(CudaExecutor {
            arena: Buffer::zeros(gpu, bytes)?,
            ids: Buffer::zeros(gpu, ids_bytes)?,
            queue: Queue::new(gpu, precision)?,
            tape,
            types,
            plan,
            offsets,
            ids_offsets,
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
        let gpu = self.queue.gpu();
        gpu.enter()?;
        gpu.upload(self.ids.pointer() + self.ids_offsets[ids.index()], values)
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

    /// Copies a kept value into an input of the same shape. (Not a swap, as on the CPU: a
    /// captured graph knows both by address.)
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

    /// Queues every node in order. `parameters` are those that the tape was recorded over.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    pub fn forward(&mut self, parameters: &CudaParameters) -> Result<()> {
        self.check(parameters)?;
        self.queue.gpu().enter()?;
        (0..self.tape.nodes.len()).try_for_each(|i| self.forward_node(i, parameters))
    }

    /// Queues every node backward, adding to `gradients`.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    pub fn backward(&mut self, parameters: &CudaParameters, gradients: &mut CudaTensors) -> Result<()> {
        self.check(parameters)?;
        self.queue.gpu().enter()?;
        (0..self.tape.nodes.len()).rev().try_for_each(|i| self.backward_node(i, parameters, gradients))
    }

    /// Runs forward and backward node by node, each waited for; returns the operations with
    /// their milliseconds forward and backward, the most expensive first. A wait costs some
    /// ten microseconds, which small operations show.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    pub fn profile(
        &mut self,
        parameters: &CudaParameters,
        gradients: &mut CudaTensors,
    ) -> Result<Vec<(&'static str, f64, f64)>> {
        let mut times: Vec<(&'static str, f64, f64)> = Vec::new();
        let nodes = self.tape.nodes.len();
        self.queue.gpu().synchronize()?;
        for (i, is_forward) in (0..nodes).map(|i| (i, true)).chain((0..nodes).rev().map(|i| (i, false))) {
            let start = Instant::now();
            if is_forward {
                self.forward_node(i, parameters)?;
            } else {
                self.backward_node(i, parameters, gradients)?;
            }
            self.queue.gpu().synchronize()?;
            let spent = start.elapsed().as_secs_f64() * 1e3;
            let name = self.tape.nodes[i].operation.name();
            let place = times.iter().position(|row| row.0 == name).unwrap_or_else(|| {
                times.push((name, 0.0, 0.0));
                times.len() - 1
            });
            if is_forward {
                times[place].1 += spent;
            } else {
                times[place].2 += spent;
            }
        }
        times.sort_by(|a, b| (b.1 + b.2).total_cmp(&(a.1 + a.2)));
        Ok(times)
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
        self.queue.restart();
        let mut io = CudaForward { inputs, outputs, ids, shapes: &node.shapes, queue: &mut self.queue };
        node.operation.forward_on_gpu(&mut io)
    }

    fn backward_node(
        &mut self,
        i: usize,
        parameters: &CudaParameters,
        gradients: &mut CudaTensors,
    ) -> Result<()> {
        for &var in &self.plan.first[i] {
            if let Some(slot) = self.plan.gradient[var] {
                self.queue.gpu().fill(self.slot(slot), 0, bytes_of(&self.tape, &self.types, var))?;
            }
        }
        let node = &self.tape.nodes[i];
        if node.outputs.iter().all(|v| self.plan.gradient[v.index()].is_none()) {
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
        self.queue.restart();
        let mut io = CudaBackward {
            inputs,
            outputs,
            output_gradients,
            input_gradients,
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
    use crate::ops::concat_linear::concat_linear;
    use crate::ops::linear::linear;

    #[test]
    fn values_are_stored_as_their_operations_say() -> Result<()> {
        let mut tape = Tape::new(Mode::Train);
        let (x, unread) = (tape.input([6, 8]), tape.input([3]));
        let weight = tape.parameter(0, 0, [8, 8].into());
        let y = linear(&mut tape, x, weight, None)?;
        let weight = tape.parameter(1, 0, [4, 16].into());
        let gate = concat_linear(&mut tape, &[x, y], weight, None)?;
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
