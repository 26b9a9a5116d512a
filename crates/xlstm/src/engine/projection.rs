//! y = x W^T with W as it is stored, on the processor.
//!
//! For few rows of x, as decoding has them, reading W is all the work: each row of W is read
//! once, on all threads, and multiplied with all rows of x (the library's product leaves all but
//! one thread idle there). For many rows W goes through the library's product; in tiles that are
//! widened into work space, where it is stored in fewer bits. What is cut where depends on shapes
//! alone, so the result does not depend on the number of threads.

use rayon::prelude::*;

use super::integer_products::{Activations, Rows, activation_space, dots};
use super::matrix::{MatMut, MatRef, Threads, product};
use super::narrow::{Bf16, F16, Half, Narrow, Widen};
use super::operation::scratch;
use super::quantized::Quantized;
use super::scalar::Scalar;
use super::stored::Slice;
use super::vector::{sum, vectorize};

/// Up to so many rows of x are few.
const FEW: usize = 8;

/// Bytes of W that a task takes then: a few microseconds' worth.
const TASK: usize = 1 << 15;

/// Elements of W that are widened at a time for more rows: they stay in the cache until they
/// are used.
const TILE: usize = 1 << 20;

/// y (rows, outer) = x (rows, inner) W^T, or y += with `accumulate`; W is `inner` columns from
/// `first` of a matrix of `outer` rows and `width` columns.
#[allow(clippy::too_many_arguments)]
pub fn project<T: Scalar>(
    y: &mut [T],
    x: &[T],
    w: Slice<'_, T>,
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
    if rows <= FEW {
        // (outer, rows): what a task writes lies together.
        let columns = scratch(space, outer * rows + rows * activation_space(inner));
        let (columns, codes) = columns.split_at_mut(outer * rows);
        few(columns, x, w, [rows, inner], [first, width], codes);
        for (n, column) in columns.chunks_exact(rows).enumerate() {
            for (r, &sum) in column.iter().enumerate() {
                let y = &mut y[r * outer + n];
                *y = if accumulate { *y + sum } else { sum };
            }
        }
        return;
    }
    let x = MatRef::new(x, rows, inner);
    let mut y = MatMut::new(y, rows, outer);
    let w = match w {
        Slice::Narrow(w) => w,
        Slice::Wide(w) => {
            let w = MatRef::new(w, outer, width).columns_at(first, inner);
            return product(y, T::ONE, x, w.t(), accumulate, Threads::All);
        }
    };
    let tile = (TILE / inner).clamp(1, outer);
    let wide = scratch(space, tile * inner);
    for start in (0..outer).step_by(tile) {
        let count = tile.min(outer - start);
        let wide = &mut wide[..count * inner];
        wide.par_chunks_mut(inner)
            .enumerate()
            .for_each(|(i, wide)| w.at((start + i) * width + first, inner).widen(wide));
        let w = MatRef::new(wide, count, inner);
        product(y.columns_at(start, count), T::ONE, x, w.t(), accumulate, Threads::All);
    }
}

/// columns (outer, rows) = W x^T; `codes` is space for quantised rows of x.
fn few<T: Scalar>(
    columns: &mut [T],
    x: &[T],
    w: Slice<'_, T>,
    [rows, inner]: [usize; 2],
    [first, width]: [usize; 2],
    codes: &mut [T],
) {
    let bits = match w {
        Slice::Wide(_) => 8 * size_of::<T>(),
        Slice::Narrow(Narrow::Half(..)) => 16,
        Slice::Narrow(Narrow::Quantized(w)) => 8 / w.code.codes_a_byte(),
    };
    let task = (TASK * 8 / bits / inner).max(1);
    let tasks = columns.par_chunks_mut(task * rows).enumerate();
    let start = |i: usize| i * task * width + first;
    match w {
        Slice::Wide(w) => tasks.for_each(|(i, y)| {
            vectorize!(|| dense::<T, Same>(y, x, &w[start(i)..], [rows, inner, width]));
        }),
        Slice::Narrow(Narrow::Half(Half::Bf16, w)) => tasks.for_each(|(i, y)| {
            vectorize!(|| dense::<T, Bf16>(y, x, &w[start(i)..], [rows, inner, width]));
        }),
        Slice::Narrow(Narrow::Half(Half::F16, w)) => tasks.for_each(|(i, y)| {
            vectorize!(|| dense::<T, F16>(y, x, &w[start(i)..], [rows, inner, width]));
        }),
        Slice::Narrow(Narrow::Quantized(w)) => {
            let single =
                (bytemuck::try_cast_slice::<T, f32>(x), bytemuck::try_cast_slice_mut::<T, f32>(codes));
            let (Ok(x), Ok(codes), 4) = (single.0, single.1, size_of::<T>()) else {
                return tasks.for_each(|(i, y)| widened(y, x, w, start(i), [rows, inner, width]));
            };
            let space = codes.chunks_exact_mut(activation_space(inner));
            let mut x = x.chunks_exact(inner).zip(space).map(|(x, space)| Activations::new(x, w.code, space));
            let nothing = Activations::default();
            let x: [Activations; FEW] = std::array::from_fn(|_| x.next().unwrap_or(nothing));
            tasks.for_each(|(i, y)| {
                let w = Rows { weights: w, first: start(i), stride: width };
                coded(bytemuck::cast_slice_mut(y), &x[..rows], w);
            });
        }
    }
}

