//! Safetensors files, memory-mapped: one file, or the several of a model folder.
//!
//! A file is 8 bytes of header length N (little-endian), N bytes of JSON (name -> dtype, shape
//! and the range of its bytes), then the bytes of all tensors without holes. All of the header is
//! checked before a tensor is handed out, so that a view is whole and is of the shape that it
//! claims; the bytes themselves are read when they are used.
//!
//! A folder's tensors are in `model.safetensors`, in the files that
//! `model.safetensors.index.json` names, or in `model_1.safetensors`, `model_2.safetensors`, ….
//! No file outside the folder is opened; links into the `blobs` of the Hub cache that the folder
//! is part of are.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use safetensors::tensor::Dtype;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::engine::Code;
use crate::engine::stored::{Format, Mapped};
use crate::error::{Error, Result};

/// The single file of a model.
pub const SINGLE: &str = "model.safetensors";
/// The index of several.
pub const INDEX: &str = "model.safetensors.index.json";
/// As long as the reference implementation lets a header be.
const LONGEST_HEADER: u64 = 100_000_000;

/// A tensor in a file: its bytes are in memory once they are read.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    /// The file that holds it.
    pub file: &'a Path,
    /// Its name.
    pub name: &'a str,
    /// Its shape.
    pub shape: &'a [usize],
    dtype: Dtype,
    bytes: Mapped,
}

impl TensorView<'_> {
    /// The number format of its elements.
    ///
    /// # Errors
    /// When that is no format of weights.
    pub fn format(&self) -> Result<Format> {
        match self.dtype {
            Dtype::F32 => Ok(Format::F32),
            Dtype::BF16 => Ok(Format::Bf16),
            Dtype::F16 => Ok(Format::F16),
            other => Err(Error::checkpoint(format!(
                "{}: tensor {} is {other:?}, expected F32, BF16 or F16",
                self.file.display(),
                self.name
            ))
            .hint("convert the weights to one of these first")),
        }
    }

    /// How it is quantised, where its elements are codes.
    pub fn code(&self) -> Option<Code> {
        match self.dtype {
            Dtype::I8 => Some(Code::Int8),
            Dtype::U8 => Some(Code::Int4),
            _ => None,
        }
    }

    /// Its bytes, little-endian and row-major, where they lie.
    pub fn bytes(&self) -> &Mapped {
        &self.bytes
    }

    /// Its elements in f32, which is exact.
    ///
    /// # Errors
    /// As [`format`](TensorView::format).
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        Ok(self.format()?.widen(&self.bytes))
    }
}

#[derive(Debug)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// One safetensors file.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mapped,
    tensors: BTreeMap<String, Tensor>,
    metadata: BTreeMap<String, String>,
}

