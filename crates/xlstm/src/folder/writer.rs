//! Writing safetensors files tensor by tensor, so that memory holds one at a time.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::engine::quantized::{GROUP, quantize};
use crate::engine::{Code, Format};
use crate::error::{Error, Result};

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What is written of its numbers.
    pub part: Part,
}

/// What a tensor holds of the numbers of a parameter.
#[derive(Clone, Copy, Debug)]
pub enum Part {
    /// All, rounded to a format.
    Dense(Format),
    /// Their codes: `shape` counts bytes.
    Codes(Code),
    /// The scales of the groups of these codes, in bf16.
    Scales(Code),
}

impl Part {
    fn dtype(self) -> &'static str {
        match self {
            Part::Dense(Format::F32) => "F32",
            Part::Dense(Format::Bf16) | Part::Scales(_) => "BF16",
            Part::Dense(Format::F16) => "F16",
            Part::Codes(Code::Int8) => "I8",
            Part::Codes(Code::Int4) => "U8",
        }
    }

    /// Bytes of an element.
    fn bytes(self) -> usize {
        match self {
            Part::Dense(format) => format.bytes(),
            Part::Codes(_) => 1,
            Part::Scales(_) => 2,
        }
    }

    /// Numbers of the parameter that an element stands for.
    fn numbers(self) -> usize {
        match self {
            Part::Dense(_) => 1,
            Part::Codes(code) => code.codes_a_byte(),
            Part::Scales(_) => GROUP,
        }
    }

    /// Appends the bytes of these numbers to `bytes`.
    fn encode(self, values: &[f32], bytes: &mut Vec<u8>) {
        match self {
            Part::Dense(format) => format.narrow(values, bytes),
            Part::Codes(code) => quantize(code, values, bytes, &mut Vec::new()),
            Part::Scales(code) => {
                let mut scales = Vec::new();
                quantize(code, values, &mut Vec::new(), &mut scales);
                bytes.extend(scales.into_iter().flat_map(u16::to_le_bytes));
            }
        }
    }
}

impl Entry {
    /// Its bytes.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.part.bytes()
    }
}

/// Writes a safetensors file; `values` is asked for the numbers of each entry, in order.
///
/// The file is not synced: folders are, before they are renamed.
///
/// # Errors
/// When the file cannot be written, `values` fails or has another number of values than the
/// shape.
pub fn write_tensors<'a>(
    path: &Path,
    entries: &[Entry],
    metadata: &[(&str, &str)],
    mut values: impl FnMut(usize) -> Result<Cow<'a, [f32]>>,
) -> Result<()> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        let texts = metadata.iter().map(|&(key, text)| (key.to_owned(), Value::from(text)));
        header.insert("__metadata__".into(), texts.collect::<Map<_, _>>().into());
    }
    let mut offset = 0;
    for entry in entries {
        let end = offset + entry.bytes();
        let value = json!({"dtype": entry.part.dtype(), "shape": entry.shape, "data_offsets": [offset, end]});
        if header.insert(entry.name.clone(), value).is_some() {
            return Err(Error::checkpoint(format!("{}: two tensors {}", path.display(), entry.name)));
        }
        offset = end;
    }
    let mut header = Value::from(header).to_string().into_bytes();
    // The data begin at a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    let failed = |e: std::io::Error| Error::io("write", path, &e);
    let mut file = BufWriter::new(File::create(path).map_err(failed)?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    file.write_all(&header).map_err(failed)?;
    for (index, entry) in entries.iter().enumerate() {
        let values = values(index)?;
        if values.len() != entry.shape.iter().product::<usize>() * entry.part.numbers() {
            let (found, name) = (values.len(), &entry.name);
            return Err(Error::checkpoint(format!("{found} values for tensor {name} {:?}", entry.shape)));
        }
        // On all threads a part each, and then in order.
        for parts in values.chunks(1 << 20) {
            let encode = |values: &[f32]| {
                let mut bytes = Vec::new();
                entry.part.encode(values, &mut bytes);
                bytes
            };
            let encoded: Vec<Vec<u8>> = parts.par_chunks(1 << 16).map(encode).collect();
            encoded.iter().try_for_each(|bytes| file.write_all(bytes)).map_err(failed)?;
        }
    }
    file.flush().map_err(failed)
}
