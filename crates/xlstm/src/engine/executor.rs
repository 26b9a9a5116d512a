//! Replays a tape on the CPU: forward, backward, and the search for the first number
//! that is not finite.

use std::time::Instant;

use super::operation::{Backward, Element, Forward, Gradient, MAX_SLOTS};
use super::plan::Plan;
use super::precision::Precision;
use super::profile::{OperationTime, Profile};
use super::stored::{Slice, Stored};
use super::tape::{Ids, Source, Tape, Var};

/// A tape with its buffers. Replaying keeps no new memory once the work space has grown; the
/// packing buffers of a matrix product live as long as the product.
#[derive(Debug)]
pub struct Executor<T> {
    tape: Tape,
    plan: Plan,
    precision: Precision,
    slots: Vec<Vec<T>>,
    ids: Vec<Vec<u32>>,
    scratch: Vec<T>,
}

/// The first operation of a replay whose result is not finite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Culprit {
    /// The model part, such as "blocks.3".
    pub scope: String,
    /// The operation in it, where that is known.
    pub operation: Option<&'static str>,
    /// Whether the gradient, not the value, is at fault.
    pub backward: bool,
}

impl<T: Element> Executor<T> {
    /// Plans and allocates the buffers of `tape`, to be replayed in full precision.
    pub fn new(tape: Tape) -> Executor<T> {
        Executor::with_precision(tape, Precision::F32)
    }

    /// The same, with products of f32 numbers in `precision`.
    pub fn with_precision(tape: Tape, precision: Precision) -> Executor<T> {
        let plan = Plan::new(&tape, |value| tape.values[value].shape.len(), 0);
        let slots = plan.slots.iter().map(|&len| vec![T::ZERO; len]).collect();
        let ids = tape.ids.iter().map(|&len| vec![0; len]).collect();
        Executor { tape, plan, precision, slots, ids, scratch: Vec::new() }
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        let floats: usize = self.slots.iter().map(Vec::len).sum::<usize>() + self.scratch.len();
        floats * size_of::<T>() + self.ids.iter().map(Vec::len).sum::<usize>() * 4
    }

    /// Fills every slot that the caller does not own with NaN: a test that an operation
    /// reads nothing that has not been written.
    pub fn poison(&mut self) {
        let owned: Vec<usize> = (0..self.tape.values.len())
            .filter(|&v| self.tape.values[v].source == Source::Input)
            .filter_map(|v| self.plan.value[v])
            .chain(
                (0..self.tape.values.len())
                    .filter(|&v| self.tape.values[v].seeded)
                    .filter_map(|v| self.plan.gradient[v]),
            )
            .collect();
        for (slot, data) in self.slots.iter_mut().enumerate() {
            if !owned.contains(&slot) {
                data.fill(T::NAN);
            }
        }
        self.scratch.fill(T::NAN);
    }

    /// An input, to be set before a replay.
    pub fn input_mut(&mut self, var: Var) -> &mut [T] {
        let len = self.tape.shape(var).len();
        match self.plan.value[var.index()] {
            Some(slot) => &mut self.slots[slot][..len],
            None => &mut [],
        }
    }

    /// Integers, to be set before a replay.
    pub fn ids_mut(&mut self, ids: Ids) -> &mut [u32] {
        &mut self.ids[ids.index()]
    }

    /// A kept value or an input, after a replay.
    pub fn value(&self, var: Var) -> &[T] {
        match self.plan.value[var.index()] {
            Some(slot) => &self.slots[slot][..self.tape.shape(var).len()],
            None => &[],
        }
    }

    /// The gradient of an input, after backward; or of a seeded value, to be set before.
    /// Empty where no gradient flows.
    pub fn gradient(&self, var: Var) -> &[T] {
        match self.plan.gradient[var.index()] {
            Some(slot) => &self.slots[slot][..self.tape.shape(var).len()],
            None => &[],
        }
    }