/// An entry of the header.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The header: its entries in file order, a name that comes twice included.
struct Header(Vec<(String, serde_json::Value)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Header, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl TensorFile {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// When the file cannot be read, or its header does not describe it.
    pub fn open(path: &Path) -> Result<TensorFile> {
        let damaged = |what: String| {
            Error::checkpoint(format!("{} is no sound safetensors file: {what}", path.display()))
                .hint("the file may be cut short or damaged; fetch or write it again")
        };
        let file = File::open(path).map_err(|e| Error::io("read", path, &e))?;
        let kind = file.metadata().map_err(|e| Error::io("read", path, &e))?;
        if !kind.is_file() {
            return Err(damaged("it is not a file".into()));
        }
        if kind.len() < 8 {
            return Err(damaged(format!("expected at least 8 bytes, found {}", kind.len())));
        }
        let map = Mapped::new(&file).map_err(|e| Error::io("map", path, &e))?;
        let (length, rest) = map.split_at(8);
        let length = length.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte));
        if length > LONGEST_HEADER || length > rest.len() as u64 {
            return Err(damaged(format!(
                "its header claims {length} bytes, but {} follow (and {LONGEST_HEADER} are allowed)",
                rest.len()
            )));
        }
        let (header, data) = rest.split_at(length as usize);
        let Header(entries) = serde_json::from_slice(header)
            .map_err(|e| damaged(format!("its header is no JSON of tensors: {e}")))?;
        let start = 8 + length as usize;
        let (mut tensors, mut metadata) = (BTreeMap::new(), BTreeMap::new());
        for (name, value) in entries {
            if name == "__metadata__" {
                metadata = serde_json::from_value(value)
                    .map_err(|e| damaged(format!("its metadata are no texts: {e}")))?;
                continue;
            }
            let entry = serde_json::from_value(value).map_err(|e| {
                damaged(format!("tensor {name}: expected dtype, shape and data_offsets, found {e}"))
            })?;
            let mut tensor = Tensor::check(&entry, data.len())
                .map_err(|what| damaged(format!("tensor {name}: {what}")))?;
            tensor.range = tensor.range.start + start..tensor.range.end + start;
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(damaged(format!("tensor {name} is there twice")));
            }
        }
        let mut in_order: Vec<(&String, &Tensor)> = tensors.iter().collect();
        in_order.sort_by_key(|(_, tensor)| (tensor.range.start, tensor.range.end));
        let mut end = start;
        for (name, tensor) in in_order {
            let found = tensor.range.start;
            if found != end {
                let what =
                    if found < end { "overlaps the tensor before it" } else { "leaves a hole before it" };
                return Err(damaged(format!(
                    "tensor {name} {what}: expected it at byte {}, found {}",
                    end - start,
                    found - start
                )));
            }
            end = tensor.range.end;
        }
        if end != map.len() {
            let (expected, found) = (end - start, map.len() - start);
            return Err(damaged(format!("its tensors take {expected} bytes, but {found} follow the header")));
        }
        Ok(TensorFile { path: path.to_owned(), map, tensors, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The texts that its writer added.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// All tensors, by name.
    pub fn iter(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.tensors.iter().map(|(name, tensor)| self.view(name, tensor))
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.tensors.get_key_value(name).map(|(name, tensor)| self.view(name, tensor))
    }

    fn view<'a>(&'a self, name: &'a str, tensor: &'a Tensor) -> TensorView<'a> {
        let bytes = self.map.slice(tensor.range.clone());
        TensorView { file: &self.path, name, shape: &tensor.shape, dtype: tensor.dtype, bytes }
    }
}

impl Tensor {
    /// The tensor of an entry, in a file with `bytes` bytes of data.
    fn check(entry: &Entry, bytes: usize) -> std::result::Result<Tensor, String> {
        let dtype: Dtype = serde_json::from_value(entry.dtype.clone().into())
            .map_err(|_| format!("unknown dtype {:?}", entry.dtype))?;
        let [begin, end] = entry.data_offsets;
        if begin > end || end > bytes as u64 {
            return Err(format!("expected a range within {bytes} bytes, found {begin}..{end}"));
        }
        let bits = entry.shape.iter().try_fold(dtype.bitsize() as u64, |bits, &n| bits.checked_mul(n));
        let Some(bits) = bits else {
            return Err(format!("its shape {:?} has more bytes than can be counted", entry.shape));
        };
        if bits != 8 * (end - begin) {
            return Err(format!(
                "{:?} {dtype:?} takes {} bytes, but its range {begin}..{end} has {}",
                entry.shape,
                bits / 8,
                end - begin
            ));
        }
        // Each factor is at most their product unless that is 0.
        let shape = entry.shape.iter().map(|&n| usize::try_from(n).map_err(|e| e.to_string()));
        Ok(Tensor {
            dtype,
            shape: shape.collect::<std::result::Result<_, _>>()?,
            range: begin as usize..end as usize,
        })
    }
}

/// The index of several files.
#[derive(Debug, Serialize, Deserialize)]
pub struct Index {
    /// What writers note about the whole, such as its `total_size`.
    #[serde(default)]
    pub metadata: serde_json::Value,
    /// The file of each tensor.
    pub weight_map: BTreeMap<String, String>,
}

/// The tensors of a model folder.
#[derive(Debug)]
pub struct TensorFiles {
    files: Vec<TensorFile>,
    /// The file of each tensor.
    places: BTreeMap<String, usize>,
}

impl TensorFiles {
    /// Maps the files of a model folder and checks their headers.
    ///
    /// # Errors
    /// When there are none, one is missing or damaged or outside the folder, two hold one tensor,
    /// or the index does not say what is in them.
    pub fn open(folder: &Path) -> Result<TensorFiles> {
        if folder.join(SINGLE).exists() {
            return TensorFiles::of(folder, &[SINGLE.to_owned()]);
        }
        if folder.join(INDEX).exists() {
            return TensorFiles::indexed(folder);
        }
        let numbered = numbered(folder)?;
        if numbered.is_empty() {
            return Err(Error::checkpoint(format!(
                "{} holds no weights: expected {SINGLE}, {INDEX} or model_N.safetensors",
                folder.display()
            ))
            .hint("weights in PyTorch's own format have to be saved as safetensors first"));
        }
        TensorFiles::of(folder, &numbered)
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.places.get(name).and_then(|&file| self.files[file].get(name))
    }

