//! Weights in 8 or 4 bits.
//!
//! Every [`GROUP`] weights of a row share a scale in bf16: w = scale code, with codes from -127
//! to 127 in 8 bits and from -8 to 7 in 4. The products with them are in
//! [`integer_products`](super::integer_products).

use std::str::FromStr;

use super::precision::{from_bf16, to_bf16};
use super::scalar::Scalar;
use super::vector::{sum, vectorize};
use crate::error::{Error, Result};

/// Weights that share a scale.
pub const GROUP: usize = 32;

/// Bits of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// A code a byte.
    Int8,
    /// 16 bytes a group: code i in the lower half of byte i, code 16 + i in the upper; 8 is
    /// added to each.
    Int4,
}

impl Code {
    /// `int8` or `int4`.
    pub fn name(self) -> &'static str {
        match self {
            Code::Int8 => "int8",
            Code::Int4 => "int4",
        }
    }

    /// Bytes of `count` weights, a whole number of groups, and of their scales.
    pub fn bytes(self, count: usize) -> usize {
        count / GROUP * (self.group_bytes() + size_of::<u16>())
    }

    /// Codes in a byte.
    pub fn codes_a_byte(self) -> usize {
        GROUP / self.group_bytes()
    }

    /// The shape of the scales of a matrix whose codes, in bytes, are of this shape; None where
    /// that has no whole groups.
    pub fn scales_shape(self, codes: &[usize]) -> Option<Vec<usize>> {
        match codes {
            [rows, bytes] if Code::fits(bytes * self.codes_a_byte()) => {
                Some(vec![*rows, bytes / self.group_bytes()])
            }
            _ => None,
        }
    }

    /// Whether rows of `inner` weights are a whole number of groups.
    pub fn fits(inner: usize) -> bool {
        inner > 0 && inner.is_multiple_of(GROUP)
    }

    /// Bytes of the codes of a group.
    pub fn group_bytes(self) -> usize {
        match self {
            Code::Int8 => GROUP,
            Code::Int4 => GROUP / 2,
        }
    }

    /// What is added to a code to make it a number from 0.
    pub(super) fn offset(self) -> i32 {
        match self {
            Code::Int8 => 128,
            Code::Int4 => 8,
        }
    }
}

impl FromStr for Code {
    type Err = Error;

    fn from_str(text: &str) -> Result<Code> {
        [Code::Int8, Code::Int4].into_iter().find(|code| code.name() == text).ok_or_else(|| {
            Error::config(format!("{text:?} is no way to quantise")).hint("there are int8 and int4")
        })
    }
}

/// Quantised weights, a whole number of groups.
#[derive(Clone, Copy, Debug)]
pub struct Quantized<'a> {
    /// Bits of a code.
    pub code: Code,
    /// The codes.
    pub codes: &'a [u8],
    /// A scale a group, in bf16.
    pub scales: &'a [u16],
}

impl<'a> Quantized<'a> {
    /// `count` of the weights from `first`, both in whole groups.
    pub fn at(self, first: usize, count: usize) -> Quantized<'a> {
        debug_assert!(first.is_multiple_of(GROUP) && count.is_multiple_of(GROUP));
        let (first, count, bytes) = (first / GROUP, count / GROUP, self.code.group_bytes());
        Quantized {
            codes: &self.codes[first * bytes..(first + count) * bytes],
            scales: &self.scales[first..first + count],
            ..self
        }
    }

    /// Writes the weights that they stand for.
    pub fn widen<T: Scalar>(self, wide: &mut [T]) {
        vectorize!(|| {
            let groups = self.codes.chunks_exact(self.code.group_bytes()).zip(self.scales);
            for ((codes, &scale), wide) in groups.zip(wide.chunks_exact_mut(GROUP)) {
                let scale = T::from_f64(f64::from(from_bf16(scale)));
                let codes = signed(self.code, codes);
                for i in 0..GROUP {
                    wide[i] = scale * T::from_f64(f64::from(codes[i]));
                }
            }
        });
    }
}

/// The codes of a group.
#[inline(always)]
pub(super) fn signed(code: Code, bytes: &[u8]) -> [i8; GROUP] {
    let mut codes = [0; GROUP];
    match code {
        Code::Int8 => {
            for i in 0..GROUP {
                codes[i] = bytes[i] as i8;
            }
        }
        Code::Int4 => {
            for i in 0..GROUP / 2 {
                codes[i] = (bytes[i] & 15) as i8 - 8;
                codes[i + GROUP / 2] = (bytes[i] >> 4) as i8 - 8;
            }
        }
    }
    codes
}

/// Appends codes and scales of `weights`, a whole number of groups.
pub fn quantize(code: Code, weights: &[f32], codes: &mut Vec<u8>, scales: &mut Vec<u16>) {
    let range = match code {
        Code::Int8 => [-127.0, 127.0],
        Code::Int4 => [-8.0, 7.0],
    };
    for group in weights.as_chunks::<GROUP>().0 {
        let mut nearest = [0.0_f32; GROUP];
        let scale = vectorize!(|| {
            let scale = match code {
                Code::Int8 => to_bf16(extreme(group).abs() / 127.0),
                Code::Int4 => to_bf16(best_scale(group)),
            };
            for i in 0..GROUP {
                nearest[i] = round(group[i], from_bf16(scale), range);
            }
            scale
        });
        scales.push(scale);
        match code {
            Code::Int8 => codes.extend(nearest.map(|code| code as i8 as u8)),
            Code::Int4 => {
                let (low, high) = nearest.split_at(GROUP / 2);
                let nibble = |code: &f32| (code + 8.0) as u8;
                codes.extend(low.iter().zip(high).map(|(a, b)| nibble(a) | nibble(b) << 4));
            }
        }
    }
}

