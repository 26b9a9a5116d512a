//! Which tensors of files make up the parameters of a model, and reading them.
//!
//! A parameter is one tensor, rows of one, or several of those in a row, as a [`Recipe`] says. A
//! plan of all recipes is checked against the headers, so that whatever does not fit is found
//! before a weight is read.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use super::tensors::{TensorFiles, TensorView};
use crate::engine::Code;
use crate::engine::stored::{Format, Mapped, Piece as Numbers, Storable, Stored};
use crate::error::{Error, Result};
use crate::nn::{ParameterSpec, Parameters};
use crate::rng::mix;

/// A tensor of a file, or rows of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The tensor's name.
    pub tensor: String,
    /// Rows of its first dimension; None for all.
    pub rows: Option<Range<usize>>,
}

/// Turns the numbers of a file into those of the parameter with this specification.
pub type Rearrange = fn(&ParameterSpec, Vec<f32>) -> Vec<f32>;

/// How a parameter is made of tensors.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// What follows each other in it.
    pub pieces: Vec<Piece>,
    /// For numbers in another order than ours; they are then copied and in f32.
    pub rearrange: Option<Rearrange>,
}

impl Recipe {
    /// A whole tensor.
    pub fn tensor(name: impl Into<String>) -> Recipe {
        Recipe { pieces: vec![Piece { tensor: name.into(), rows: None }], rearrange: None }
    }

    /// Rows of a tensor.
    pub fn rows(name: impl Into<String>, rows: Range<usize>) -> Recipe {
        Recipe { pieces: vec![Piece { tensor: name.into(), rows: Some(rows) }], rearrange: None }
    }

    /// Whole tensors, one after the other.
    pub fn stacked<N: Into<String>>(names: impl IntoIterator<Item = N>) -> Recipe {
        let pieces = names.into_iter().map(|name| Piece { tensor: name.into(), rows: None });
        Recipe { pieces: pieces.collect(), rearrange: None }
    }
}

/// The parameters of a model in its files, before they are read.
#[derive(Debug)]
pub struct WeightFiles {
    specs: Arc<[ParameterSpec]>,
    places: Vec<Placed>,
    unused: Vec<String>,
}

/// A parameter's bytes.
#[derive(Debug)]
struct Placed {
    pieces: Vec<Numbers>,
    rearrange: Option<Rearrange>,
}

impl WeightFiles {
    /// Finds every parameter in `files`, by the recipe that `recipe` gives for it.
    ///
    /// # Errors
    /// When a tensor is missing, or is of another shape or of no format of weights.
    pub fn new(
        folder: &Path,
        files: &TensorFiles,
        specs: &Arc<[ParameterSpec]>,
        recipe: impl Fn(&ParameterSpec) -> Recipe,
    ) -> Result<WeightFiles> {
        let mut unused: BTreeSet<&str> = files.names().collect();
        let mut places = Vec::with_capacity(specs.len());
        for spec in specs.iter() {
            let Recipe { pieces, rearrange } = recipe(spec);
            let mut found = Vec::with_capacity(pieces.len());
            for piece in &pieces {
                let view = files.get(&piece.tensor).ok_or_else(|| missing(folder, files, spec, piece))?;
                unused.remove(view.name);
                let scales = scales_of(&view, files)?;
                if let Some(scales) = &scales {
                    unused.remove(scales.name);
                }
                found.push(place(&view, scales.as_ref(), piece, spec)?);
            }
            check_shape(&found, spec, rearrange.is_some())?;
            let pieces = found.into_iter().map(|found| found.numbers).collect();
            places.push(Placed { pieces, rearrange });
        }
        let unused = unused.into_iter().map(str::to_owned).collect();
        Ok(WeightFiles { specs: specs.clone(), places, unused })
    }

