//! Parameters as files store them, for inference: memory-mapped where they can be, weight
//! matrices in as few bits as they are stored in.

use std::fs::File;
use std::ops::{Deref, Range};
use std::str::FromStr;
use std::sync::Arc;

use memmap2::Mmap;

use super::narrow::{Half, Narrow, from_f16, to_f16};
use super::precision::{from_bf16, to_bf16};
use super::quantized::{Code, GROUP, Quantized};
use super::scalar::Scalar;
use crate::error::{Error, Result};

/// A range of a memory-mapped file. A clone shares the map.
#[derive(Clone)]
pub struct Mapped {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl Mapped {
    /// All of a file.
    ///
    /// # Errors
    /// When the system cannot map it.
    pub fn new(file: &File) -> std::io::Result<Mapped> {
        // SAFETY: as with every memory map, somebody who cuts the file short while it is read ends
        // the process (a bus error); all other changes show as other numbers. Files of weights are
        // replaced by renaming, never written in place.
        let map = unsafe { Mmap::map(file)? };
        let range = 0..map.len();
        Ok(Mapped { map: Arc::new(map), range })
    }

    /// A part of it.
    pub fn slice(&self, range: Range<usize>) -> Mapped {
        assert!(range.start <= range.end && range.end <= self.range.len());
        let start = self.range.start;
        Mapped { map: self.map.clone(), range: start + range.start..start + range.end }
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

impl std::fmt::Debug for Mapped {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Mapped({} bytes)", self.len())
    }
}

/// Number formats of stored weights, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// f32.
    F32,
    /// The upper half of f32.
    Bf16,
    /// IEEE 754's half precision.
    F16,
}

impl Format {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::Bf16 | Format::F16 => 2,
        }
    }

    /// `f32`, `bf16` or `f16`.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::Bf16 => "bf16",
            Format::F16 => "f16",
        }
    }

    /// The numbers in `bytes`, exactly.
    pub fn widen(self, bytes: &[u8]) -> Vec<f32> {
        let halves = |widen: fn(u16) -> f32| {
            bytes.as_chunks::<2>().0.iter().map(|b| widen(u16::from_le_bytes(*b))).collect()
        };
        match self {
            Format::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Format::Bf16 => halves(from_bf16),
            Format::F16 => halves(from_f16),
        }
    }

    /// Appends the nearest numbers of this format to `bytes`, ties to even.
    pub fn narrow(self, values: &[f32], bytes: &mut Vec<u8>) {
        match self {
            Format::F32 => values.iter().for_each(|x| bytes.extend_from_slice(&x.to_le_bytes())),
            Format::Bf16 => values.iter().for_each(|x| bytes.extend_from_slice(&to_bf16(*x).to_le_bytes())),
            Format::F16 => values.iter().for_each(|x| bytes.extend_from_slice(&to_f16(*x).to_le_bytes())),
        }
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Format> {
        [Format::F32, Format::Bf16, Format::F16].into_iter().find(|format| format.name() == text).ok_or_else(
            || Error::config(format!("{text:?} is no number format")).hint("there are f32, bf16 and f16"),
        )
    }
}

/// Numbers of type N, in a file or copied from one.
#[derive(Clone, Debug)]
enum Place<N> {
    /// Aligned for N.
    Mapped(Mapped),
    Owned(Vec<N>),
}

impl<N: bytemuck::Pod> Place<N> {
    fn numbers(&self) -> &[N] {
        match self {
            Place::Mapped(bytes) => bytemuck::cast_slice(bytes),
            Place::Owned(numbers) => numbers,
        }
    }

    fn copied_bytes(&self) -> usize {
        match self {
            Place::Mapped(_) => 0,
            Place::Owned(numbers) => size_of_val(&numbers[..]),
        }
    }
}

/// In how few bits a weight can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Storable {
    /// As it is computed with.
    Wide,
    /// Also in 16 bits.
    Half,
    /// Also in groups of 8 or 4 bits.
    Quantized,
}

/// Numbers in a file: a tensor, or rows of one.
#[derive(Clone, Debug)]
pub enum Piece {
    /// Number by number.
    Dense(Format, Mapped),
    /// Codes, and the scales of their groups in bf16.
    Quantized(Code, Mapped, Mapped),
}

impl Piece {
    /// Its bytes in the file.
    pub fn bytes(&self) -> usize {
        match self {
            Piece::Dense(_, bytes) => bytes.len(),
            Piece::Quantized(_, codes, scales) => codes.len() + scales.len(),
        }
    }

    /// The numbers in f32.
    pub fn widen(&self) -> Vec<f32> {
        match self {
            Piece::Dense(format, bytes) => format.widen(bytes),
            Piece::Quantized(code, codes, scales) => {
                let scales = halves(scales).collect::<Vec<u16>>();
                let mut wide = vec![0.0; scales.len() * GROUP];
                Quantized { code: *code, codes, scales: &scales }.widen(&mut wide);
                wide
            }
        }
    }

    fn storable(&self) -> Storable {
        match self {
            Piece::Dense(Format::F32, _) => Storable::Wide,
            Piece::Dense(Format::Bf16 | Format::F16, _) => Storable::Half,
            Piece::Quantized(..) => Storable::Quantized,
        }
    }
}

