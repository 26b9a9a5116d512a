//! Parameters: their official names, shapes, first values, weight-decay groups and roles.
//!
//! A model is first described as a list of [`ParameterSpec`], in the order in which its
//! layers ask for them; [`Parameters`] are the numbers to such a list.

use std::sync::Arc;

use crate::engine::{Scalar, Shape, Tape, Var};
use crate::error::{Error, Result};
use crate::rng::Rng;

/// How a parameter starts.
#[derive(Clone, Debug, PartialEq)]
pub enum Init {
    /// All the same.
    Constant(f64),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in (-bound, bound).
    Uniform(f64),
    /// Given one by one.
    Values(Vec<f64>),
    /// One after the other: how many values, and how they start.
    Rows(Vec<(usize, Init)>),
}

impl Init {
    /// `n` equal steps from `first` to `last`.
    pub fn steps(first: f64, last: f64, n: usize) -> Init {
        let width = (n.max(2) - 1) as f64;
        Init::Values((0..n).map(|i| first + (last - first) * i as f64 / width).collect())
    }

    /// Runs of values one after the other: how many, and how they start.
    pub fn rows(runs: impl Iterator<Item = (usize, Init)>) -> Init {
        Init::Rows(runs.collect())
    }

    /// Appends `count` first values.
    fn draw<T: Scalar>(&self, count: usize, rng: &mut Rng, values: &mut Vec<T>) {
        match self {
            Init::Constant(value) => values.extend(std::iter::repeat_n(T::from_f64(*value), count)),
            Init::Normal(deviation) => {
                values.extend((0..count).map(|_| T::from_f64(rng.normal() * deviation)));
            }
            Init::Uniform(bound) => {
                values.extend((0..count).map(|_| T::from_f64((2.0 * rng.uniform() - 1.0) * bound)));
            }
            Init::Values(given) => values.extend(given.iter().map(|x| T::from_f64(*x))),
            Init::Rows(runs) => runs.iter().for_each(|(count, init)| init.draw(*count, rng, values)),
        }
    }
}

/// What a parameter is to an optimizer that treats matrices as such.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Numbers one by one: norms, biases, convolutions, gates of a number a head, blocks of few features.
    #[default]
    Elements,
    /// Of the embedding, the projection of the input or the head.
    Border,
    /// Linear maps from features to features, one after the other: rows and columns of each.
    Matrices(Vec<[usize; 2]>),
}

/// Maps to or from fewer features than this are no matrices to an optimizer: all singular values the same
/// means little there.
const FEW: usize = 16;

/// One parameter of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterSpec {
    /// Its official name, such as `xlstm_block_stack.blocks.0.xlstm.proj_up.weight`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// How it starts.
    pub init: Init,
    /// Whether weight decay reaches it.
    pub decay: bool,
    /// What it is to the optimizer.
    pub role: Role,
}

impl ParameterSpec {
    /// Number of its values.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// First values of the parameter number `index` of a model, drawn from `seed`.
    pub fn draw<T: Scalar>(&self, seed: u64, index: usize) -> Vec<T> {
        let mut values = Vec::with_capacity(self.count());
        self.init.draw(self.count(), &mut Rng::new(seed, index as u64), &mut values);
        debug_assert_eq!(values.len(), self.count(), "{}", self.name);
        values
    }
}

/// A parameter by its place in the model's list.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    index: usize,
    shape: Shape,
}

impl Parameter {
    /// The whole parameter on a tape.
    pub fn var(self, tape: &mut Tape) -> Var {
        tape.parameter(self.index, 0, self.shape)
    }

    /// Its place among the model's parameters.
    pub(crate) fn index(self) -> usize {
        self.index
    }

    /// Number of its values.
    pub(crate) fn len(self) -> usize {
        self.shape.len()
    }

    /// `count` of its rows from `first`, as a view.
    pub fn rows(self, tape: &mut Tape, first: usize, count: usize) -> Var {
        let row = self.shape.len() / self.shape.dims()[0];
        let mut dims = self.shape.dims().to_vec();
        dims[0] = count;
        tape.parameter(self.index, first * row, Shape::from(&dims[..]))
    }

    /// The same rows of a matrix (…, N) as a block-diagonal one of a single block (1, count, N).
    pub fn block(self, tape: &mut Tape, first: usize, count: usize) -> Var {
        let row = self.shape.last();
        tape.parameter(self.index, first * row, [1, count, row].into())
    }
}

/// Collects the parameters of a model while its layers are made.
#[derive(Debug, Default)]
pub struct Builder {
    specs: Vec<ParameterSpec>,
    prefix: String,
}