    /// The files.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    fn of(folder: &Path, names: &[String]) -> Result<TensorFiles> {
        let mut all = TensorFiles { files: Vec::new(), places: BTreeMap::new() };
        for name in names {
            let file = TensorFile::open(&inside(folder, name)?)?;
            for tensor in file.tensors.keys() {
                if let Some(other) = all.places.insert(tensor.clone(), all.files.len()) {
                    let other = all.files[other].path.display();
                    return Err(Error::checkpoint(format!("{name} and {other} both hold tensor {tensor}"))
                        .hint("the folder mixes files of two models"));
                }
            }
            all.files.push(file);
        }
        Ok(all)
    }

    fn indexed(folder: &Path) -> Result<TensorFiles> {
        let path = inside(folder, INDEX)?;
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, &e))?;
        let index: Index = serde_json::from_str(&text).map_err(|e| {
            Error::checkpoint(format!("{} is no index of tensors: {e}", path.display()))
                .hint("expected a weight_map from tensors to files")
        })?;
        if index.weight_map.is_empty() {
            return Err(Error::checkpoint(format!("{} names no tensor", path.display()))
                .hint("expected a weight_map from tensors to files"));
        }
        let mut names: Vec<String> = index.weight_map.values().cloned().collect();
        names.sort();
        names.dedup();
        let all = TensorFiles::of(folder, &names)?;
        for (tensor, name) in &index.weight_map {
            let found = all.places.get(tensor).map(|&file| &names[file]);
            if found != Some(name) {
                let found = found.map_or("no file does".into(), |file| format!("{file} does"));
                return Err(Error::checkpoint(format!(
                    "{} says that {name} holds tensor {tensor}, but {found}",
                    path.display()
                ))
                .hint("the index belongs to other files, or one of them is of another model"));
            }
        }
        if let Some(tensor) = all.names().find(|name| !index.weight_map.contains_key(*name)) {
            return Err(Error::checkpoint(format!(
                "{} does not list tensor {tensor}, which {} holds",
                path.display(),
                names[all.places[tensor]]
            ))
            .hint("the index belongs to other files, or one of them is of another model"));
        }
        Ok(all)
    }
}

/// Whether a folder seems to hold weights.
pub(crate) fn has_weights(folder: &Path) -> bool {
    [SINGLE, INDEX].iter().any(|name| folder.join(name).exists())
        || numbered(folder).is_ok_and(|n| !n.is_empty())
}

/// `model_N.safetensors`, in the order of N.
fn numbered(folder: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io("list", folder, &e))? {
        let name = entry.map_err(|e| Error::io("list", folder, &e))?.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix("model_")?.strip_suffix(".safetensors")?.parse::<u32>().ok());
        found.extend(number.zip(name.into_string().ok()));
    }
    found.sort();
    Ok(found.into_iter().map(|(_, name)| name).collect())
}

/// The file `name` of a folder; its links may lead into the folder or into the Hub cache that the
/// folder is part of, but nowhere else.
///
/// # Errors
/// When the name is a path, or the file is elsewhere or missing.
pub fn inside(folder: &Path, name: &str) -> Result<PathBuf> {
    let outside = |what: String| {
        Error::checkpoint(format!("{}: {what}, expected a file in this folder", folder.display()))
            .hint("the folder was not made by a tool for model folders; do not trust it")
    };
    let mut parts = Path::new(name).components();
    if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
        return Err(outside(format!("{name:?} is named as a file of weights")));
    }
    let path = folder.join(name);
    let real = |path: &Path| path.canonicalize().map_err(|e| Error::io("read", path, &e));
    let (target, home) = (real(&path)?, real(folder)?);
    // hub/models--ORG--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH
    let snapshots = home.parent().filter(|parent| parent.file_name().is_some_and(|n| n == "snapshots"));
    let blobs = snapshots.and_then(Path::parent).map(|model| model.join("blobs"));
    if !target.starts_with(&home) && !blobs.is_some_and(|blobs| target.starts_with(blobs)) {
        return Err(outside(format!("{name} is a link to {}", target.display())));
    }
    Ok(path)
}
