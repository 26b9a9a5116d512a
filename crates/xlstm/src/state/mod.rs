//! The state of a model between two tokens, as a value: it can be copied (a fork), cleared,
//! saved and loaded. Its size does not depend on how many tokens it has seen.
//!
//! A state file is one safetensors file: a tensor a part, named as in the model's layout,
//! and in the header's metadata `format` (`xlstm-state`), `version` (1), `fingerprint` (of
//! the model's parameters) and `tokens` (seen so far). Parts are f32. A tensor `logits` holds
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
    tokens: u64,
}

impl<T: Scalar> State<T> {
    /// The state of sequences that have not begun.
    pub fn empty(layout: &[(String, Shape)]) -> State<T> {
        let data = layout.iter().map(|(_, shape)| vec![T::ZERO; shape.len()]).collect();
        State { layout: layout.to_vec(), data, tokens: 0 }
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.layout.first().map_or(1, |(_, shape)| shape.dims()[0])
    }

    /// Tokens that each sequence has seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Bytes of all parts in f32.
    pub fn bytes(&self) -> usize {
        self.data.iter().map(|part| 4 * part.len()).sum()
    }

    /// The state of one sequence as that of `count` sequences; `layout` is theirs.
    pub(crate) fn repeat(&self, layout: &[(String, Shape)], count: usize) -> State<T> {
        let data = self.data.iter().map(|part| part.repeat(count)).collect();
        State { layout: layout.to_vec(), data, tokens: self.tokens }
    }

    /// Forgets everything: the state of sequences that have not begun.
    pub fn reset(&mut self) {
        self.data.iter_mut().for_each(|part| part.fill(T::ZERO));
        self.tokens = 0;
    }

    /// The parts, in the order of the layout.
    pub fn parts(&self) -> impl Iterator<Item = &[T]> {
        self.data.iter().map(Vec::as_slice)
    }

    /// The state of these parts, after `tokens` tokens.
    pub(crate) fn from_parts(
        layout: &[(String, Shape)],
        parts: impl Iterator<Item = Result<Vec<T>>>,
        tokens: u64,
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
                ("tokens", &self.tokens.to_string()),
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
        state.tokens = field("tokens").parse().map_err(|_| damaged("no number of tokens".into()))?;
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
