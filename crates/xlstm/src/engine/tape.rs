//! The tape: a forward pass recorded once, for given shapes and mode, as data.
//!
//! A node is an operation with the numbers of the buffers that it reads and writes.
//! Everything that changes between replays (token ids, marks, states, the seed) is an
//! input buffer, so that a recorded step stays valid for the whole run.

use super::operation::{NodeShapes, Operation};
use super::shape::Shape;
use super::stored::Storable;
use crate::error::{Error, Result};

/// A buffer of floating-point numbers: the number of a value on its tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Var(pub(super) u32);

/// A buffer of integers: token ids, targets, marks, seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ids(pub(super) u32);

impl Var {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

impl Ids {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// What the tape is recorded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Dropout is on and gradients are kept.
    Train,
    /// Neither: buffers are free again after their last reader.
    Evaluate,
}

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Set by the caller before a replay.
    Input,
    /// Part of parameter `index`, from element `offset`.
    Parameter { index: usize, offset: usize },
    /// Written by a node.
    Node(usize),
    /// Written by a node that was left out.
    Nothing,
}

/// A value: its shape, origin, and what is to be kept of it.
#[derive(Clone, Debug)]
pub(super) struct Value {
    pub(super) shape: Shape,
    pub(super) source: Source,
    /// A gradient flows into it.
    pub(super) gradient: bool,
    /// The caller reads it after the replay.
    pub(super) kept: bool,
    /// The caller sets the gradient that backward starts from.
    pub(super) seeded: bool,
    /// The input that the value becomes after a replay.
    pub(super) becomes: Option<Var>,
}

/// One operation with its buffers.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) operation: Box<dyn Operation>,
    pub(super) inputs: Vec<Option<Var>>,
    pub(super) outputs: Vec<Var>,
    pub(super) ids: Vec<Ids>,
    pub(super) shapes: NodeShapes,
    /// The model part that recorded it, such as "blocks.3": for diagnostics.
    pub(super) scope: usize,
}

/// A recorded forward pass.
#[derive(Debug)]
pub struct Tape {
    pub(super) mode: Mode,
    pub(super) values: Vec<Value>,
    pub(super) ids: Vec<usize>,
    pub(super) nodes: Vec<Node>,
    pub(super) scopes: Vec<String>,
}

impl Tape {
    /// An empty tape.
    pub fn new(mode: Mode) -> Tape {
        Tape {
            mode,
            values: Vec::new(),
            ids: Vec::new(),
            nodes: Vec::new(),
            scopes: vec![String::from("model")],
        }
    }

    /// What the tape is recorded for.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The shape of a value.
    pub fn shape(&self, var: Var) -> Shape {
        self.values[var.index()].shape
    }

    fn value(&mut self, shape: Shape, source: Source, gradient: bool) -> Var {
        let kept = source == Source::Input;
        self.values.push(Value { shape, source, gradient, kept, seeded: false, becomes: None });
        Var(self.values.len() as u32 - 1)
    }

    /// A value that the caller sets before each replay.
    pub fn input(&mut self, shape: impl Into<Shape>) -> Var {
        self.value(shape.into(), Source::Input, false)
    }

    /// An input whose gradient the caller reads after backward.
    pub fn input_with_gradient(&mut self, shape: impl Into<Shape>) -> Var {
        let gradient = self.mode == Mode::Train;
        self.value(shape.into(), Source::Input, gradient)
    }

    /// Integers that the caller sets before each replay.
    pub fn ids(&mut self, count: usize) -> Ids {
        self.ids.push(count);
        Ids(self.ids.len() as u32 - 1)
    }

    /// A view of parameter `index` of the model, from element `offset`.
    pub fn parameter(&mut self, index: usize, offset: usize, shape: Shape) -> Var {
        let source = Source::Parameter { index, offset };
        let gradient = self.mode == Mode::Train;
        self.value(shape, source, gradient)
    }

    /// Names the part of the model that records from here on.
    pub fn scope(&mut self, name: &str) {
        self.scopes.push(name.to_owned());
    }

    /// Records an operation; returns its outputs, the saved ones included.
    ///
    /// # Errors
    /// When the operation rejects the shapes of its inputs, or is given one of them twice; different
    /// rows of one parameter are different inputs.
    pub fn record(
        &mut self,
        operation: impl Operation + 'static,
        inputs: &[Option<Var>],
        ids: &[Ids],
    ) -> Result<Vec<Var>> {
        let shapes: Vec<Option<Shape>> = inputs.iter().map(|v| v.map(|v| self.shape(v))).collect();
        let outputs = operation.outputs(&shapes).map_err(|e| {
            Error::shape(format!("{} in {}: {e}", operation.name(), self.scopes[self.scopes.len() - 1]))
        })?;
        // Backward takes each gradient buffer for writing: it cannot take one twice.
        for (i, var) in inputs.iter().enumerate() {
            if let Some(var) = var
                && inputs[..i].iter().flatten().any(|other| self.same_gradient(*var, *other))
            {
                return Err(Error::shape(format!("{} reads one value or parameter twice", operation.name())));
            }
        }
        let gradient = inputs.iter().flatten().any(|v| self.values[v.index()].gradient);
        let node = self.nodes.len();
        let vars: Vec<Var> = outputs.iter().map(|s| self.value(*s, Source::Node(node), gradient)).collect();
        self.nodes.push(Node {
            operation: Box::new(operation),
            inputs: inputs.to_vec(),
            outputs: vars.clone(),
            ids: ids.to_vec(),
            shapes: NodeShapes { inputs: shapes, outputs },
            scope: self.scopes.len() - 1,
        });
        Ok(vars)
    }