/// W as numbers of the type of x.
struct Same;

impl<T: Scalar> Widen<T> for Same {
    type Bits = T;
    #[inline(always)]
    fn number(bits: T) -> T {
        bits
    }
}

/// y (count, rows) = W x^T, for the rows of W that y has room for.
#[inline(always)]
fn dense<T: Scalar, W: Widen<T>>(y: &mut [T], x: &[T], w: &[W::Bits], [rows, inner, width]: [usize; 3]) {
    for (n, y) in y.chunks_exact_mut(rows).enumerate() {
        let w = &w[n * width..][..inner];
        let mut start = 0;
        while start < rows {
            let x = &x[start * inner..];
            match rows - start {
                1 => rows_dot::<T, W, 1, 64>(&mut y[start..], x, w),
                2 | 3 => rows_dot::<T, W, 2, 32>(&mut y[start..], x, w),
                _ => rows_dot::<T, W, 4, 16>(&mut y[start..], x, w),
            }
            start += [0, 1, 2, 2, 4][(rows - start).min(4)];
        }
    }
}

/// y_r = x_r · w for R rows of x, in L partial sums each.
#[inline(always)]
fn rows_dot<T: Scalar, W: Widen<T>, const R: usize, const L: usize>(y: &mut [T], x: &[T], w: &[W::Bits]) {
    let inner = w.len();
    let mut lanes = [[T::ZERO; L]; R];
    let whole = inner / L * L;
    let mut k = 0;
    while k < whole {
        let mut wide = [T::ZERO; L];
        let bits = &w[k..k + L];
        for lane in 0..L {
            wide[lane] = W::number(bits[lane]);
        }
        for r in 0..R {
            let x = &x[r * inner + k..][..L];
            for lane in 0..L {
                lanes[r][lane] = x[lane].mul_add(wide[lane], lanes[r][lane]);
            }
        }
        k += L;
    }
    for r in 0..R {
        let mut rest = T::ZERO;
        for k in whole..inner {
            rest = x[r * inner + k].mul_add(W::number(w[k]), rest);
        }
        y[r] = sum(&lanes[r]) + rest;
    }
}

