//! The loops around a kernel: packing, and which task computes what.

use rayon::prelude::*;

use crate::engine::matrix::{MatMut, MatRef};
use crate::engine::precision::to_bf16;
use crate::engine::vector::vectorize;

/// A processor's product of a panel of A and a panel of B.
///
/// A panel of A is (at most [`PAIRS`] / [`SIDE`], [`Kernel::ROWS`], `SIDE`), one of B (at most `PAIRS`,
/// [`COLUMNS`]): each element a pair of bf16 numbers that are neighbours along the inner dimension, the first
/// in the lower half. What packs them is for any processor here, and in AVX-512 for the kernels that there are.
pub(super) trait Kernel: Sized {
    /// Rows of A in a panel.
    const ROWS: usize;

    /// Runs a closure, compiled for what the other functions need.
    #[inline(always)]
    fn vectorize(&self, pack: impl FnOnce()) {
        vectorize!(|| pack());
    }

    /// Pairs of neighbours.
    #[inline(always)]
    fn neighbours(&self, numbers: &[f32; 2 * SIDE], pairs: &mut [u32; SIDE]) {
        for (pairs, numbers) in pairs.iter_mut().zip(numbers.as_chunks().0) {
            let &[low, high] = numbers;
            *pairs = pair(low, high);
        }
    }

    /// Pairs of a number each of two rows.
    #[inline(always)]
    fn across(&self, low: &[f32; SIDE], high: &[f32; SIDE], pairs: &mut [u32; SIDE]) {
        for ((pairs, low), high) in pairs.iter_mut().zip(low).zip(high) {
            *pairs = pair(*low, *high);
        }
    }

    /// Transposes a square.
    #[inline(always)]
    fn turn(&self, square: &mut [[u32; SIDE]; SIDE]) {
        let before = *square;
        for (i, row) in square.iter_mut().enumerate() {
            for (to, column) in row.iter_mut().zip(&before) {
                *to = column[i];
            }
        }
    }

    /// For the calling thread, until the value is dropped.
    fn ready() -> Self;

    /// sums (ROWS, COLUMNS) = a times b, over as many pairs as b has: a multiple of [`SIDE`].
    fn multiply(&self, a: &[u32], b: &[u32], sums: &mut [f32]);
}

/// Columns of B in a panel.
pub(super) const COLUMNS: usize = 32;

/// Pairs along the inner dimension in a block: a panel of B then takes 16 KiB, at most half of the
/// innermost cache.
pub(super) const PAIRS: usize = 128;

/// Panels are filled up with zeros to a multiple of so many pairs; and the side of the squares in which
/// they are transposed.
pub(super) const SIDE: usize = 16;

/// About so many rows of C a task, and the least tasks where there are rows enough.
const TASK_ROWS: usize = 128;
const TASKS: usize = 16;

/// C = A B, or C += A B with `accumulate`.
pub(super) fn product<K: Kernel>(
    c: MatMut<'_, f32>,
    a: MatRef<'_, f32>,
    b: MatRef<'_, f32>,
    accumulate: bool,
) {
    let (m, n, k) = (c.rows(), c.columns(), a.columns());
    assert!(a.rows() == m && b.columns() == n && b.rows() == k);
    let pairs = k.div_ceil(2 * SIDE) * SIDE;
    let mut panels = vec![0; n.div_ceil(COLUMNS) * pairs * COLUMNS];
    panels.par_chunks_mut((pairs * COLUMNS).max(1)).enumerate().for_each(|(i, panel)| {
        let kernel = K::ready();
        kernel.vectorize(
            #[inline(always)]
            || pack_columns(&kernel, b, i * COLUMNS, panel),
        );
    });
    let panel_of_a = K::ROWS * PAIRS;
    let task_rows = m.div_ceil(TASKS).min(TASK_ROWS).next_multiple_of(K::ROWS);
    c.row_tiles(task_rows).into_par_iter().enumerate().for_each(|(i, mut c)| {
        if k == 0 && !accumulate {
            c.fill(0.0);
        }
        let kernel = K::ready();
        let mut block = vec![0; task_rows * PAIRS];
        let mut sums = vec![0.0; K::ROWS * COLUMNS];
        for start in (0..pairs).step_by(PAIRS) {
            let add = accumulate || start > 0;
            for (row, panel) in (0..c.rows()).step_by(K::ROWS).zip(block.chunks_exact_mut(panel_of_a)) {
                kernel.vectorize(
                    #[inline(always)]
                    || pack_rows(&kernel, a, [i * task_rows + row, 2 * start], panel),
                );
            }
            for (column, panel) in (0..n).step_by(COLUMNS).zip(panels.chunks_exact(pairs * COLUMNS)) {
                let b = &panel[start * COLUMNS..][..PAIRS.min(pairs - start) * COLUMNS];
                for (row, a) in (0..c.rows()).step_by(K::ROWS).zip(block.chunks_exact(panel_of_a)) {
                    kernel.multiply(a, b, &mut sums);
                    let rows = K::ROWS.min(c.rows() - row);
                    let columns = COLUMNS.min(n - column);
                    let mut to = c.rows_at(row, rows);
                    vectorize!(|| take(&sums, to.columns_at(column, columns), add));
                }
            }
        }
    });
}

