//! A shard: the tokens of some documents, in memory or in a memory-mapped file.
//!
//! Both hold the same bytes, those of a safetensors file, so that there is one way to read
//! tokens. Its tensors are
//! - `tokens` (N), U16 or U32: the ids, little-endian;
//! - `pieces` (P, 4), U32: for each piece of text the place of its first token, the bytes and the
//!   words of its text, and 1 where a document begins with it.
//!
//! The metadata's key `xlstm` holds a [`Header`] as JSON.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::documents::{Cursor, Skipped};
use crate::rng::mix;
use crate::{Error, Result};

const TOKENS: &str = "tokens";
const PIECES: &str = "pieces";
const HEADER: &str = "xlstm";
/// The newest version of the format.
const VERSION: u32 = 1;

/// What a shard says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    pub version: u32,
    /// Fingerprint of the tokenizer.
    pub tokenizer: String,
    /// Hash of tokens and pieces.
    pub checksum: String,
    /// Where the reading goes on after this shard.
    pub cursor: Cursor,
    /// What was skipped in this shard and those before it.
    pub skipped: Skipped,
}

/// The width of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Width {
    /// Two bytes, for vocabularies of up to 65,536.
    U16,
    /// Four bytes.
    U32,
}

impl Width {
    /// The narrowest width for a vocabulary of `size`.
    pub(super) fn of(size: usize) -> Width {
        if size <= 1 << 16 { Width::U16 } else { Width::U32 }
    }

    /// 16 or 32.
    pub fn bits(self) -> usize {
        8 * self.bytes()
    }

    fn bytes(self) -> usize {
        match self {
            Width::U16 => 2,
            Width::U32 => 4,
        }
    }
}

/// A piece of text in a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PieceEntry {
    /// The place of its first token in the shard.
    pub start: usize,
    /// Bytes of its text.
    pub bytes: u64,
    /// Words of its text.
    pub words: u64,
    /// Whether a document begins with it.
    pub begins: bool,
}

/// A shard that is being written.
pub(super) struct Builder {
    width: Width,
    tokens: Vec<u8>,
    pieces: Vec<u8>,
    /// Bytes of text in it.
    pub text_bytes: u64,
}

impl Builder {
    pub fn new(width: Width) -> Builder {
        Builder { width, tokens: Vec::new(), pieces: Vec::new(), text_bytes: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Appends a piece of text of this many bytes and words; one without tokens leaves no trace.
    ///
    /// # Errors
    /// Sizes beyond what the format holds.
    pub fn push(&mut self, ids: &[u32], bytes: u64, words: u64, begins: bool) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        let start = (self.tokens.len() / self.width.bytes()) as u64;
        for number in [start, bytes, words, begins.into()] {
            let number = u32::try_from(number).map_err(|_| {
                Error::data(format!("expected pieces of text below 4 GiB, found one of {bytes} bytes"))
                    .hint("put line breaks into the text, or more documents into smaller files")
            })?;
            self.pieces.extend_from_slice(&number.to_le_bytes());
        }
        match self.width {
            // Ids below the size of a vocabulary that chose this width.
            Width::U16 => {
                ids.iter().for_each(|&id| self.tokens.extend_from_slice(&(id as u16).to_le_bytes()))
            }
            Width::U32 => ids.iter().for_each(|&id| self.tokens.extend_from_slice(&id.to_le_bytes())),
        }
        self.text_bytes += bytes;
        Ok(())
    }

    /// The bytes of the shard; the builder is then empty.
    pub fn finish(&mut self, tokenizer: &str, cursor: Cursor, skipped: Skipped) -> Result<Vec<u8>> {
        let (tokens, pieces) = (std::mem::take(&mut self.tokens), std::mem::take(&mut self.pieces));
        self.text_bytes = 0;
        let checksum = checksum(&tokens, &pieces);
        let header = Header { version: VERSION, tokenizer: tokenizer.into(), checksum, cursor, skipped };
        let internal = |e: String| Error::data(format!("cannot write a token shard: {e}"));
        let header = serde_json::to_string(&header).map_err(|e| internal(e.to_string()))?;
        let dtype = match self.width {
            Width::U16 => Dtype::U16,
            Width::U32 => Dtype::U32,
        };
        let count = tokens.len() / self.width.bytes();
        let view =
            |dtype, shape, data| TensorView::new(dtype, shape, data).map_err(|e| internal(e.to_string()));
        let tensors = [
            (TOKENS, view(dtype, vec![count], &tokens)?),
            (PIECES, view(Dtype::U32, vec![pieces.len() / 16, 4], &pieces)?),
        ];
        safetensors::serialize(tensors, Some(HashMap::from([(HEADER.to_owned(), header)])))
            .map_err(|e| internal(e.to_string()))
    }
}

/// A hash against damage, not against malice.
fn checksum(tokens: &[u8], pieces: &[u8]) -> String {
    let mut hash = mix(tokens.len() as u64);
    for bytes in [tokens, pieces] {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            hash = mix(hash ^ u64::from_le_bytes(word));
        }
    }
    format!("{hash:016x}")
}

/// Where the bytes are.
enum Storage {
    Memory(Vec<u8>),
    Mapped(Mmap),
}

impl Storage {
    fn bytes(&self) -> &[u8] {
        match self {
            Storage::Memory(bytes) => bytes,
            Storage::Mapped(map) => map,
        }
    }
}

/// A shard that is read.
pub(super) struct Shard {
    storage: Storage,
    width: Width,
    tokens: Range<usize>,
    pieces: Range<usize>,
    header: Header,
    /// Documents that begin in it.
    documents: usize,
    bytes: u64,
    words: u64,
}