/// One parameter.
#[derive(Clone, Debug)]
pub struct Stored<T>(Numbers<T>);

#[derive(Clone, Debug)]
enum Numbers<T> {
    Wide(Place<T>),
    Half(Half, Place<u16>),
    Quantized(Code, Place<u8>, Place<u16>),
}

/// What an operation is handed of a parameter.
#[derive(Clone, Copy, Debug)]
pub enum Slice<'a, T> {
    /// As numbers of the type that is computed with.
    Wide(&'a [T]),
    /// In fewer bits.
    Narrow(Narrow<'a>),
}

impl<T: Scalar> Stored<T> {
    /// The concatenation of `pieces`. Where `storable` allows it, it stays in the few bits that
    /// all pieces are in alike; one piece alone stays where it is if it can.
    pub fn new(pieces: &[Piece], storable: Storable) -> Stored<T> {
        let alike = |first: &Piece| {
            pieces.iter().all(|piece| match (piece, first) {
                (Piece::Dense(a, _), Piece::Dense(b, _)) => a == b,
                (Piece::Quantized(a, ..), Piece::Quantized(b, ..)) => a == b,
                _ => false,
            })
        };
        let first = pieces.first().filter(|first| first.storable() <= storable && alike(first));
        let dense = |piece: &Piece| match piece {
            Piece::Dense(_, bytes) => Some(bytes.clone()),
            Piece::Quantized(..) => None,
        };
        Stored(match first {
            Some(Piece::Quantized(code, ..)) => {
                let (codes, scales): (Vec<Mapped>, Vec<Mapped>) = pieces
                    .iter()
                    .filter_map(|piece| match piece {
                        Piece::Quantized(_, codes, scales) => Some((codes.clone(), scales.clone())),
                        Piece::Dense(..) => None,
                    })
                    .unzip();
                let copied = || codes.iter().flat_map(|bytes| bytes.to_vec()).collect();
                let codes = mapped(&codes).unwrap_or_else(|| Place::Owned(copied()));
                Numbers::Quantized(*code, codes, joined_halves(&scales))
            }
            Some(Piece::Dense(Format::Bf16, _)) => {
                Numbers::Half(Half::Bf16, joined_halves(&pieces.iter().filter_map(dense).collect::<Vec<_>>()))
            }
            Some(Piece::Dense(Format::F16, _)) => {
                Numbers::Half(Half::F16, joined_halves(&pieces.iter().filter_map(dense).collect::<Vec<_>>()))
            }
            first => {
                let place = match first {
                    Some(Piece::Dense(Format::F32, bytes)) if size_of::<T>() == 4 && pieces.len() == 1 => {
                        mapped(std::slice::from_ref(bytes))
                    }
                    _ => None,
                };
                let copied =
                    || pieces.iter().flat_map(Piece::widen).map(|x| T::from_f64(f64::from(x))).collect();
                Numbers::Wide(place.unwrap_or_else(|| Place::Owned(copied())))
            }
        })
    }

    /// These numbers.
    pub fn owned(values: Vec<T>) -> Stored<T> {
        Stored(Numbers::Wide(Place::Owned(values)))
    }

    /// Bytes of its numbers as they are kept.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Numbers::Wide(place) => size_of_val(place.numbers()),
            Numbers::Half(_, place) => size_of_val(place.numbers()),
            Numbers::Quantized(_, codes, scales) => {
                size_of_val(codes.numbers()) + size_of_val(scales.numbers())
            }
        }
    }

    /// Bytes in memory that no file backs.
    pub fn copied_bytes(&self) -> usize {
        match &self.0 {
            Numbers::Wide(place) => place.copied_bytes(),
            Numbers::Half(_, place) => place.copied_bytes(),
            Numbers::Quantized(_, codes, scales) => codes.copied_bytes() + scales.copied_bytes(),
        }
    }

    /// `range` of its elements.
    pub(crate) fn slice(&self, range: Range<usize>) -> Slice<'_, T> {
        match &self.0 {
            Numbers::Wide(place) => Slice::Wide(&place.numbers()[range]),
            Numbers::Half(half, place) => Slice::Narrow(Narrow::Half(*half, &place.numbers()[range])),
            Numbers::Quantized(code, codes, scales) => {
                let all = Quantized { code: *code, codes: codes.numbers(), scales: scales.numbers() };
                Slice::Narrow(Narrow::Quantized(all.at(range.start, range.len())))
            }
        }
    }
}

/// Little-endian numbers of 16 bits.
fn halves(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes))
}

fn joined_halves(pieces: &[Mapped]) -> Place<u16> {
    mapped(pieces).unwrap_or_else(|| Place::Owned(pieces.iter().flat_map(|bytes| halves(bytes)).collect()))
}

/// The one piece where it lies, if it can be read there as numbers of type N.
fn mapped<N: bytemuck::Pod>(pieces: &[Mapped]) -> Option<Place<N>> {
    let [bytes] = pieces else { return None };
    // Files are little-endian, and nothing makes their writers align tensors.
    let readable = cfg!(target_endian = "little") && bytemuck::try_cast_slice::<u8, N>(bytes).is_ok();
    readable.then(|| Place::Mapped(bytes.clone()))
}