    /// The gradient that backward starts from, of a value marked by `seed_gradient`.
    pub fn seed_mut(&mut self, var: Var) -> &mut [T] {
        let len = self.tape.shape(var).len();
        match self.plan.gradient[var.index()] {
            Some(slot) => &mut self.slots[slot][..len],
            None => &mut [],
        }
    }

    /// Moves a kept value into an input of the same shape without a copy; the value's
    /// buffer then holds what the input was.
    pub fn feed_back(&mut self, value: Var, input: Var) {
        debug_assert_eq!(self.tape.shape(value), self.tape.shape(input));
        if let (Some(a), Some(b)) = (self.plan.value[value.index()], self.plan.value[input.index()]) {
            self.slots.swap(a, b);
        }
    }

    /// Runs every node in order. `parameters` are those that the tape was recorded over.
    pub fn forward(&mut self, parameters: &[Vec<T>]) {
        for i in 0..self.tape.nodes.len() {
            self.forward_node(i, Reads::Plain(parameters));
        }
    }

    /// The same with stored parameters; those in fewer bits are such as
    /// [`storable_parameters`](Tape::storable_parameters) allows.
    pub fn forward_stored(&mut self, parameters: &[Stored<T>]) {
        for i in 0..self.tape.nodes.len() {
            self.forward_node(i, Reads::Stored(parameters));
        }
    }

    /// Runs every node backward, adding to `gradients`, one buffer a parameter.
    pub fn backward(&mut self, parameters: &[Vec<T>], gradients: &mut [Vec<T>]) {
        for i in (0..self.tape.nodes.len()).rev() {
            self.backward_node(i, parameters, gradients);
        }
    }

    /// Replays forward and backward node by node; returns the time of each operation, the most
    /// expensive first.
    pub fn profile(&mut self, parameters: &[Vec<T>], gradients: &mut [Vec<T>]) -> Vec<OperationTime> {
        let mut profile = Profile::default();
        let nodes = self.tape.nodes.len();
        for (i, is_forward) in (0..nodes).map(|i| (i, true)).chain((0..nodes).rev().map(|i| (i, false))) {
            let start = Instant::now();
            if is_forward {
                self.forward_node(i, Reads::Plain(parameters));
            } else {
                self.backward_node(i, parameters, gradients);
            }
            let spent = start.elapsed().as_secs_f64() * 1e3;
            profile.add(self.tape.nodes[i].operation.name(), is_forward, spent);
        }
        profile.finish()
    }

    /// Replays forward (and backward, when `gradients` is given) and names the first node
    /// that makes a number that is not finite.
    pub fn find_non_finite(
        &mut self,
        parameters: &[Vec<T>],
        gradients: Option<&mut [Vec<T>]>,
    ) -> Option<Culprit> {
        let culprit = |tape: &Tape, i: usize, backward| Culprit {
            scope: tape.scopes[tape.nodes[i].scope].clone(),
            operation: Some(tape.nodes[i].operation.name()),
            backward,
        };
        for i in 0..self.tape.nodes.len() {
            self.forward_node(i, Reads::Plain(parameters));
            if self.tape.nodes[i].outputs.iter().any(|&v| !all_finite(self.value(v))) {
                return Some(culprit(&self.tape, i, false));
            }
        }
        let gradients = gradients?;
        for i in (0..self.tape.nodes.len()).rev() {
            self.backward_node(i, parameters, gradients);
            let bad = self.tape.nodes[i].inputs.iter().flatten().any(|&v| {
                match self.tape.values[v.index()].source {
                    Source::Parameter { index, .. } => !all_finite(&gradients[index]),
                    _ => !all_finite(self.gradient(v)),
                }
            });
            if bad {
                return Some(culprit(&self.tape, i, true));
            }
        }
        None
    }

