//! Products with weight matrices in bf16 or f16, on the processor: y = x W^T with x in f32 (or
//! f64), summed in that type.
//!
//! For few rows of x reading W is all the work: each row of W is read once, widened in registers
//! and multiplied with all of them. For many rows, tiles of W are widened into work space and go
//! through the library's product. What is cut where depends on shapes alone, so the result does
//! not depend on the number of threads.

use rayon::prelude::*;

use super::matrix::{MatMut, MatRef, Threads, product};
use super::operation::scratch;
use super::precision::from_bf16;
use super::scalar::Scalar;
use super::vector::{sum, vectorize};

/// The number formats of 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// The upper half of f32.
    Bf16,
    /// IEEE 754's half precision.
    F16,
}

/// Numbers of 16 bits.
#[derive(Clone, Copy, Debug)]
pub struct Narrow<'a> {
    /// What they are.
    pub half: Half,
    /// Their bits.
    pub bits: &'a [u16],
}

impl Narrow<'_> {
    /// Writes the same numbers to `wide`.
    pub fn widen<T: Scalar>(self, wide: &mut [T]) {
        match self.half {
            Half::Bf16 => vectorize!(|| widen(wide, self.bits, bf16)),
            Half::F16 => vectorize!(|| widen(wide, self.bits, f16)),
        }
    }

    /// `count` of the numbers from `first`.
    pub fn at(self, first: usize, count: usize) -> Self {
        Narrow { bits: &self.bits[first..first + count], ..self }
    }
}

/// The f32 that is this f16. Without branches, so that loops over it become SIMD code.
#[inline(always)]
pub(super) fn from_f16(x: u16) -> f32 {
    const SMALLEST_NORMAL: u32 = 113 << 23;
    let magnitude = u32::from(x & 0x7fff) << 13;
    let exponent = magnitude & 0x0f80_0000;
    // From the bias of 15 to that of 127; infinities and NaNs go to the top.
    let normal = magnitude + if exponent == 0x0f80_0000 { 224 << 23 } else { 112 << 23 };
    // A subnormal is the mantissa of a number with a hidden one, less that one.
    let subnormal = f32::from_bits(magnitude + SMALLEST_NORMAL) - f32::from_bits(SMALLEST_NORMAL);
    let bits = if exponent == 0 { subnormal.to_bits() } else { normal };
    f32::from_bits(bits | u32::from(x & 0x8000) << 16)
}

/// The nearest f16, ties to even.
pub(super) fn to_f16(x: f32) -> u16 {
    let sign = (x.to_bits() >> 16 & 0x8000) as u16;
    let magnitude = f32::from_bits(x.to_bits() & 0x7fff_ffff);
    let bits = if x.is_nan() {
        0x7e00
    } else if magnitude >= 65520.0 {
        0x7c00
    } else if magnitude < 6.103_515_6e-5 {
        // The sum's last place is worth 2^-24, f16's smallest step, so that the addition rounds.
        ((magnitude + 0.5).to_bits() - 0.5_f32.to_bits()) as u16
    } else {
        let bits = magnitude.to_bits() - (112 << 23);
        ((bits + 0xfff + (bits >> 13 & 1)) >> 13) as u16
    };
    sign | bits
}

#[inline(always)]
fn bf16<T: Scalar>(x: u16) -> T {
    // Folded away for f32.
    T::from_f64(f64::from(from_bf16(x)))
}

#[inline(always)]
fn f16<T: Scalar>(x: u16) -> T {
    T::from_f64(f64::from(from_f16(x)))
}

#[inline(always)]
fn widen<T: Scalar>(wide: &mut [T], bits: &[u16], element: impl Fn(u16) -> T) {
    for (wide, bits) in wide.iter_mut().zip(bits) {
        *wide = element(*bits);
    }
}

/// Up to so many rows, W is widened in registers.
const FEW: usize = 8;

/// Rows of W that a task takes then.
const TASK: usize = 16;

/// Elements of W that are widened at a time for more rows: they stay in the cache until they
/// are used.
const TILE: usize = 1 << 20;

