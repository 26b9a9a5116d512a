//! Writing safetensors files tensor by tensor, so that memory holds one at a time.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::engine::stored::Format;
use crate::error::{Error, Result};

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What its elements are rounded to.
    pub format: Format,
}

impl Entry {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.format.bytes()
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
        let dtype = entry.format.name().to_uppercase();
        let value = json!({"dtype": dtype, "shape": entry.shape, "data_offsets": [offset, end]});
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
    let mut bytes = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let values = values(index)?;
        if values.len() * entry.format.bytes() != entry.bytes() {
            let (found, name) = (values.len(), &entry.name);
            return Err(Error::checkpoint(format!("{found} values for tensor {name} {:?}", entry.shape)));
        }
        for part in values.chunks(1 << 16) {
            bytes.clear();
            entry.format.narrow(part, &mut bytes);
            file.write_all(&bytes).map_err(failed)?;
        }
    }
    file.flush().map_err(failed)
}