/// C = the first rows and columns of `sums` (…, [`COLUMNS`]), or C += them.
#[inline(always)]
fn take(sums: &[f32], mut c: MatMut<'_, f32>, add: bool) {
    for (r, sums) in sums.chunks_exact(COLUMNS).enumerate().take(c.rows()) {
        for (to, sum) in c.row(r).iter_mut().zip(sums) {
            *to = if add { *to + sum } else { *sum };
        }
    }
}

/// Rows of A from a row and a column as a panel; what lies outside is 0.
#[inline(always)]
fn pack_rows<K: Kernel>(kernel: &K, a: MatRef<'_, f32>, [first, start]: [usize; 2], panel: &mut [u32]) {
    let mut square = [[0; SIDE]; SIDE];
    for (p, panel) in panel.chunks_exact_mut(K::ROWS * SIDE).enumerate() {
        let start = start + p * 2 * SIDE;
        if a.has_contiguous_rows() {
            for (r, pairs) in panel.as_chunks_mut().0.iter_mut().enumerate() {
                kernel.neighbours(part(a, [first + r, start], &mut [0.0; 2 * SIDE]), pairs);
            }
            continue;
        }
        for (r, panel) in panel.chunks_mut(SIDE * SIDE).enumerate() {
            across(kernel, a.t(), [start, first + r * SIDE], &mut square);
            kernel.turn(&mut square);
            panel.copy_from_slice(&square.as_flattened()[..panel.len()]);
        }
    }
}

/// Columns of B from `first` as a panel (pairs, [`COLUMNS`]); what lies outside is 0.
#[inline(always)]
fn pack_columns<K: Kernel>(kernel: &K, b: MatRef<'_, f32>, first: usize, panel: &mut [u32]) {
    let mut square = [[0; SIDE]; SIDE];
    for (p, panel) in panel.chunks_exact_mut(SIDE * COLUMNS).enumerate() {
        let start = p * 2 * SIDE;
        for column in (0..COLUMNS).step_by(SIDE) {
            if b.has_contiguous_rows() {
                across(kernel, b, [start, first + column], &mut square);
            } else {
                for (c, pairs) in square.iter_mut().enumerate() {
                    let at = [first + column + c, start];
                    kernel.neighbours(part(b.t(), at, &mut [0.0; 2 * SIDE]), pairs);
                }
                kernel.turn(&mut square);
            }
            for (row, square) in panel.chunks_exact_mut(COLUMNS).zip(&square) {
                row[column..column + SIDE].copy_from_slice(square);
            }
        }
    }
}

/// A square (pairs, columns) of a matrix whose rows are contiguous: a pair is of two rows.
#[inline(always)]
fn across<K: Kernel>(
    kernel: &K,
    m: MatRef<'_, f32>,
    [row, column]: [usize; 2],
    square: &mut [[u32; SIDE]; SIDE],
) {
    for (p, pairs) in square.iter_mut().enumerate() {
        let (mut low, mut high) = ([0.0; SIDE], [0.0; SIDE]);
        let low = part(m, [row + 2 * p, column], &mut low);
        let high = part(m, [row + 2 * p + 1, column], &mut high);
        kernel.across(low, high, pairs);
    }
}

/// Numbers of a row whose elements are contiguous. What lies outside is 0: then they are put together in
/// `zeros`.
#[inline(always)]
fn part<'a, const N: usize>(
    m: MatRef<'a, f32>,
    [row, start]: [usize; 2],
    zeros: &'a mut [f32; N],
) -> &'a [f32; N] {
    if row >= m.rows() || start >= m.columns() {
        return zeros;
    }
    let numbers = &m.row(row)[start..];
    match numbers.first_chunk() {
        Some(numbers) => numbers,
        None => {
            zeros[..numbers.len()].copy_from_slice(numbers);
            zeros
        }
    }
}

#[inline(always)]
fn pair(low: f32, high: f32) -> u32 {
    u32::from(to_bf16(high)) << 16 | u32::from(to_bf16(low))
}