    fn forward_node(&mut self, i: usize, parameters: Reads<'_, T>) {
        let node = &self.tape.nodes[i];
        let mut taken: [Vec<T>; MAX_SLOTS] = std::array::from_fn(|_| Vec::new());
        for (hold, var) in taken.iter_mut().zip(&node.outputs) {
            if let Some(slot) = self.plan.value[var.index()] {
                *hold = std::mem::take(&mut self.slots[slot]);
            }
        }
        let mut outputs = [const { None }; MAX_SLOTS];
        for ((out, hold), shape) in outputs.iter_mut().zip(taken.iter_mut()).zip(&node.shapes.outputs) {
            *out = Some(&mut hold[..shape.len()]);
        }
        let mut io = Forward {
            inputs: [None; MAX_SLOTS],
            narrow: [None; MAX_SLOTS],
            outputs,
            ids: [&[]; 3],
            shapes: &node.shapes,
            precision: self.precision,
            scratch: &mut self.scratch,
        };
        let places = |var: &Var| self.plan.value[var.index()];
        for (slot, var) in node.inputs.iter().enumerate() {
            // One that is updated has been taken.
            let updated = node.operation.updates().filter(|[from, _]| *from == slot);
            let is_taken =
                |var: &Var| updated.is_some_and(|[_, to]| places(var) == places(&node.outputs[to]));
            let var = var.filter(|var| !is_taken(var));
            match var.map(|v| read(&self.tape, &self.plan, &self.slots, parameters, v)) {
                Some(Slice::Wide(values)) => io.inputs[slot] = Some(values),
                Some(Slice::Narrow(values)) => io.narrow[slot] = Some(values),
                None => {}
            }
        }
        for (ids, var) in io.ids.iter_mut().zip(&node.ids) {
            *ids = &self.ids[var.index()];
        }
        T::forward(&*node.operation, &mut io);
        for (hold, var) in taken.iter_mut().zip(&node.outputs) {
            if let Some(slot) = self.plan.value[var.index()] {
                self.slots[slot] = std::mem::take(hold);
            }
        }
    }

