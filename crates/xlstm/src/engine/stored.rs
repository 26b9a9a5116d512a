//! Parameters as files store them, for inference: memory-mapped where they can be, weight
//! matrices in bf16 or f16 where they are stored so.

use std::fs::File;
use std::ops::{Deref, Range};
use std::str::FromStr;
use std::sync::Arc;

use memmap2::Mmap;

use super::narrow::{Half, Narrow, from_f16, to_f16};
use super::precision::{from_bf16, to_bf16};
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
}

/// One parameter.
#[derive(Clone, Debug)]
pub struct Stored<T>(Numbers<T>);

#[derive(Clone, Debug)]
enum Numbers<T> {
    Wide(Place<T>),
    Narrow(Half, Place<u16>),
}

/// What an operation is handed of a parameter.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Slice<'a, T> {
    Wide(&'a [T]),
    Narrow(Narrow<'a>),
}

impl<T: Scalar> Stored<T> {
    /// The concatenation of `pieces`, each of its format. Where `narrow` allows it, it stays in
    /// bf16 or f16 if all pieces are in that; one piece alone stays where it is if it can.
    pub fn new(pieces: &[(Format, Mapped)], narrow: bool) -> Stored<T> {
        let half = match pieces.first() {
            Some((Format::Bf16, _)) if narrow => Some(Half::Bf16),
            Some((Format::F16, _)) if narrow => Some(Half::F16),
            _ => None,
        };
        match half.filter(|_| pieces.iter().all(|(format, _)| *format == pieces[0].0)) {
            Some(half) => {
                let copied = || {
                    let halves = |bytes: &Mapped| bytes.as_chunks::<2>().0.to_vec();
                    pieces.iter().flat_map(|(_, bytes)| halves(bytes)).map(u16::from_le_bytes).collect()
                };
                Stored(Numbers::Narrow(half, mapped(pieces).unwrap_or_else(|| Place::Owned(copied()))))
            }
            None => {
                let same = size_of::<T>() == 4 && pieces.iter().all(|(format, _)| *format == Format::F32);
                let copied = || {
                    let wide = |(format, bytes): &(Format, Mapped)| format.widen(bytes);
                    pieces.iter().flat_map(wide).map(|x| T::from_f64(f64::from(x))).collect()
                };
                let place = if same { mapped(pieces) } else { None };
                Stored(Numbers::Wide(place.unwrap_or_else(|| Place::Owned(copied()))))
            }
        }
    }

    /// These numbers.
    pub fn owned(values: Vec<T>) -> Stored<T> {
        Stored(Numbers::Wide(Place::Owned(values)))
    }

    /// Bytes of its numbers as they are kept.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Numbers::Wide(place) => size_of_val(place.numbers()),
            Numbers::Narrow(_, place) => size_of_val(place.numbers()),
        }
    }

    /// Bytes in memory that no file backs.
    pub fn copied_bytes(&self) -> usize {
        match &self.0 {
            Numbers::Wide(Place::Owned(values)) => size_of_val(&values[..]),
            Numbers::Narrow(_, Place::Owned(values)) => size_of_val(&values[..]),
            Numbers::Wide(Place::Mapped(_)) | Numbers::Narrow(_, Place::Mapped(_)) => 0,
        }
    }

    /// `range` of its elements.
    pub(crate) fn slice(&self, range: Range<usize>) -> Slice<'_, T> {
        match &self.0 {
            Numbers::Wide(place) => Slice::Wide(&place.numbers()[range]),
            Numbers::Narrow(half, place) => {
                Slice::Narrow(Narrow { half: *half, bits: &place.numbers()[range] })
            }
        }
    }
}

/// The one piece where it lies, if it can be read there as numbers of type N.
fn mapped<N: bytemuck::Pod>(pieces: &[(Format, Mapped)]) -> Option<Place<N>> {
    let [(_, bytes)] = pieces else { return None };
    // Files are little-endian, and nothing makes their writers align tensors.
    let readable = cfg!(target_endian = "little") && bytemuck::try_cast_slice::<u8, N>(bytes).is_ok();
    readable.then(|| Place::Mapped(bytes.clone()))
}