/// The number of the largest magnitude, or one that is none: the scale then shows it.
#[inline(always)]
fn extreme(group: &[f32; GROUP]) -> f32 {
    let mut most = 0.0_f32;
    for &w in group {
        most = if w.abs() > most.abs() || w.is_nan() { w } else { most };
    }
    most
}

/// The nearest code.
#[inline(always)]
fn round(w: f32, scale: f32, [low, high]: [f32; 2]) -> f32 {
    if scale == 0.0 { 0.0 } else { nearest_integer((w / scale).max(low).min(high)) }
}

/// For numbers of up to 22 bits: adding and taking away 1.5 * 2^23 rounds, ties to even.
#[inline(always)]
pub(super) fn nearest_integer(x: f32) -> f32 {
    x + 12_582_912.0 - 12_582_912.0
}

/// The scale for 4 bits of the least squared error among some: the extreme weight on -8 or a
/// little inside or outside of it, and for each the best scale of the codes that it gives.
#[inline(always)]
fn best_scale(group: &[f32; GROUP]) -> f32 {
    let range = [-8.0, 7.0];
    let extreme = extreme(group);
    let mut best = (f32::INFINITY, extreme / -8.0);
    for step in -8..=12 {
        let first = extreme / (-8.0 + 0.125 * step as f32);
        let (mut products, mut squares) = ([0.0; GROUP], [0.0; GROUP]);
        for i in 0..GROUP {
            let code = round(group[i], first, range);
            products[i] = group[i] * code;
            squares[i] = code * code;
        }
        let square = sum(&squares);
        let scale = from_bf16(to_bf16(if square > 0.0 { sum(&products) / square } else { 0.0 }));
        let mut errors = [0.0; GROUP];
        for i in 0..GROUP {
            let error = group[i] - scale * round(group[i], scale, range);
            errors[i] = error * error;
        }
        let error = sum(&errors);
        if error < best.0 {
            best = (error, scale);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    const CODES: [Code; 2] = [Code::Int8, Code::Int4];

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed, 0);
        (0..count).map(|_| rng.normal() as f32).collect()
    }

    fn quantized(code: Code, weights: &[f32]) -> (Vec<u8>, Vec<u16>) {
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        quantize(code, weights, &mut codes, &mut scales);
        (codes, scales)
    }

    #[test]
    fn weights_come_back_within_half_a_step() {
        let mut weights = numbers(GROUP * 40, 1);
        // Zeros, one sign only, an outlier, tiny ones.
        weights[..GROUP].fill(0.0);
        weights[GROUP..2 * GROUP].iter_mut().for_each(|w| *w = w.abs());
        weights[2 * GROUP] = -100.0;
        weights[3 * GROUP..4 * GROUP].iter_mut().for_each(|w| *w *= 1e-20);
        for code in CODES {
            let (codes, scales) = quantized(code, &weights);
            assert_eq!((codes.len(), scales.len()), (40 * code.group_bytes(), 40));
            let mut wide = vec![f32::NAN; weights.len()];
            Quantized { code, codes: &codes, scales: &scales }.widen(&mut wide);
            let (mut error, mut all) = (0.0, 0.0);
            for (group, (wide, weights)) in wide.chunks(GROUP).zip(weights.chunks(GROUP)).enumerate() {
                let most = weights.iter().fold(0.0_f32, |most, w| most.max(w.abs()));
                // bf16 scales are off by up to 1/256; in 4 bits the extremes may be cut for the rest.
                let step = match code {
                    Code::Int8 => most / 127.0 * 1.01,
                    Code::Int4 => most / 8.0 * 2.2,
                };
                for (a, b) in wide.iter().zip(weights) {
                    assert!((a - b).abs() <= step / 2.0 + most / 256.0, "{code:?} {group}: {a} and {b}");
                    if group != 2 {
                        error += (a - b).powi(2);
                        all += b * b;
                    }
                }
            }
            let relative = (error / all).sqrt();
            let bound = if code == Code::Int8 { 0.008 } else { 0.09 };
            assert!(relative < bound, "{code:?}: {relative}");
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for code in CODES {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut weights = numbers(2 * GROUP, 1);
                weights[5] = bad;
                let (codes, scales) = quantized(code, &weights);
                let mut wide = vec![0.0_f32; 2 * GROUP];
                Quantized { code, codes: &codes, scales: &scales }.widen(&mut wide);
                assert!(wide[..GROUP].iter().any(|w| !w.is_finite()), "{code:?} {bad}");
                assert!(wide[GROUP..].iter().all(|w| w.is_finite()), "{code:?} {bad}");
            }
        }
    }
}