    /// In how few bits each of `count` parameters may be stored on the processor: all that read it
    /// can widen it themselves.
    pub fn storable_parameters(&self, count: usize) -> Vec<Storable> {
        let mut storable = vec![Storable::Quantized; count];
        for node in &self.nodes {
            for (slot, var) in node.inputs.iter().enumerate() {
                let source = var.map(|var| self.values[var.index()].source);
                if let Some(Source::Parameter { index, .. }) = source {
                    storable[index] = storable[index].min(node.operation.storable(slot));
                }
            }
        }
        storable
    }

    fn same_gradient(&self, a: Var, b: Var) -> bool {
        let [a, b] = [a, b].map(|var| (var, &self.values[var.index()]));
        match (a.1.source, b.1.source) {
            (Source::Parameter { index: p, offset: x }, Source::Parameter { index: q, offset: y }) => {
                p == q && x < y + b.1.shape.len() && y < x + a.1.shape.len()
            }
            _ => a.0 == b.0,
        }
    }

    /// Keeps a value until the next replay, for the caller to read.
    pub fn keep(&mut self, var: Var) {
        self.values[var.index()].kept = true;
    }

    /// Keeps a value that the caller feeds back after every replay, as the next one's `input`, which then
    /// has no other use. So the two may lie in one place: see [`Kernel::updates`].
    ///
    /// [`Kernel::updates`]: super::operation::Kernel::updates
    pub fn keep_as(&mut self, var: Var, input: Var) {
        self.keep(var);
        self.values[var.index()].becomes = Some(input);
    }

    /// The input that value number `var` lies in the place of: where the node that makes it can update
    /// that, nobody reads it later, and backward does not run.
    pub(super) fn updated(&self, var: usize) -> Option<Var> {
        let value = &self.values[var];
        let (Some(input), Source::Node(i), Mode::Evaluate) = (value.becomes, value.source, self.mode) else {
            return None;
        };
        let node = &self.nodes[i];
        let [from, to] = node.operation.updates()?;
        let fits = node.inputs[from] == Some(input)
            && node.outputs[to].index() == var
            && self.values[input.index()].source == Source::Input
            && self.shape(input) == value.shape;
        let mut others = self.nodes[i + 1..].iter().flat_map(|node| &node.inputs);
        (fits && !others.any(|other| *other == Some(input))).then_some(input)
    }

    /// Lets backward start from a gradient of `var` that the caller sets.
    pub fn seed_gradient(&mut self, var: Var) {
        self.values[var.index()].seeded = true;
    }

    /// Leaves out the nodes of whose outputs none is kept, seeded or read on the way to one that is, such
    /// as those of a state that nobody carries on.
    pub(super) fn prune(&mut self) {
        let mut wanted: Vec<bool> = self.values.iter().map(|value| value.kept || value.seeded).collect();
        let mut stays = vec![false; self.nodes.len()];
        for (node, stays) in self.nodes.iter().zip(&mut stays).rev() {
            *stays = node.outputs.iter().any(|var| wanted[var.index()]);
            if *stays {
                node.inputs.iter().flatten().for_each(|var| wanted[var.index()] = true);
            }
        }
        let mut places = stays.iter();
        self.nodes.retain(|_| places.next() == Some(&true));
        let mut after = 0;
        let places: Vec<Source> = stays
            .iter()
            .map(|&stays| {
                after += usize::from(stays);
                if stays { Source::Node(after - 1) } else { Source::Nothing }
            })
            .collect();
        for value in &mut self.values {
            if let Source::Node(node) = value.source {
                value.source = places[node];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Device, Program};
    use crate::ops::activation::{Activation, activated};

    /// x -> a -> b kept, a -> c -> d read by nobody, and e seeded.
    #[test]
    fn what_leads_nowhere_is_left_out() {
        let mut tape = Tape::new(Mode::Train);
        let x = tape.input_with_gradient([3]);
        let of = |tape: &mut Tape, x| activated(tape, x, Activation::Relu).unwrap();
        let a = of(&mut tape, x);
        let c = of(&mut tape, a);
        let d = of(&mut tape, c);
        let b = of(&mut tape, a);
        let e = of(&mut tape, b);
        tape.keep(b);
        tape.seed_gradient(e);
        tape.prune();
        let sources = [x, a, b, c, d, e].map(|var| tape.values[var.index()].source);
        let [nodes @ .., last] = [0, 1, 2].map(Source::Node);
        assert_eq!(sources, [Source::Input, nodes[0], nodes[1], Source::Nothing, Source::Nothing, last]);
        assert_eq!(tape.nodes.iter().map(|node| node.outputs[0]).collect::<Vec<_>>(), [a, b, e]);
        let mut program = Program::<f64>::new(tape, &Device::cpu(1).unwrap()).unwrap();
        program.set_input(x, &[1.0, -2.0, 3.0]).unwrap();
        program.forward(&[][..]).unwrap();
        assert_eq!(program.value(b).unwrap()[..], [1.0, 0.0, 3.0]);
    }
}