/// y (count, rows) = W x^T for quantised weights.
fn coded(y: &mut [f32], x: &[Activations<'_>], w: Rows<'_>) {
    let rows = x.len();
    let mut start = 0;
    while start < rows {
        let y = &mut y[start..];
        start += match x[start..] {
            [a, b, c, d, ..] => {
                dots(y, rows, &[a, b, c, d], w);
                4
            }
            [a, b, ..] => {
                dots(y, rows, &[a, b], w);
                2
            }
            [a] => {
                dots(y, rows, &[a], w);
                1
            }
            [] => return,
        };
    }
}

/// The same in f64, without rounding x.
fn widened<T: Scalar>(
    y: &mut [T],
    x: &[T],
    w: Quantized<'_>,
    start: usize,
    [rows, inner, width]: [usize; 3],
) {
    let mut wide = vec![T::ZERO; inner];
    for (n, y) in y.chunks_exact_mut(rows).enumerate() {
        w.at(start + n * width, inner).widen(&mut wide);
        vectorize!(|| dense::<T, Same>(y, x, &wide, [rows, inner, inner]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::narrow::to_f16;
    use crate::engine::precision::to_bf16;
    use crate::engine::quantized::{Code, GROUP, quantize};

    fn number(i: usize, seed: usize) -> f32 {
        ((i * 37 + seed * 11) % 193) as f32 / 97.0 - 1.0
    }

    /// Weights stored in some way.
    #[derive(Debug)]
    enum Case {
        Wide(Vec<f32>, Vec<f64>),
        Half(Half, Vec<u16>),
        Quantized(Code, Vec<u8>, Vec<u16>),
    }

    impl Case {
        fn all(count: usize) -> Vec<Case> {
            let weights: Vec<f32> = (0..count).map(|i| number(i, 1)).collect();
            let halves = |to: fn(f32) -> u16| weights.iter().map(|w| to(*w)).collect();
            let mut cases = vec![
                Case::Wide(weights.clone(), weights.iter().map(|w| f64::from(*w)).collect()),
                Case::Half(Half::Bf16, halves(to_bf16)),
                Case::Half(Half::F16, halves(to_f16)),
            ];
            for code in [Code::Int8, Code::Int4] {
                let (mut codes, mut scales) = (Vec::new(), Vec::new());
                quantize(code, &weights, &mut codes, &mut scales);
                cases.push(Case::Quantized(code, codes, scales));
            }
            cases
        }

        fn narrow(&self) -> Option<Narrow<'_>> {
            match self {
                Case::Wide(..) => None,
                Case::Half(half, bits) => Some(Narrow::Half(*half, bits)),
                Case::Quantized(code, codes, scales) => {
                    Some(Narrow::Quantized(Quantized { code: *code, codes, scales }))
                }
            }
        }

        fn single(&self) -> Slice<'_, f32> {
            match (self, self.narrow()) {
                (Case::Wide(weights, _), _) => Slice::Wide(weights),
                (_, narrow) => Slice::Narrow(narrow.unwrap()),
            }
        }

        fn double(&self) -> Slice<'_, f64> {
            match (self, self.narrow()) {
                (Case::Wide(_, weights), _) => Slice::Wide(weights),
                (_, narrow) => Slice::Narrow(narrow.unwrap()),
            }
        }

        fn values(&self, count: usize) -> Vec<f64> {
            let mut wide = vec![0.0; count];
            match self.double() {
                Slice::Wide(weights) => wide.copy_from_slice(weights),
                Slice::Narrow(weights) => weights.widen(&mut wide),
            }
            wide
        }
    }

    /// Every way of storing W, over odd shapes, few rows and many, against the sum in f64.
    #[test]
    fn products_agree_with_the_sum_in_f64() {
        for rows in [1, 2, 3, 4, 5, 7, 8, 9, 33] {
            for (inner, outer) in [(1, 1), (3, 17), (15, 2), (64, 33), (77, 100), (257, 31), (160, 200)] {
                let (first, width) =
                    if inner % GROUP == 0 { (GROUP, inner + 2 * GROUP) } else { (2, inner + 5) };
                for case in Case::all(outer * width) {
                    let quantized = matches!(case, Case::Quantized(..));
                    if quantized && inner % GROUP != 0 {
                        continue;
                    }
                    for accumulate in [false, true] {
                        let wide = case.values(outer * width);
                        let x: Vec<f32> = (0..rows * inner).map(|i| number(i, 2)).collect();
                        let start: Vec<f32> = (0..rows * outer).map(|i| number(i, 3)).collect();
                        let (size, columns) = ([rows, inner, outer], [first, width]);
                        let mut y = start.clone();
                        project(&mut y, &x, case.single(), size, columns, accumulate, &mut vec![f32::NAN; 7]);
                        let x64: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                        let mut y64: Vec<f64> = start.iter().map(|x| f64::from(*x)).collect();
                        project(&mut y64, &x64, case.double(), size, columns, accumulate, &mut Vec::new());
                        for (i, (got, got64)) in y.iter().zip(y64).enumerate() {
                            let (r, n) = (i / outer, i % outer);
                            let w = |k: usize| wide[n * width + first + k];
                            let before = if accumulate { f64::from(start[i]) } else { 0.0 };
                            let want = before + (0..inner).map(|k| x64[r * inner + k] * w(k)).sum::<f64>();
                            let what = format!("{rows}x{inner}x{outer} [{i}]: {got} and {want}");
                            assert!((got64 - want).abs() < 1e-13 * inner as f64, "{what}");
                            // Few rows of activations, within 1, are rounded to 8 bits.
                            let rounding = if quantized && rows <= FEW {
                                (0..inner).map(|k| w(k).abs()).sum::<f64>() * 0.5 / 127.0
                            } else {
                                0.0
                            };
                            let bound = 1e-6 * inner as f64 + rounding;
                            assert!((f64::from(*got) - want).abs() < bound, "{what}");
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
        let w = Slice::Narrow(Narrow::Half(Half::Bf16, &bits));
        let x: Vec<f64> = (0..rows * inner).map(|i| ((i * 31) % 101) as f64 / 50.0 - 1.0).collect();
        let run = |rows: usize| {
            let mut y = vec![f64::NAN; rows * outer];
            project(&mut y, &x[..rows * inner], w, [rows, inner, outer], [0, inner], false, &mut Vec::new());
            y
        };
        for (many, few) in run(rows).chunks(outer).zip(run(8).chunks(outer)) {
            assert!(many.iter().zip(few).all(|(a, b)| (a - b).abs() < 1e-10));
        }
    }
}