    /// Tensors of the files that are no parameter's.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// The number format of most weights that are not quantised.
    pub fn format(&self) -> Format {
        let bytes = |wanted: Format| -> usize {
            let own = |piece: &Numbers| match piece {
                Numbers::Dense(format, bytes) if *format == wanted => bytes.len(),
                _ => 0,
            };
            self.places.iter().flat_map(|place| &place.pieces).map(own).sum()
        };
        let formats = [Format::F32, Format::Bf16, Format::F16];
        formats.into_iter().max_by_key(|&format| bytes(format)).unwrap_or(Format::F32)
    }

    /// How weights are quantised, where any are.
    pub fn code(&self) -> Option<Code> {
        self.places.iter().flat_map(|place| &place.pieces).find_map(|piece| match piece {
            Numbers::Quantized(code, ..) => Some(*code),
            Numbers::Dense(..) => None,
        })
    }

    /// Bytes of all parameters in the files: what inference on the processor reads for a token.
    pub fn bytes(&self) -> usize {
        self.places.iter().flat_map(|place| &place.pieces).map(Numbers::bytes).sum()
    }

    /// The parameter of this number in f32.
    pub fn values(&self, index: usize) -> Vec<f32> {
        self.places[index].wide(&self.specs[index])
    }

    /// All parameters in f32.
    pub fn parameters(&self) -> Parameters<f32> {
        let mut parameters = Parameters::zeros(&self.specs);
        for ((place, spec), values) in self.places.iter().zip(self.specs.iter()).zip(&mut parameters.values) {
            *values = place.wide(spec);
        }
        parameters
    }

    /// All parameters as they are stored, mapped where that is possible; in fewer bits than
    /// 32 only where `storable` says so of the parameter.
    pub fn stored(&self, storable: &[Storable]) -> Vec<Stored<f32>> {
        let places = self.places.iter().zip(self.specs.iter()).zip(storable);
        let stored = places.map(|((place, spec), &storable)| match place.rearrange {
            Some(_) => Stored::owned(place.wide(spec)),
            None => Stored::new(&place.pieces, storable),
        });
        stored.collect()
    }

    /// A hash of formats and bytes. Reads all of them, on all threads.
    pub fn hash(&self) -> u64 {
        // Tiles are fixed and joined in order.
        let tile = |bytes: &[u8]| {
            let (words, rest) = bytes.as_chunks::<8>();
            let last = rest.iter().fold(bytes.len() as u64, |last, &byte| last << 8 | u64::from(byte));
            words.iter().map(|word| u64::from_le_bytes(*word)).chain([last]).fold(0, |hash, x| mix(hash ^ x))
        };
        let tensor = |hash: u64, bytes: &Mapped, kind: u64| {
            let tiles: Vec<u64> = bytes.par_chunks(1 << 20).map(tile).collect();
            tiles.into_iter().chain([kind]).fold(hash, |hash, x| mix(hash ^ x))
        };
        self.places.iter().flat_map(|place| &place.pieces).fold(0, |hash, piece| match piece {
            Numbers::Dense(format, bytes) => tensor(hash, bytes, format.bytes() as u64),
            Numbers::Quantized(code, codes, scales) => {
                tensor(tensor(hash, codes, code.group_bytes() as u64), scales, 2)
            }
        })
    }
}

impl Placed {
    fn wide(&self, spec: &ParameterSpec) -> Vec<f32> {
        let values = self.pieces.iter().flat_map(Numbers::widen).collect();
        match self.rearrange {
            Some(rearrange) => rearrange(spec, values),
            None => values,
        }
    }
}

/// A piece that was found.
struct Found<'a> {
    numbers: Numbers,
    file: &'a Path,
    name: &'a str,
    shape: Vec<usize>,
}

/// The name of the scales of a quantised tensor.
pub(super) fn scales_name(tensor: &str) -> String {
    format!("{tensor}.scales")
}

