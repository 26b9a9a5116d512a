//! The product with R: a few rows of h against a matrix that stays in cache all sequence.

use crate::engine::Scalar;
use crate::engine::vector::dot;

/// Columns of a panel: an AVX-512 register of f32.
const COLUMNS: usize = 16;

/// Elements that an `inner` x `width` matrix takes as panels.
pub(super) fn panels_len(inner: usize, width: usize) -> usize {
    width.div_ceil(COLUMNS) * COLUMNS * inner
}

/// Writes the matrix with elements `at(k, j)` as panels: [`COLUMNS`] of its columns side
/// by side, so that a product reads it from end to end. Missing columns are zeros.
#[inline(always)]
pub(super) fn pack<T: Scalar>(panels: &mut [T], inner: usize, width: usize, at: impl Fn(usize, usize) -> T) {
    for (p, panel) in panels.chunks_exact_mut(inner * COLUMNS).enumerate() {
        let first = p * COLUMNS;
        for (k, line) in panel.chunks_exact_mut(COLUMNS).enumerate() {
            for (j, to) in line.iter_mut().enumerate() {
                *to = if first + j < width { at(k, first + j) } else { T::ZERO };
            }
        }
    }
}

/// Rows that do not lie side by side: `stride` elements from one to the next.
#[derive(Clone, Copy)]
pub(super) struct Strided<S> {
    pub(super) data: S,
    pub(super) stride: usize,
}

/// y (rows, width) += x (rows, inner) times the (inner, width) matrix in `panels`.
#[inline(always)]
pub(super) fn add_product<T: Scalar>(
    rows: usize,
    x: Strided<&[T]>,
    inner: usize,
    panels: &[T],
    y: Strided<&mut [T]>,
    width: usize,
) {
    for row in (0..rows).step_by(8) {
        let x = Strided { data: &x.data[row * x.stride..], ..x };
        let y = Strided { data: &mut y.data[row * y.stride..], stride: y.stride };
        match rows - row {
            1 => add_rows::<T, 1>(x, inner, panels, y, width),
            2 => add_rows::<T, 2>(x, inner, panels, y, width),
            3 => add_rows::<T, 3>(x, inner, panels, y, width),
            4 => add_rows::<T, 4>(x, inner, panels, y, width),
            5 => add_rows::<T, 5>(x, inner, panels, y, width),
            6 => add_rows::<T, 6>(x, inner, panels, y, width),
            7 => add_rows::<T, 7>(x, inner, panels, y, width),
            _ => add_rows::<T, 8>(x, inner, panels, y, width),
        }
    }
}

/// R rows at once: R accumulators of [`COLUMNS`], one load of the matrix for all of them.
#[inline(always)]
fn add_rows<T: Scalar, const R: usize>(
    x: Strided<&[T]>,
    inner: usize,
    panels: &[T],
    y: Strided<&mut [T]>,
    width: usize,
) {
    let x: [&[T]; R] = std::array::from_fn(|r| &x.data[r * x.stride..][..inner]);
    for (p, panel) in panels.chunks_exact(inner * COLUMNS).enumerate() {
        let first = p * COLUMNS;
        let count = COLUMNS.min(width - first);
        let mut sums = [[T::ZERO; COLUMNS]; R];
        for (k, line) in panel.chunks_exact(COLUMNS).enumerate() {
            for (x, sums) in x.iter().zip(&mut sums) {
                let a = x[k];
                for (sum, b) in sums.iter_mut().zip(line) {
                    *sum = a.mul_add(*b, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (y, sum) in y.data[r * y.stride + first..][..count].iter_mut().zip(sums) {
                *y += *sum;
            }
        }
    }
}

/// y (rows, width) += x (rows, inner) times the transpose of `matrix` (width, inner) as it
/// lies: for so few steps that packing would cost more than the product.
#[inline(always)]
pub(super) fn add_product_unpacked<T: Scalar>(
    rows: usize,
    x: Strided<&[T]>,
    inner: usize,
    matrix: &[T],
    y: Strided<&mut [T]>,
) {
    for (j, line) in matrix.chunks_exact(inner).enumerate() {
        for row in 0..rows {
            y.data[row * y.stride + j] += dot(line, &x.data[row * x.stride..][..inner]);
        }
    }
}