impl Builder {
    /// An empty list.
    pub fn new() -> Builder {
        Builder::default()
    }

    /// Runs `make` with `name.` before every name.
    pub fn scope<R>(&mut self, name: &str, make: impl FnOnce(&mut Builder) -> R) -> R {
        let outer = self.prefix.len();
        self.prefix.push_str(name);
        self.prefix.push('.');
        let made = make(self);
        self.prefix.truncate(outer);
        made
    }

    /// The next parameter. Weight decay reaches what is called a weight, but no norm's.
    pub fn parameter(&mut self, name: &str, shape: &[usize], init: Init) -> Parameter {
        let name = format!("{}{name}", self.prefix);
        let decay = name.contains("weight") && !name.contains("norm");
        self.specs.push(ParameterSpec { name, shape: shape.to_vec(), init, decay, role: Role::Elements });
        Parameter { index: self.specs.len() - 1, shape: shape.into() }
    }

    /// The next parameter, with or without weight decay whatever its name.
    pub fn parameter_with_decay(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
        decay: bool,
    ) -> Parameter {
        let parameter = self.parameter(name, shape, init);
        self.specs[parameter.index].decay = decay;
        parameter
    }

    /// The next parameter: linear maps of so many rows each, one after the other, as wide as its last
    /// dimension. Where one of them has fewer than 16 rows or columns, all are [`Role::Elements`].
    pub fn matrices(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
        rows: impl IntoIterator<Item = usize>,
    ) -> Parameter {
        let parameter = self.parameter(name, shape, init);
        let columns = parameter.shape.last();
        let sizes: Vec<[usize; 2]> = rows.into_iter().map(|rows| [rows, columns]).collect();
        debug_assert_eq!(
            sizes.iter().map(|[rows, _]| rows * columns).sum::<usize>(),
            parameter.len(),
            "{name}"
        );
        if sizes.iter().flatten().all(|&side| side >= FEW) {
            self.specs[parameter.index].role = Role::Matrices(sizes);
        }
        parameter
    }

    /// Says that a parameter belongs to the embedding, the projection of the input or the head.
    pub fn at_border(&mut self, parameter: Parameter) {
        self.specs[parameter.index].role = Role::Border;
    }

    /// The finished list.
    pub fn finish(self) -> Arc<[ParameterSpec]> {
        self.specs.into()
    }
}

/// The numbers of a model, one buffer a parameter.
#[derive(Clone, Debug)]
pub struct Parameters<T> {
    specs: Arc<[ParameterSpec]>,
    /// Values, in the order of the specifications.
    pub values: Vec<Vec<T>>,
}

impl<T: Scalar> Parameters<T> {
    /// First values drawn from `seed`; each parameter has a stream of its own, so that
    /// adding one does not change the others.
    pub fn initialize(specs: &Arc<[ParameterSpec]>, seed: u64) -> Parameters<T> {
        let values = specs.iter().enumerate().map(|(i, spec)| spec.draw(seed, i));
        Parameters { specs: specs.clone(), values: values.collect() }
    }

    /// All zero, to be set.
    pub fn zeros(specs: &Arc<[ParameterSpec]>) -> Parameters<T> {
        let values = specs.iter().map(|spec| vec![T::ZERO; spec.shape.iter().product()]).collect();
        Parameters { specs: specs.clone(), values }
    }

    /// Zeros in the same shapes: gradients and moments.
    pub fn zeros_like(&self) -> Vec<Vec<T>> {
        self.values.iter().map(|values| vec![T::ZERO; values.len()]).collect()
    }

    /// The specifications.
    pub fn specs(&self) -> &Arc<[ParameterSpec]> {
        &self.specs
    }

    /// Number of values in all.
    pub fn count(&self) -> usize {
        self.values.iter().map(Vec::len).sum()
    }

    /// Sets a parameter by name.
    ///
    /// # Errors
    /// When there is none of that name, or it has another shape.
    pub fn set(&mut self, name: &str, shape: &[usize], values: impl IntoIterator<Item = T>) -> Result<()> {
        let Some(index) = self.specs.iter().position(|spec| spec.name == name) else {
            return Err(Error::checkpoint(format!("the model has no parameter {name}"))
                .hint("the file belongs to a model of another configuration"));
        };
        if self.specs[index].shape != shape {
            return Err(Error::checkpoint(format!(
                "parameter {name} is {:?} in the model and {shape:?} in the file",
                self.specs[index].shape
            ))
            .hint("the file belongs to a model of another configuration"));
        }
        self.values[index].clear();
        self.values[index].extend(values);
        Ok(())
    }
}
