//! Weights in 8 or 4 bits, and their products with a few rows of activations.
//!
//! Every [`GROUP`] weights of a row share a scale in bf16: w = scale code, with codes from -127
//! to 127 in 8 bits and from -8 to 7 in 4. For a product the activations are put into groups of 8
//! bits in the same way, so that a group's part of a sum is exact in integers:
//!
//! ```text
//! y = Σ_groups scale_w scale_x Σ_i code_w,i code_x,i
//! ```
//!
//! In f64 nothing is rounded: weights are widened and multiplied with the activations as they
//! are, which is what the products in integers are held against.

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
    fn offset(self) -> i32 {
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
fn signed(code: Code, bytes: &[u8]) -> [i8; GROUP] {
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
    for group in weights.chunks_exact(GROUP) {
        let scale = match code {
            Code::Int8 => to_bf16(group.iter().fold(0.0_f32, |most, w| most.max(w.abs())) / 127.0),
            Code::Int4 => to_bf16(best_scale(group)),
        };
        scales.push(scale);
        let [low, high] = match code {
            Code::Int8 => [-127.0, 127.0],
            Code::Int4 => [-8.0, 7.0],
        };
        let nearest = |w: &f32| round(w, from_bf16(scale), low, high) as i8;
        match code {
            Code::Int8 => codes.extend(group.iter().map(|w| nearest(w) as u8)),
            Code::Int4 => {
                let (first, second) = group.split_at(GROUP / 2);
                let nibble = |w| (nearest(w) + 8) as u8;
                codes.extend(first.iter().zip(second).map(|(a, b)| nibble(a) | nibble(b) << 4));
            }
        }
    }
}

fn round(w: &f32, scale: f32, low: f32, high: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { (w / scale).round_ties_even().clamp(low, high) }
}

/// The scale for 4 bits of the least squared error among some: the extreme weight on -8 or a
/// little inside or outside of it, and for each the best scale of the codes that it gives.
fn best_scale(group: &[f32]) -> f32 {
    let extreme = group.iter().fold(0.0_f32, |most, w| if w.abs() > most.abs() { *w } else { most });
    let mut best = (f32::INFINITY, 0.0);
    for step in -8..=12 {
        let first = extreme / (-8.0 + 0.125 * step as f32);
        let (mut product, mut square) = (0.0, 0.0);
        for w in group {
            let code = round(w, first, -8.0, 7.0);
            product += w * code;
            square += code * code;
        }
        let scale = from_bf16(to_bf16(if square > 0.0 { product / square } else { 0.0 }));
        let error: f32 = group.iter().map(|w| (w - scale * round(w, scale, -8.0, 7.0)).powi(2)).sum();
        if error < best.0 {
            best = (error, scale);
        }
    }
    best.1
}

/// Codes of a product's sum that one 32-bit lane adds up.
const LANE: usize = 4;

/// A row of activations in groups of 8 bits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Activations<'a> {
    codes: &'a [i8],
    /// One a group.
    scales: &'a [f32],
    /// What the sum of each lane starts from: it takes out the offset of the weights' codes.
    start: &'a [i32],
}

/// Numbers of work space, each of 32 bits, for a row of `inner` activations.
pub fn activation_space(inner: usize) -> usize {
    inner / LANE * 2 + inner / GROUP
}