/// Of a quantised tensor, its scales.
fn scales_of<'a>(view: &TensorView<'_>, files: &'a TensorFiles) -> Result<Option<TensorView<'a>>> {
    let Some(code) = view.code() else { return Ok(None) };
    let name = scales_name(view.name);
    let refuse = |what: String| {
        Error::checkpoint(format!("{}: tensor {} is {}, {what}", view.file.display(), view.name, code.name()))
            .hint("`xlstm convert --quantize` writes the scales of every group of a row beside the codes")
    };
    let scales = files.get(&name).ok_or_else(|| refuse(format!("but there is no tensor {name}")))?;
    let expected = code.scales_shape(view.shape);
    if scales.format()? != Format::Bf16 || expected.as_deref() != Some(scales.shape) {
        let expected = expected.map_or("a matrix of whole groups".into(), |shape| format!("BF16 {shape:?}"));
        return Err(refuse(format!("expected {expected}, found {name} {:?}", scales.shape)));
    }
    Ok(Some(scales))
}

fn place<'a>(
    view: &TensorView<'a>,
    scales: Option<&TensorView<'a>>,
    piece: &Piece,
    spec: &ParameterSpec,
) -> Result<Found<'a>> {
    let code = view.code();
    let mut shape = view.shape.to_vec();
    if let (Some(code), Some(last)) = (code, shape.last_mut()) {
        *last *= code.codes_a_byte();
    }
    let count = shape.first().copied().unwrap_or(0);
    let rows = piece.rows.clone().unwrap_or(0..count);
    if rows.start > rows.end || rows.end > count {
        return Err(Error::checkpoint(format!(
            "{}: parameter {} is rows {rows:?} of tensor {}, which has {count}: its shape is {shape:?}",
            view.file.display(),
            spec.name,
            view.name
        ))
        .hint("the config.json belongs to a model of other sizes"));
    }
    let rows_of = |bytes: &Mapped| {
        let row = bytes.len() / count.max(1);
        bytes.slice(rows.start * row..rows.end * row)
    };
    let part = |view: &TensorView<'_>| match piece.rows {
        Some(_) => rows_of(view.bytes()),
        None => view.bytes().clone(),
    };
    let numbers = match (code, scales) {
        (Some(code), Some(scales)) => Numbers::Quantized(code, part(view), part(scales)),
        _ => Numbers::Dense(view.format()?, part(view)),
    };
    if piece.rows.is_some() {
        shape[0] = rows.len();
    }
    Ok(Found { numbers, file: view.file, name: view.name, shape })
}

/// Refuses pieces that do not make up the parameter.
fn check_shape(found: &[Found<'_>], spec: &ParameterSpec, any_order: bool) -> Result<()> {
    let count = |shape: &[usize]| shape.iter().product::<usize>();
    let fits = match found {
        _ if any_order => found.iter().map(|f| count(&f.shape)).sum::<usize>() == count(&spec.shape),
        [one] => one.shape == spec.shape,
        _ => {
            let rows = found.iter().map(|f| f.shape.first().copied().unwrap_or(0)).sum::<usize>();
            Some(&rows) == spec.shape.first() && found.iter().all(|f| f.shape.get(1..) == spec.shape.get(1..))
        }
    };
    if fits {
        return Ok(());
    }
    let pieces: Vec<String> = found.iter().map(|f| format!("{} {:?}", f.name, f.shape)).collect();
    let file = found.first().map_or_else(String::new, |f| format!("{}: ", f.file.display()));
    Err(Error::checkpoint(format!(
        "{file}expected {:?} for the parameter {}, found {}",
        spec.shape,
        spec.name,
        pieces.join(", ")
    ))
    .hint("the weights belong to a model of another configuration than the one beside them"))
}

fn missing(folder: &Path, files: &TensorFiles, spec: &ParameterSpec, piece: &Piece) -> Error {
    let place = match files.files() {
        [file] => file.path().display().to_string(),
        files => format!("{} ({} files)", folder.display(), files.len()),
    };
    let part =
        if piece.tensor == spec.name { String::new() } else { format!(", the parameter {}", spec.name) };
    Error::checkpoint(format!(
        "{place} lacks the tensor {}{part}: expected {:?}, found no such name",
        piece.tensor, spec.shape
    ))
    .hint("the weights belong to a model of another configuration than the one beside them")
}
