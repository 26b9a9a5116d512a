//! The state of a model between two tokens, as a value: it can be copied (a fork), cleared,
//! saved and loaded. Its size does not depend on how many tokens it has seen.
//!
//! A state file is one safetensors file: a tensor a part, named as in the model's layout,
//! and in the header's metadata `format` (`xlstm-state`), `version` (1), `fingerprint` (of
//! the model's parameters) and `tokens` (seen so far, a
//! number a sequence). Parts are f32. A tensor `logits` holds
//! the logits after the last token, so that generation can go on from the file alone.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::files::write_atomically;

const FORMAT: &str = "xlstm-state";
const VERSION: &str = "1";

/// The state of a batch of sequences.
#[derive(Clone, Debug, PartialEq)]
pub struct State<T> {
    layout: Vec<(String, Shape)>,
    data: Vec<Vec<T>>,
    tokens: Vec<u64>,
}

/// Sequences of a layout.
fn batch_of(layout: &[(String, Shape)]) -> usize {
    layout.first().map_or(1, |(_, shape)| shape.dims()[0])
}

/// The layout of another number of sequences.
fn resized(layout: &[(String, Shape)], batch: usize) -> Vec<(String, Shape)> {
    let resize = |shape: &Shape| {
        let mut dims = shape.dims().to_vec();
        dims[0] = batch;
        Shape::from(&dims[..])
    };
    layout.iter().map(|(name, shape)| (name.clone(), resize(shape))).collect()
}

impl<T: Scalar> State<T> {
    /// The state of sequences that have not begun.
    pub fn empty(layout: &[(String, Shape)]) -> State<T> {
        let data = layout.iter().map(|(_, shape)| vec![T::ZERO; shape.len()]).collect();
        State { layout: layout.to_vec(), data, tokens: vec![0; batch_of(layout)] }
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens that each sequence has seen.
    pub fn tokens(&self) -> &[u64] {
        &self.tokens
    }

    /// Bytes of all parts in f32.
    pub fn bytes(&self) -> usize {
        self.data.iter().map(|part| 4 * part.len()).sum()
    }

    /// The state of sequence `i` alone.
    ///
    /// # Errors
    /// When there are not so many.
    pub fn row(&self, i: usize) -> Result<State<T>> {
        let batch = self.batch();
        if i >= batch {
            return Err(Error::shape(format!("there is no sequence {i} in a state of {batch}"))
                .hint("sequences count from 0"));
        }
        let parts = self.data.iter().map(|part| {
            let size = part.len() / batch;
            part[i * size..(i + 1) * size].to_vec()
        });
        Ok(State { layout: resized(&self.layout, 1), data: parts.collect(), tokens: vec![self.tokens[i]] })
    }

    /// The sequences of all these states, one after the other, as those of one.
    ///
    /// # Errors
    /// When they are of different models, or there is none.
    pub fn stack(states: &[&State<T>]) -> Result<State<T>> {
        let Some((first, rest)) = states.split_first() else {
            return Err(Error::shape("no states to stack"));
        };
        rest.iter().try_for_each(|state| state.check(&resized(&first.layout, state.batch())))?;
        let tokens = states.iter().flat_map(|state| state.tokens.iter().copied()).collect::<Vec<u64>>();
        let joined = |part: usize| states.iter().flat_map(|state| state.data[part].iter().copied()).collect();
        let data = (0..first.data.len()).map(joined).collect();
        Ok(State { layout: resized(&first.layout, tokens.len()), data, tokens })
    }

    /// Forgets everything: the state of sequences that have not begun.
    pub fn reset(&mut self) {
        self.data.iter_mut().for_each(|part| part.fill(T::ZERO));
        self.tokens.fill(0);
    }

    /// The parts, in the order of the layout.
    pub fn parts(&self) -> impl Iterator<Item = &[T]> {
        self.data.iter().map(Vec::as_slice)
    }

    /// The state of these parts, each sequence after so many tokens.
    pub(crate) fn from_parts(
        layout: &[(String, Shape)],
        parts: impl Iterator<Item = Result<Vec<T>>>,
        tokens: Vec<u64>,
    ) -> Result<State<T>> {
        Ok(State { layout: layout.to_vec(), data: parts.collect::<Result<_>>()?, tokens })
    }

    /// Refuses a state of another model.
    pub(crate) fn check(&self, layout: &[(String, Shape)]) -> Result<()> {
        if self.layout == layout {
            return Ok(());
        }
        Err(Error::checkpoint("the state belongs to a model of another configuration")
            .hint("load the state with the model that made it"))
    }

    /// Writes the state and the logits after its last token to `path`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path, fingerprint: &str, logits: &[T]) -> Result<()> {
        let logits_shape = ("logits".to_owned(), Shape::from([logits.len()]));
        let bytes: Vec<Vec<u8>> = self
            .data
            .iter()
            .map(Vec::as_slice)
            .chain([logits])
            .map(|part| part.iter().flat_map(|x| (x.to_f64() as f32).to_le_bytes()).collect())
            .collect();
        let mut tensors = Vec::new();
        for ((name, shape), bytes) in self.layout.iter().chain([&logits_shape]).zip(&bytes) {
            let view = TensorView::new(Dtype::F32, shape.dims().to_vec(), bytes)
                .map_err(|e| Error::checkpoint(format!("state part {name}: {e}")))?;
            tensors.push((name.as_str(), view));
        }
        let metadata = HashMap::from(
            [
                ("format", FORMAT),
                ("version", VERSION),
                ("fingerprint", fingerprint),
                ("tokens", &self.tokens.iter().map(u64::to_string).collect::<Vec<_>>().join(" ")),
            ]
            .map(|(k, v)| (k.to_owned(), v.to_owned())),
        );
        let file = safetensors::serialize(tensors, Some(metadata))
            .map_err(|e| Error::checkpoint(format!("cannot write the state {}: {e}", path.display())))?;
        write_atomically(path, |writer| std::io::Write::write_all(writer, &file))
    }

