//! Replays a tape on a GPU: the twin of [`Executor`](crate::engine::Executor).

use std::sync::Arc;
use std::time::Instant;

use super::Precision;
use super::context::{Buffer, Gpu};
use super::launch::{CudaBackward, CudaForward, Queue};
use super::parameters::CudaTensors;
use crate::engine::operation::MAX_SLOTS;
use crate::engine::plan::Plan;
use crate::engine::tape::{Ids, Source, Tape, Var};
use crate::error::Result;

/// Slots start at multiples of this: what bulk copies and wide loads ask for.
const ALIGNMENT: usize = 1024;

/// A tape with its buffers on a GPU.
#[derive(Debug)]
pub struct CudaExecutor {
    tape: Tape,
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
    /// When memory runs out.
    pub fn new(tape: Tape, precision: Precision, gpu: &Arc<Gpu>) -> Result<CudaExecutor> {
        let plan = Plan::new(&tape, |value| value.shape.len() * precision.bytes());
        let (offsets, bytes) = offsets(plan.slots.iter().copied());
        let (ids_offsets, ids_bytes) = self::offsets(tape.ids.iter().map(|len| len * 4));
        Ok(CudaExecutor {
            arena: Buffer::zeros(gpu, bytes)?,
            ids: Buffer::zeros(gpu, ids_bytes)?,
            queue: Queue::new(gpu)?,
            tape,
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
                gpu.fill(self.slot(slot), 0x7fc0_0000, bytes)?;
            }
        }
        self.queue.poison()
    }

    /// Sets an input before a replay.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn set_input(&mut self, var: Var, values: &[f32]) -> Result<()> {
        debug_assert_eq!(values.len(), self.tape.shape(var).len());
        self.upload(self.value_pointer(var), values)
    }

    /// Sets integers before a replay.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn set_ids(&mut self, ids: Ids, values: &[u32]) -> Result<()> {
        debug_assert_eq!(values.len(), self.tape.ids[ids.index()]);
        self.upload(Some(self.ids.pointer() + self.ids_offsets[ids.index()]), values)
    }

    /// Sets the gradient that backward starts from, of a value marked by `seed_gradient`.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn set_seed(&mut self, var: Var, values: &[f32]) -> Result<()> {
        debug_assert_eq!(values.len(), self.tape.shape(var).len());
        self.upload(self.gradient_pointer(var), values)
    }

    fn upload<T: Copy>(&self, to: Option<u64>, values: &[T]) -> Result<()> {
        let gpu = self.queue.gpu();
        gpu.enter()?;
        to.map_or(Ok(()), |to| gpu.upload(to, values))
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
        let mut values = vec![0.0; self.tape.shape(var).len()];
        gpu.download(&mut values, from)?;
        Ok(values)
    }

    /// Copies a kept value into an input of the same shape. (Not a swap, as on the CPU: a
    /// captured graph knows both by address.)
    ///
    /// # Errors
    /// When the copy fails.
    pub fn feed_back(&mut self, value: Var, input: Var) -> Result<()> {
        debug_assert_eq!(self.tape.shape(value), self.tape.shape(input));
        let gpu = self.queue.gpu();
        gpu.enter()?;
        match (self.value_pointer(value), self.value_pointer(input)) {
            (Some(from), Some(to)) => gpu.copy(to, from, self.tape.shape(value).len() * 4),
            _ => Ok(()),
        }
    }

    /// Queues every node in order. `parameters` are those that the tape was recorded over.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    pub fn forward(&mut self, parameters: &CudaTensors) -> Result<()> {
        self.queue.gpu().enter()?;
        (0..self.tape.nodes.len()).try_for_each(|i| self.forward_node(i, parameters))
    }

    /// Queues every node backward, adding to `gradients`.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    pub fn backward(&mut self, parameters: &CudaTensors, gradients: &mut CudaTensors) -> Result<()> {
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
        parameters: &CudaTensors,
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

    fn forward_node(&mut self, i: usize, parameters: &CudaTensors) -> Result<()> {
        let node = &self.tape.nodes[i];
        let mut inputs = [None; MAX_SLOTS];
        let mut outputs = [0; MAX_SLOTS];
        for (input, var) in inputs.iter_mut().zip(&node.inputs) {
            *input = var.and_then(|var| self.read(var, parameters));
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
        parameters: &CudaTensors,
        gradients: &mut CudaTensors,
    ) -> Result<()> {
        for &var in &self.plan.first[i] {
            if let Some(slot) = self.plan.gradient[var] {
                self.queue.zero(self.slot(slot), self.tape.values[var].shape.len())?;
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
            if reads.inputs >> slot & 1 == 1 {
                inputs[slot] = self.read(var, parameters);
            }
            input_gradients[slot] = match self.tape.values[var.index()].source {
                Source::Parameter { index, offset } => Some(gradients.at(index, offset)),
                _ => self.gradient_pointer(var),
            };
        }
        for (slot, &var) in node.outputs.iter().enumerate() {
            if reads.outputs >> slot & 1 == 1 {
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

    fn read(&self, var: Var, parameters: &CudaTensors) -> Option<u64> {
        match self.tape.values[var.index()].source {
            Source::Parameter { index, offset } => Some(parameters.at(index, offset)),
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