impl<'a> Activations<'a> {
    /// The nearest codes of a row of a whole number of groups, for a product with weights of
    /// `code`.
    pub fn new(x: &[f32], code: Code, space: &'a mut [f32]) -> Activations<'a> {
        let inner = x.len();
        let (scales, rest) = space.split_at_mut(inner / GROUP);
        let (codes, start) = rest.split_at_mut(inner / LANE);
        let codes: &mut [i8] = bytemuck::cast_slice_mut(codes);
        let start: &mut [i32] = bytemuck::cast_slice_mut(&mut start[..inner / LANE]);
        let offset = code.offset();
        vectorize!(|| {
            for (group, x) in x.chunks_exact(GROUP).enumerate() {
                let mut most = [0.0_f32; 16];
                for i in 0..16 {
                    most[i] = x[i].abs().max(x[i + 16].abs());
                }
                let mut largest = 0.0;
                for m in most {
                    largest = if m > largest { m } else { largest };
                }
                let scale = largest / 127.0;
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                scales[group] = scale;
                let codes = &mut codes[group * GROUP..][..GROUP];
                for i in 0..GROUP {
                    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
                    codes[i] = (x[i] * inverse + 12_582_912.0 - 12_582_912.0) as i8;
                }
                let start = &mut start[group * GROUP / LANE..][..GROUP / LANE];
                for (lane, start) in start.iter_mut().enumerate() {
                    let mut sum = 0;
                    for i in 0..LANE {
                        sum += i32::from(codes[lane * LANE + i]);
                    }
                    *start = -offset * sum;
                }
            }
        });
        Activations { codes, scales, start }
    }
}

/// y (rows of W, R) = W x_r: the product of R rows of activations with rows of quantised weights.
#[inline]
pub fn dots<const R: usize>(y: &mut [f32], x: &[Activations<'_>; R], w: Quantized<'_>) {
    let inner = x[0].codes.len();
    for (n, y) in y.chunks_exact_mut(R).enumerate() {
        let w = w.at(n * inner, inner);
        #[cfg(target_arch = "x86_64")]
        if vnni::is_there() {
            // SAFETY: the processor has the instructions.
            unsafe { vnni::dots(y, x, w) };
            continue;
        }
        plain::<R>(y, x, w);
    }
}

/// Partial sums of a row: lanes of 16, and of two groups each, in turn.
const PARTS: usize = 2;

/// The same without special instructions, bit for bit.
fn plain<const R: usize>(y: &mut [f32], x: &[Activations<'_>; R], w: Quantized<'_>) {
    const LANES: usize = GROUP / LANE;
    vectorize!(|| for r in 0..R {
        let mut sums = [[0.0_f32; 2 * LANES]; PARTS];
        let groups = w.codes.chunks_exact(w.code.group_bytes()).zip(w.scales);
        for (group, (codes, &scale)) in groups.enumerate() {
            let codes = signed(w.code, codes);
            let own = &x[r].codes[group * GROUP..][..GROUP];
            let scale = from_bf16(scale) * x[r].scales[group];
            let sums = &mut sums[group / 2 % PARTS][group % 2 * LANES..][..LANES];
            for (lane, sum) in sums.iter_mut().enumerate() {
                let mut product = 0;
                for i in lane * LANE..(lane + 1) * LANE {
                    product += i32::from(codes[i]) * i32::from(own[i]);
                }
                *sum = (product as f32).mul_add(scale, *sum);
            }
        }
        let mut all = sums[0];
        for lane in 0..2 * LANES {
            all[lane] += sums[1][lane];
        }
        y[r] = sum(&all);
    });
}

/// With the byte products of AVX-512.
#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::*;

    use super::{Activations, Code, GROUP, LANE, PARTS, Quantized, sum};

    pub fn is_there() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
    }

    /// Groups whose scales are read together.
    const BLOCK: usize = 16;

    /// Two groups are multiplied at a time: 64 codes in 16 lanes.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub fn dots<const R: usize>(y: &mut [f32], x: &[Activations<'_>; R], w: Quantized<'_>) {
        let groups = w.scales.len();
        let mut sums = [[_mm512_setzero_ps(); PARTS]; R];
        for first in (0..groups).step_by(BLOCK) {
            let count = BLOCK.min(groups - first);
            let mask = (1_u32 << count).wrapping_sub(1) as u16;
            // SAFETY: lanes beyond the last group are masked out.
            let scales = unsafe { _mm256_maskz_loadu_epi16(mask, w.scales[first..].as_ptr().cast()) };
            let scales = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(scales), 16));
            let mut own = [_mm512_setzero_ps(); R];
            for r in 0..R {
                // SAFETY: as above.
                let x = unsafe { _mm512_maskz_loadu_ps(mask, x[r].scales[first..].as_ptr()) };
                own[r] = _mm512_mul_ps(scales, x);
            }
            for pair in 0..count.div_ceil(2) {
                let group = first + 2 * pair;
                let alone = group + 1 == groups;
                let codes = codes(w, group, alone);
                // The first group's scale in the lower lanes, the second's in the upper.
                let index = _mm512_add_epi32(
                    _mm512_set1_epi32(2 * pair as i32),
                    _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0),
                );
                for r in 0..R {
                    let (x_codes, start) =
                        (&x[r].codes[group * GROUP..], &x[r].start[group * GROUP / LANE..]);
                    // SAFETY: both are of two groups, or of one that is masked.
                    let (x_codes, start) = unsafe {
                        if alone {
                            (
                                _mm512_maskz_loadu_epi8(0xffff_ffff, x_codes.as_ptr()),
                                _mm512_maskz_loadu_epi32(0xff, start.as_ptr()),
                            )
                        } else {
                            (
                                _mm512_loadu_si512(x_codes.as_ptr().cast()),
                                _mm512_loadu_si512(start.as_ptr().cast()),
                            )
                        }
                    };
                    let products = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, codes, x_codes));
                    let scale = _mm512_permutexvar_ps(index, own[r]);
                    let part = &mut sums[r][pair % PARTS];
                    *part = _mm512_fmadd_ps(products, scale, *part);
                }
            }
        }
        for r in 0..R {
            let mut lanes = [0.0_f32; 16];
            let all = _mm512_add_ps(sums[r][0], sums[r][1]);
            // SAFETY: 16 numbers have room.
            unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), all) };
            y[r] = sum(&lanes);
        }
    }

    /// The codes of two groups (zero for the second where the first is `alone`), from 0.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn codes(w: Quantized<'_>, group: usize, alone: bool) -> __m512i {
        match w.code {
            Code::Int8 => {
                let from = w.codes[group * GROUP..].as_ptr();
                // SAFETY: two groups of 32 bytes, or one that is masked.
                let codes = unsafe {
                    if alone {
                        _mm512_maskz_loadu_epi8(0xffff_ffff, from.cast())
                    } else {
                        _mm512_loadu_si512(from.cast())
                    }
                };
                _mm512_xor_si512(codes, _mm512_set1_epi8(-128))
            }
            Code::Int4 => {
                let from = w.codes[group * GROUP / 2..].as_ptr();
                // SAFETY: two groups of 16 bytes, or one that is masked.
                let bytes = unsafe {
                    if alone {
                        _mm256_maskz_loadu_epi8(0xffff, from.cast())
                    } else {
                        _mm256_loadu_si256(from.cast())
                    }
                };
                let twice = _mm512_permutexvar_epi64(
                    _mm512_set_epi64(3, 2, 3, 2, 1, 0, 1, 0),
                    _mm512_castsi256_si512(bytes),
                );
                let halves = _mm512_srlv_epi64(twice, _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0));
                _mm512_and_si512(halves, _mm512_set1_epi8(15))
            }
        }
    }
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
    fn products_are_those_of_the_codes() {
        for code in CODES {
            for groups in [1, 2, 3, 4, 15, 16, 17, 20, 33, 64] {
                let inner = groups * GROUP;
                let weights = numbers(3 * inner, 2);
                let (codes, scales) = quantized(code, &weights);
                let w = Quantized { code, codes: &codes, scales: &scales };
                let x = numbers(4 * inner, 3);
                let mut spaces = vec![vec![0.0; activation_space(inner)]; 4];
                let mut rows = spaces.iter_mut().zip(x.chunks(inner));
                let x: [Activations; 4] = std::array::from_fn(|_| {
                    let (space, x) = rows.next().unwrap();
                    Activations::new(x, code, space)
                });
                let mut y = [0.0; 12];
                dots(&mut y, &x, w);
                let mut wide = vec![0.0_f64; 3 * inner];
                w.widen(&mut wide);
                for (n, wide) in wide.chunks(inner).enumerate() {
                    let mut again = [0.0; 4];
                    plain(&mut again, &x, w.at(n * inner, inner));
                    assert_eq!(again, y[n * 4..n * 4 + 4], "{code:?}, {groups} groups: with and without");
                    for r in 0..4 {
                        let x = |i: usize| f64::from(x[r].codes[i]) * f64::from(x[r].scales[i / GROUP]);
                        let want: f64 = (0..inner).map(|i| wide[i] * x(i)).sum();
                        let error = (f64::from(y[n * 4 + r]) - want).abs();
                        assert!(
                            error < 1e-6 * inner as f64,
                            "{code:?} {groups}: {} and {want}",
                            y[n * 4 + r]
                        );
                    }
                    let mut one = [0.0];
                    dots(&mut one, &[x[2]], w.at(n * inner, inner));
                    assert_eq!(one[0], y[n * 4 + 2], "one row and several");
                }
            }
        }
    }

    #[test]
    fn activations_are_rounded_to_the_nearest_code() {
        let mut x = numbers(GROUP * 3, 5);
        x[GROUP..2 * GROUP].fill(0.0);
        let mut space = vec![f32::NAN; activation_space(x.len())];
        let rounded = Activations::new(&x, Code::Int8, &mut space);
        for (i, x) in x.iter().enumerate() {
            let scale = rounded.scales[i / GROUP];
            assert!((f32::from(rounded.codes[i]) * scale - x).abs() <= scale * 0.5001, "{i}");
        }
        assert!(rounded.codes.iter().any(|code| code.abs() == 127));
    }
}