    /// Reads a state that `layout` and `fingerprint` belong to, and the logits after its last
    /// token (none where it has seen none).
    ///
    /// # Errors
    /// When the file is missing, damaged, or of another model.
    pub fn load(path: &Path, layout: &[(String, Shape)], fingerprint: &str) -> Result<(State<T>, Vec<T>)> {
        let file = std::fs::read(path).map_err(|e| Error::io("read", path, &e))?;
        let damaged = |what: String| {
            Error::checkpoint(format!("{} is not a state file: {what}", path.display()))
                .hint("state files are written by `xlstm generate --state-out`")
        };
        let (_, header) = SafeTensors::read_metadata(&file).map_err(|e| damaged(e.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let field = |key: &str| metadata.get(key).map(String::as_str).unwrap_or_default();
        if field("format") != FORMAT || field("version") != VERSION {
            return Err(damaged(format!("format {:?}, version {:?}", field("format"), field("version"))));
        }
        if field("fingerprint") != fingerprint {
            return Err(Error::checkpoint(format!("the state {} was made by another model", path.display()))
                .hint("load it with the model that made it"));
        }
        let tensors = SafeTensors::deserialize(&file).map_err(|e| damaged(e.to_string()))?;
        let mut state = State::empty(layout);
        let tokens: Option<Vec<u64>> = field("tokens").split(' ').map(|n| n.parse().ok()).collect();
        state.tokens = tokens
            .filter(|tokens| tokens.len() == state.tokens.len())
            .ok_or_else(|| damaged(format!("tokens {:?} of {} sequences", field("tokens"), state.batch())))?;
        let read = |name: &str, shape: Option<&Shape>| {
            let view = tensors.tensor(name).map_err(|e| damaged(e.to_string()))?;
            if view.dtype() != Dtype::F32 || shape.is_some_and(|shape| view.shape() != shape.dims()) {
                return Err(damaged(format!(
                    "{name} is {:?} {:?}, expected f32 {shape:?}",
                    view.dtype(),
                    view.shape()
                )));
            }
            let values = view.data().as_chunks::<4>().0.iter();
            Ok(values.map(|b| T::from_f64(f64::from(f32::from_le_bytes(*b)))).collect::<Vec<T>>())
        };
        for ((name, shape), data) in layout.iter().zip(&mut state.data) {
            *data = read(name, Some(shape))?;
        }
        let logits = read("logits", None)?;
        Ok((state, logits))
    }
}
