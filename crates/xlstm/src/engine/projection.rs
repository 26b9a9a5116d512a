//! y = x W^T with W as it is stored, on the processor.
//!
//! For few rows of x, as decoding has them, reading W is all the work: each row of W is read
//! once, on all threads, and multiplied with all rows of x (the library's product leaves all but
//! one thread idle there). For many rows W goes through the library's product; in tiles that are
//! widened into work space, where it is stored in fewer bits. What is cut where depends on shapes
//! alone, so the result does not depend on the number of threads.

use rayon::prelude::*;

use super::bf16_products::product_in;
use super::integer_products::{Activations, Rows, activation_space, dots};
use super::matrix::{MatMut, MatRef};
use super::narrow::{Bf16, F16, Half, Narrow, Widen};
use super::operation::scratch;
use super::precision::Precision;
use super::quantized::{Code, Quantized};
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

/// y (rows, outer) = x (rows, inner) W^T, or y += with `accumulate`.
#[derive(Debug)]
pub struct Projection<'a, T> {
    /// (rows, outer).
    pub y: &'a mut [T],
    /// (outer, inner), or columns of a wider matrix.
    pub w: Slice<'a, T>,
    /// Rows of W.
    pub outer: usize,
    /// Whether y is added to.
    pub accumulate: bool,
}