/// y (rows, outer) = x (rows, inner) W^T, or y += with `accumulate`; W is `inner` columns from
/// `first` of a matrix of `outer` rows and `width` columns.
#[allow(clippy::too_many_arguments)]
pub fn linear<T: Scalar>(
    y: &mut [T],
    x: &[T],
    w: Narrow<'_>,
    [rows, inner, outer]: [usize; 3],
    [first, width]: [usize; 2],
    accumulate: bool,
    space: &mut Vec<T>,
) {
    if rows == 0 || outer == 0 || inner == 0 {
        if !accumulate {
            y.fill(T::ZERO);
        }
        return;
    }
    let row = |n: usize| w.at(n * width + first, inner);
    if rows <= FEW {
        // (outer, rows): what a task writes lies together.
        let columns = scratch(space, outer * rows);
        columns.par_chunks_mut(TASK * rows).enumerate().for_each(|(task, columns)| {
            let rows_of_w =
                columns.chunks_exact_mut(rows).enumerate().map(|(i, y)| (y, row(task * TASK + i).bits));
            match w.half {
                Half::Bf16 => vectorize!(|| rows_of_w.for_each(
                    #[inline(always)]
                    |(y, w)| dots(y, x, w, bf16)
                )),
                Half::F16 => vectorize!(|| rows_of_w.for_each(
                    #[inline(always)]
                    |(y, w)| dots(y, x, w, f16)
                )),
            }
        });
        for (n, column) in columns.chunks_exact(rows).enumerate() {
            for (r, &sum) in column.iter().enumerate() {
                let y = &mut y[r * outer + n];
                *y = if accumulate { *y + sum } else { sum };
            }
        }
        return;
    }
    let tile = (TILE / inner).clamp(1, outer);
    let wide = scratch(space, tile * inner);
    let mut y = MatMut::new(y, rows, outer);
    for start in (0..outer).step_by(tile) {
        let count = tile.min(outer - start);
        let wide = &mut wide[..count * inner];
        wide.par_chunks_mut(inner).enumerate().for_each(|(i, wide)| row(start + i).widen(wide));
        let w = MatRef::new(wide, count, inner);
        let y = y.columns_at(start, count);
        product(y, T::ONE, MatRef::new(x, rows, inner), w.t(), accumulate, Threads::All);
    }
}

/// y_r = x_r · w for each of up to [`FEW`] rows of x.
#[inline(always)]
fn dots<T: Scalar>(y: &mut [T], x: &[T], w: &[u16], element: impl Fn(u16) -> T + Copy) {
    let mut start = 0;
    while start < y.len() {
        let x = &x[start * w.len()..];
        match y.len() - start {
            1 => rows_dot::<T, 1, 64>(&mut y[start..], x, w, element),
            2 | 3 => rows_dot::<T, 2, 32>(&mut y[start..], x, w, element),
            _ => rows_dot::<T, 4, 16>(&mut y[start..], x, w, element),
        }
        start += match y.len() - start {
            1 => 1,
            2 | 3 => 2,
            _ => 4,
        };
    }
}