    fn backward_node(&mut self, i: usize, parameters: &[Vec<T>], gradients: &mut [Vec<T>]) {
        let node = &self.tape.nodes[i];
        if node.outputs.iter().all(|v| self.plan.gradient[v.index()].is_none()) {
            for &var in &self.plan.first[i] {
                if let Some(slot) = self.plan.gradient[var] {
                    self.slots[slot].fill(T::ZERO);
                }
            }
            return;
        }
        // Take the gradients to be written out of their places, so that everything else
        // can be borrowed while they are.
        let mut taken: [Vec<T>; MAX_SLOTS] = std::array::from_fn(|_| Vec::new());
        for (hold, var) in taken.iter_mut().zip(&node.inputs) {
            let Some(var) = var else { continue };
            match (self.tape.values[var.index()].source, self.plan.gradient[var.index()]) {
                (Source::Parameter { index, .. }, _) => *hold = std::mem::take(&mut gradients[index]),
                (_, Some(slot)) => *hold = std::mem::take(&mut self.slots[slot]),
                _ => {}
            }
        }
        // Several inputs may be rows of one parameter, which the first of them holds then: parts are
        // cut off in the order in which they lie.
        let source = |slot: usize| node.inputs[slot].map(|var| self.tape.values[var.index()].source);
        let place = |slot: usize| match source(slot) {
            Some(Source::Parameter { index, offset }) => {
                let same =
                    |s: &usize| matches!(source(*s), Some(Source::Parameter { index: i, .. }) if i == index);
                ((0..slot).find(same).unwrap_or(slot), offset)
            }
            _ => (slot, 0),
        };
        let mut order: [usize; MAX_SLOTS] = std::array::from_fn(|slot| slot);
        let order = &mut order[..node.inputs.len()];
        order.sort_unstable_by_key(|&slot| place(slot));
        let mut input_gradients = [const { None }; MAX_SLOTS];
        let mut buffers = taken.each_mut().map(|hold| (&mut hold[..], 0));
        for &slot in &*order {
            let ((holder, offset), Some(var)) = (place(slot), node.inputs[slot]) else { continue };
            let (rest, position) = std::mem::take(&mut buffers[holder]);
            if rest.is_empty() {
                continue;
            }
            let len = self.tape.shape(var).len();
            let (part, rest) = rest[offset - position..].split_at_mut(len);
            buffers[holder] = (rest, offset + len);
            let first = self.plan.first[i].contains(&var.index());
            input_gradients[slot] = Some(Gradient::new(part, first));
        }
        let reads = node.operation.reads();
        let mut io = Backward {
            inputs: [None; MAX_SLOTS],
            outputs: [None; MAX_SLOTS],
            output_gradients: [None; MAX_SLOTS],
            input_gradients,
            ids: [&[]; 3],
            shapes: &node.shapes,
            precision: self.precision,
            scratch: &mut self.scratch,
        };
        for (slot, (input, var)) in io.inputs.iter_mut().zip(&node.inputs).enumerate() {
            if reads.input(slot) {
                *input = var.map(|v| wide(&self.tape, &self.plan, &self.slots, parameters, v));
            }
        }
        for (slot, var) in node.outputs.iter().enumerate() {
            if reads.output(slot) {
                io.outputs[slot] = Some(wide(&self.tape, &self.plan, &self.slots, parameters, *var));
            }
            io.output_gradients[slot] =
                self.plan.gradient[var.index()].map(|g| &self.slots[g][..node.shapes.outputs[slot].len()]);
        }
        for (ids, var) in io.ids.iter_mut().zip(&node.ids) {
            *ids = &self.ids[var.index()];
        }
        T::backward(&*node.operation, &mut io);
        // What the operation had nothing to add to.
        for gradient in io.input_gradients.iter_mut().filter_map(Option::take) {
            gradient.cleared();
        }
        for (hold, var) in taken.iter_mut().zip(&node.inputs).filter(|(hold, _)| !hold.is_empty()) {
            let Some(var) = var else { continue };
            match (self.tape.values[var.index()].source, self.plan.gradient[var.index()]) {
                (Source::Parameter { index, .. }, _) => gradients[index] = std::mem::take(hold),
                (_, Some(slot)) => self.slots[slot] = std::mem::take(hold),
                _ => {}
            }
        }
    }
}

/// The parameters that forward reads.
#[derive(Clone, Copy)]
enum Reads<'a, T> {
    Plain(&'a [Vec<T>]),
    Stored(&'a [Stored<T>]),
}

fn read<'a, T: Element>(
    tape: &Tape,
    plan: &Plan,
    slots: &'a [Vec<T>],
    parameters: Reads<'a, T>,
    var: Var,
) -> Slice<'a, T> {
    let value = &tape.values[var.index()];
    match (value.source, parameters) {
        (Source::Parameter { index, offset }, Reads::Stored(parameters)) => {
            parameters[index].slice(offset..offset + value.shape.len())
        }
        (_, Reads::Plain(parameters)) => Slice::Wide(wide(tape, plan, slots, parameters, var)),
        (_, Reads::Stored(_)) => Slice::Wide(wide(tape, plan, slots, &[], var)),
    }
}

fn wide<'a, T: Element>(
    tape: &Tape,
    plan: &Plan,
    slots: &'a [Vec<T>],
    parameters: &'a [Vec<T>],
    var: Var,
) -> &'a [T] {
    let value = &tape.values[var.index()];
    let len = value.shape.len();
    match (value.source, plan.value[var.index()]) {
        (Source::Parameter { index, offset }, _) => &parameters[index][offset..offset + len],
        (_, Some(slot)) => &slots[slot][..len],
        (_, None) => &[],
    }
}

fn all_finite<T: Element>(x: &[T]) -> bool {
    x.iter().all(|x| x.is_finite())
}