/// Computes projections of the same x (rows, inner); their W are `inner` columns from `first` of
/// matrices of `width` columns. Many rows of f32 numbers are multiplied in `precision`; few as they
/// are, since there products cost nothing beside reading W.
pub fn project<T: Scalar>(
    maps: &mut [Projection<'_, T>],
    x: &[T],
    [rows, inner]: [usize; 2],
    [first, width]: [usize; 2],
    precision: Precision,
    space: &mut Vec<T>,
) {
    if rows == 0 || inner == 0 {
        maps.iter_mut().filter(|map| !map.accumulate).for_each(|map| map.y.fill(T::ZERO));
        return;
    }
    if rows <= FEW {
        for alike in maps.chunk_by_mut(|a, b| stored_alike(a.w, b.w)) {
            few(alike, x, [rows, inner], [first, width], space);
        }
        return;
    }
    let x = MatRef::new(x, rows, inner);
    for map in maps.iter_mut().filter(|map| map.outer > 0) {
        many(map, x, [rows, inner], [first, width], precision, space);
    }
}

/// One projection of many rows.
fn many<T: Scalar>(
    map: &mut Projection<'_, T>,
    x: MatRef<'_, T>,
    [rows, inner]: [usize; 2],
    [first, width]: [usize; 2],
    precision: Precision,
    space: &mut Vec<T>,
) {
    let (outer, accumulate) = (map.outer, map.accumulate);
    let mut y = MatMut::new(map.y, rows, outer);
    let w = match map.w {
        Slice::Narrow(w) => w,
        Slice::Wide(w) => {
            let w = MatRef::new(w, outer, width).columns_at(first, inner);
            return product_in(precision, y, x, w.t(), accumulate);
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
        product_in(precision, y.columns_at(start, count), x, w.t(), accumulate);
    }
}

/// Whether rows of both are multiplied in the same way.
fn stored_alike<T>(a: Slice<'_, T>, b: Slice<'_, T>) -> bool {
    match (a, b) {
        (Slice::Wide(_), Slice::Wide(_)) => true,
        (Slice::Narrow(Narrow::Half(a, _)), Slice::Narrow(Narrow::Half(b, _))) => a == b,
        (Slice::Narrow(Narrow::Quantized(a)), Slice::Narrow(Narrow::Quantized(b))) => a.code == b.code,
        _ => false,
    }
}

/// Projections of few rows whose weights are stored alike: one pass over all rows of all W.
fn few<T: Scalar>(
    maps: &mut [Projection<'_, T>],
    x: &[T],
    [rows, inner]: [usize; 2],
    [first, width]: [usize; 2],
    space: &mut Vec<T>,
) {
    let outer: usize = maps.iter().map(|map| map.outer).sum();
    // (outer, rows): what a task writes lies together.
    let space = scratch(space, outer * rows + rows * activation_space(inner));
    let (columns, codes) = space.split_at_mut(outer * rows);
    let rounded = match maps[0].w {
        Slice::Narrow(Narrow::Quantized(w)) => round(x, [rows, inner], w.code, codes),
        _ => None,
    };
    let bits = match maps[0].w {
        Slice::Wide(_) => 8 * size_of::<T>(),
        Slice::Narrow(Narrow::Half(..)) => 16,
        Slice::Narrow(Narrow::Quantized(w)) => 8 / w.code.codes_a_byte(),
    };
    let task = (TASK * 8 / bits / inner).max(1);
    columns.par_chunks_mut(task * rows).enumerate().for_each(|(i, mut columns)| {
        let mut start = i * task;
        for map in &*maps {
            let count = map.outer.saturating_sub(start).min(columns.len() / rows);
            let (now, later) = columns.split_at_mut(count * rows);
            if count > 0 {
                let rounded = rounded.as_ref().map(|x| &x[..rows]);
                some_rows(now, x, rounded, map.w, start * width + first, [rows, inner, width]);
            }
            (columns, start) = (later, start.saturating_sub(map.outer));
        }
    });
    // A column is the result as it is: whole slices, where the loop below would take as long as a norm.
    if rows == 1 {
        let mut columns = &*columns;
        for map in maps {
            let (now, later) = columns.split_at(map.outer);
            match map.accumulate {
                true => map.y.iter_mut().zip(now).for_each(|(y, &sum)| *y += sum),
                false => map.y.copy_from_slice(now),
            }
            columns = later;
        }
        return;
    }
    let mut columns = columns.chunks_exact(rows);
    for map in maps {
        for (n, column) in columns.by_ref().take(map.outer).enumerate() {
            for (r, &sum) in column.iter().enumerate() {
                let y = &mut map.y[r * map.outer + n];
                *y = if map.accumulate { *y + sum } else { sum };
            }
        }
    }
}

/// Rows of x as products in integers take them; None for f64, which rounds nothing.
fn round<'a, T: Scalar>(
    x: &[T],
    [rows, inner]: [usize; 2],
    code: Code,
    space: &'a mut [T],
) -> Option<[Activations<'a>; FEW]> {
    let x = bytemuck::try_cast_slice::<T, f32>(x).ok().filter(|x| x.len() == rows * inner)?;
    let space = bytemuck::try_cast_slice_mut::<T, f32>(space).ok()?;
    let spaces = space.chunks_exact_mut(activation_space(inner));
    let mut rounded = x.chunks_exact(inner).zip(spaces).map(|(x, space)| Activations::new(x, code, space));
    let nothing = Activations::default();
    Some(std::array::from_fn(|_| rounded.next().unwrap_or(nothing)))
}

/// columns (count, rows) = W x^T for as many rows of W, from element `start`, as there is room for.
fn some_rows<T: Scalar>(
    columns: &mut [T],
    x: &[T],
    rounded: Option<&[Activations<'_>]>,
    w: Slice<'_, T>,
    start: usize,
    [rows, inner, width]: [usize; 3],
) {
    let size = [rows, inner, width];
    match (w, rounded) {
        (Slice::Wide(w), _) => vectorize!(|| dense::<T, Same>(columns, x, &w[start..], size)),
        (Slice::Narrow(Narrow::Half(Half::Bf16, w)), _) => {
            vectorize!(|| dense::<T, Bf16>(columns, x, &w[start..], size));
        }
        (Slice::Narrow(Narrow::Half(Half::F16, w)), _) => {
            vectorize!(|| dense::<T, F16>(columns, x, &w[start..], size));
        }
        (Slice::Narrow(Narrow::Quantized(w)), Some(x)) => {
            let w = Rows { weights: w, first: start, stride: width };
            coded(bytemuck::cast_slice_mut(columns), x, w);
        }
        (Slice::Narrow(Narrow::Quantized(w)), None) => widened(columns, x, w, start, size),
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
    use crate::engine::quantized::{GROUP, quantize};

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
                        let (size, columns) = ([rows, inner], [first, width]);
                        let mut y = start.clone();
                        let map = Projection { y: &mut y, w: case.single(), outer, accumulate };
                        project(&mut [map], &x, size, columns, Precision::F32, &mut vec![f32::NAN; 7]);
                        let x64: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                        let mut y64: Vec<f64> = start.iter().map(|x| f64::from(*x)).collect();
                        let map = Projection { y: &mut y64, w: case.double(), outer, accumulate };
                        project(&mut [map], &x64, size, columns, Precision::F32, &mut Vec::new());
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

    /// Several projections of one x give the bits of one after the other, however their weights are
    /// stored and wherever the tasks are cut.
    #[test]
    fn projections_together_are_projections_alone() {
        let inner = 96;
        let outers = [5, 400, 1, 130, 0, 33, 257];
        for rows in [1, 3, 8, 12] {
            let x: Vec<f32> = (0..rows * inner).map(|i| number(i, 4)).collect();
            let cases: Vec<Vec<Case>> = outers.iter().map(|outer| Case::all(outer * inner)).collect();
            // The first three weights alike, then each another.
            let stored = |i: usize| if i < 3 { &cases[i][4] } else { &cases[i][i % 5] };
            let start = |i: usize| vec![0.25_f32; rows * outers[i]];
            let mut together: Vec<Vec<f32>> = (0..outers.len()).map(start).collect();
            let mut maps: Vec<_> = (together.iter_mut().enumerate())
                .map(|(i, y)| {
                    let accumulate = i % 2 == 1;
                    Projection { y, w: stored(i).single(), outer: outers[i], accumulate }
                })
                .collect();
            project(&mut maps, &x, [rows, inner], [0, inner], Precision::F32, &mut Vec::new());
            for (i, together) in together.iter().enumerate() {
                let mut alone = start(i);
                let map = Projection {
                    y: &mut alone,
                    w: stored(i).single(),
                    outer: outers[i],
                    accumulate: i % 2 == 1,
                };
                project(&mut [map], &x, [rows, inner], [0, inner], Precision::F32, &mut Vec::new());
                assert_eq!(*together, alone, "{rows} rows, projection {i}");
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
            let map = Projection { y: &mut y, w, outer, accumulate: false };
            project(
                &mut [map],
                &x[..rows * inner],
                [rows, inner],
                [0, inner],
                Precision::F32,
                &mut Vec::new(),
            );
            y
        };
        for (many, few) in run(rows).chunks(outer).zip(run(8).chunks(outer)) {
            assert!(many.iter().zip(few).all(|(a, b)| (a - b).abs() < 1e-10));
        }
    }
}