/// The same for R rows, in L partial sums each.
#[inline(always)]
fn rows_dot<T: Scalar, const R: usize, const L: usize>(
    y: &mut [T],
    x: &[T],
    w: &[u16],
    element: impl Fn(u16) -> T + Copy,
) {
    let inner = w.len();
    let x: [&[T]; R] = std::array::from_fn(|r| &x[r * inner..][..inner]);
    let mut lanes = [[T::ZERO; L]; R];
    let whole = inner / L * L;
    let mut k = 0;
    while k < whole {
        let wide: [T; L] = std::array::from_fn(
            #[inline(always)]
            |lane| element(w[k..k + L][lane]),
        );
        for r in 0..R {
            let x = &x[r][k..k + L];
            for lane in 0..L {
                lanes[r][lane] = x[lane].mul_add(wide[lane], lanes[r][lane]);
            }
        }
        k += L;
    }
    for r in 0..R {
        let mut rest = T::ZERO;
        for k in whole..inner {
            rest = x[r][k].mul_add(element(w[k]), rest);
        }
        y[r] = sum(&lanes[r]) + rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::precision::to_bf16;

    #[test]
    fn every_f16_is_widened_exactly_and_comes_back() {
        for bits in 0..=u16::MAX {
            let (exponent, mantissa) = (i32::from(bits >> 10 & 0x1f), f64::from(bits & 0x3ff));
            let magnitude = match exponent {
                0 => mantissa * 2_f64.powi(-24),
                31 if mantissa == 0.0 => f64::INFINITY,
                31 => f64::NAN,
                _ => (1.0 + mantissa / 1024.0) * 2_f64.powi(exponent - 15),
            };
            let want = if bits >> 15 == 1 { -magnitude } else { magnitude };
            let got = from_f16(bits);
            if want.is_nan() {
                assert!(got.is_nan() && from_f16(to_f16(got)).is_nan(), "{bits:04x}");
            } else {
                assert_eq!(f64::from(got), want, "{bits:04x}");
                assert_eq!(to_f16(got), bits, "{bits:04x}");
            }
        }
    }

    #[test]
    fn f16_rounds_to_the_nearest_and_ties_to_even() {
        // Between any two neighbours: just below the middle, the middle, just above it.
        for low in 0..0x7bff_u16 {
            let (a, b) = (f64::from(from_f16(low)), f64::from(from_f16(low + 1)));
            let middle = ((a + b) / 2.0) as f32;
            assert_eq!(f64::from(middle), (a + b) / 2.0);
            assert_eq!(to_f16(f32::from_bits(middle.to_bits() - 1)), low);
            assert_eq!(to_f16(middle), low + (low & 1));
            assert_eq!(to_f16(f32::from_bits(middle.to_bits() + 1)), low + 1);
        }
        assert_eq!(to_f16(65519.99), 0x7bff);
        assert_eq!((to_f16(65520.0), to_f16(f32::MAX), to_f16(-1e9)), (0x7c00, 0x7c00, 0xfc00));
    }

    /// y = x W^T over odd shapes, few rows and many, against the sum in f64.
    #[test]
    fn products_agree_with_the_sum_in_f64() {
        let number = |i: usize, seed: usize| ((i * 37 + seed * 11) % 193) as f32 / 97.0 - 1.0;
        for half in [Half::Bf16, Half::F16] {
            for rows in [1, 2, 3, 4, 5, 7, 8, 9, 33] {
                for (inner, outer) in [(1, 1), (3, 17), (15, 2), (64, 33), (77, 100), (257, 31)] {
                    for accumulate in [false, true] {
                        let (first, width) = (2, inner + 5);
                        let narrow = |i| match half {
                            Half::Bf16 => to_bf16(number(i, 1)),
                            Half::F16 => to_f16(number(i, 1)),
                        };
                        let bits: Vec<u16> = (0..outer * width).map(narrow).collect();
                        let w = Narrow { half, bits: &bits };
                        let mut wide = vec![0.0_f64; bits.len()];
                        w.widen(&mut wide);
                        let x: Vec<f32> = (0..rows * inner).map(|i| number(i, 2)).collect();
                        let start: Vec<f32> = (0..rows * outer).map(|i| number(i, 3)).collect();
                        let mut y = start.clone();
                        let size = [rows, inner, outer];
                        linear(&mut y, &x, w, size, [first, width], accumulate, &mut vec![f32::NAN; 7]);
                        let x64: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                        let mut y64: Vec<f64> = start.iter().map(|x| f64::from(*x)).collect();
                        linear(&mut y64, &x64, w, size, [first, width], accumulate, &mut Vec::new());
                        for (i, (got, got64)) in y.iter().zip(y64).enumerate() {
                            let (r, n) = (i / outer, i % outer);
                            let term = |k: usize| x64[r * inner + k] * wide[n * width + first + k];
                            let before = if accumulate { f64::from(start[i]) } else { 0.0 };
                            let want = before + (0..inner).map(term).sum::<f64>();
                            let case = format!("{half:?} {rows}x{inner}x{outer} [{i}]: {got} and {want}");
                            assert!((got64 - want).abs() < 1e-13 * inner as f64, "{case}");
                            assert!((f64::from(*got) - want).abs() < 1e-6 * inner as f64, "{case}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn many_tiles_are_one_product() {
        // More elements than a tile holds, and a last tile that is smaller.
        let (rows, inner, outer) = (9, 2048, 1030);
        let bits: Vec<u16> =
            (0..outer * inner).map(|i| to_bf16(((i * 7919) % 211) as f32 / 105.0 - 1.0)).collect();
        let w = Narrow { half: Half::Bf16, bits: &bits };
        let x: Vec<f64> = (0..rows * inner).map(|i| ((i * 31) % 101) as f64 / 50.0 - 1.0).collect();
        let run = |rows: usize| {
            let mut y = vec![f64::NAN; rows * outer];
            linear(&mut y, &x[..rows * inner], w, [rows, inner, outer], [0, inner], false, &mut Vec::new());
            y
        };
        for (many, few) in run(rows).chunks(outer).zip(run(8).chunks(outer)) {
            assert!(many.iter().zip(few).all(|(a, b)| (a - b).abs() < 1e-10));
        }
    }
}