impl Shard {
    /// The shard of these bytes.
    pub fn of_bytes(bytes: Vec<u8>) -> Result<Shard> {
        Shard::of(Storage::Memory(bytes)).map_err(|e| Error::data(format!("a token shard is damaged: {e}")))
    }

    /// Maps the shard at `path` into memory; tokens are read from the disk when they are used.
    ///
    /// # Errors
    /// A file that is missing or is not a whole shard.
    pub fn open(path: &Path) -> Result<Shard> {
        let file = File::open(path).map_err(|e| Error::io("read", path, &e))?;
        // SAFETY: the map is only read, as bytes, for which every value is valid. Shards are never
        // changed in place: they are written beside and renamed. Whoever shortens one under a
        // running program ends that with a bus error, as with every mapped file.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map", path, &e))?;
        Shard::of(Storage::Mapped(map)).map_err(|e| {
            Error::data(format!("expected a token shard at {}, found: {e}", path.display()))
                .hint("prepare the data again")
        })
    }

    fn of(storage: Storage) -> std::result::Result<Shard, String> {
        let bytes = storage.bytes();
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
        let header = metadata.metadata().as_ref().and_then(|map| map.get(HEADER));
        let header = header.ok_or("a safetensors file of another kind")?;
        let header: Header = serde_json::from_str(header).map_err(|e| e.to_string())?;
        if header.version != VERSION {
            return Err(format!("version {} of the format, not {VERSION}", header.version));
        }
        let within = |view: &TensorView| {
            let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            start..start + view.data().len()
        };
        let tokens = tensors.tensor(TOKENS).map_err(|e| e.to_string())?;
        let pieces = tensors.tensor(PIECES).map_err(|e| e.to_string())?;
        let width = match tokens.dtype() {
            Dtype::U16 => Width::U16,
            Dtype::U32 => Width::U32,
            other => return Err(format!("tokens of type {other:?}")),
        };
        if pieces.dtype() != Dtype::U32 || pieces.shape().len() != 2 || pieces.shape()[1] != 4 {
            return Err(format!("pieces of shape {:?}", pieces.shape()));
        }
        let (tokens, pieces) = (within(&tokens), within(&pieces));
        let mut shard = Shard { storage, width, tokens, pieces, header, documents: 0, bytes: 0, words: 0 };
        shard.count()?;
        Ok(shard)
    }

    /// Adds up the pieces, which must be in order.
    fn count(&mut self) -> std::result::Result<(), String> {
        let (mut documents, mut bytes, mut words) = (0, 0, 0);
        for index in 0..self.piece_count() {
            let piece = self.piece(index);
            let in_order =
                if index == 0 { piece.start == 0 } else { piece.start > self.piece(index - 1).start };
            if !in_order || piece.start >= self.len() {
                return Err(format!("piece {index} begins at token {}", piece.start));
            }
            documents += usize::from(piece.begins);
            (bytes, words) = (bytes + piece.bytes, words + piece.words);
        }
        (self.documents, self.bytes, self.words) = (documents, bytes, words);
        if self.piece_count() == 0 { Err("no tokens".into()) } else { Ok(()) }
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    pub fn width(&self) -> Width {
        self.width
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len() / self.width.bytes()
    }

    /// The number of documents that begin here.
    pub fn documents(&self) -> usize {
        self.documents
    }

    /// Bytes of the text.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Words of the text.
    pub fn words(&self) -> u64 {
        self.words
    }

    /// Whether the content is what was written.
    pub fn is_sound(&self) -> bool {
        let bytes = self.storage.bytes();
        checksum(&bytes[self.tokens.clone()], &bytes[self.pieces.clone()]) == self.header.checksum
    }

    /// Appends the tokens in `range` to `ids`.
    pub fn read(&self, range: Range<usize>, ids: &mut Vec<u32>) {
        let width = self.width.bytes();
        let tokens = &self.storage.bytes()[self.tokens.clone()][range.start * width..range.end * width];
        match self.width {
            Width::U16 => {
                ids.extend(tokens.as_chunks::<2>().0.iter().map(|&id| u32::from(u16::from_le_bytes(id))));
            }
            Width::U32 => ids.extend(tokens.as_chunks::<4>().0.iter().map(|&id| u32::from_le_bytes(id))),
        }
    }

    /// The number of pieces.
    pub fn piece_count(&self) -> usize {
        self.pieces.len() / 16
    }

    /// Piece `index`.
    pub fn piece(&self, index: usize) -> PieceEntry {
        let row = &self.storage.bytes()[self.pieces.clone()][16 * index..16 * (index + 1)];
        let numbers = row.as_chunks::<4>().0;
        let number = |place: usize| u32::from_le_bytes(numbers[place]);
        PieceEntry {
            start: number(0) as usize,
            bytes: number(1).into(),
            words: number(2).into(),
            begins: number(3) != 0,
        }
    }

    /// The first piece that begins at token `place` or after it.
    pub fn first_piece_from(&self, place: usize) -> usize {
        let (mut low, mut high) = (0, self.piece_count());
        while low < high {
            let middle = low.midpoint(high);
            if self.piece(middle).start < place { low = middle + 1 } else { high = middle }
        }
        low
    }
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Shard({} tokens, {} documents)", self.len(), self.documents)
    }
}

/// The name of shard `number`.
pub(super) fn shard_name(number: usize) -> PathBuf {
    format!("tokens-{number:05}.safetensors").into()
}
