//! The loops around a kernel: packing, and which task computes what.

use rayon::prelude::*;

use crate::engine::matrix::{MatMut, MatRef};
use crate::engine::precision::to_bf16;
use crate::engine::vector::vectorize;

/// sums ([`ROWS`], [`COLUMNS`]) = a panel of A (pairs, ROWS) times a panel of B (pairs, COLUMNS).
pub(super) type Kernel = fn(&[u32], &[u32], &mut [f32; ROWS * COLUMNS]);

/// Rows of A in a panel: with 12, sums of 32 columns fill 24 of AVX-512's 32 registers.
pub(super) const ROWS: usize = 12;

/// Columns of B in a panel.
pub(super) const COLUMNS: usize = 32;

/// Inner dimension of a block: a panel of B then takes 16 KiB, half of the innermost cache.
const INNER: usize = 256;

/// The most rows of C of a task, and the least tasks where there are rows enough.
const TASK_ROWS: usize = 10 * ROWS;
const TASKS: usize = 16;

/// C = A B, or C += A B with `accumulate`.
pub(super) fn product(
    c: MatMut<'_, f32>,
    a: MatRef<'_, f32>,
    b: MatRef<'_, f32>,
    accumulate: bool,
    kernel: Kernel,
) {
    let (m, n, k) = (c.rows(), c.columns(), a.columns());
    assert!(a.rows() == m && b.columns() == n && b.rows() == k);
    let (columns, pairs) = (b.t(), k.div_ceil(2));
    let mut panels = vec![0; n.div_ceil(COLUMNS) * pairs * COLUMNS];
    panels.par_chunks_mut((pairs * COLUMNS).max(1)).enumerate().for_each(|(i, panel)| {
        vectorize!(|| pack::<COLUMNS>(columns, i * COLUMNS, [0, k], panel));
    });
    let task_rows = m.div_ceil(TASKS).next_multiple_of(ROWS).clamp(ROWS, TASK_ROWS);
    c.row_tiles(task_rows).into_par_iter().enumerate().for_each(|(i, mut c)| {
        if k == 0 && !accumulate {
            c.fill(0.0);
        }
        let mut block = vec![0; task_rows * INNER / 2];
        let mut sums = [0.0; ROWS * COLUMNS];
        for start in (0..k).step_by(INNER) {
            let inner = INNER.min(k - start);
            let block_pairs = inner.div_ceil(2);
            let panel_of_a = block_pairs * ROWS;
            let add = accumulate || start > 0;
            for (row, panel) in (0..c.rows()).step_by(ROWS).zip(block.chunks_exact_mut(panel_of_a)) {
                vectorize!(|| pack::<ROWS>(a, i * task_rows + row, [start, inner], panel));
            }
            for (column, panel) in (0..n).step_by(COLUMNS).zip(panels.chunks_exact(pairs * COLUMNS)) {
                let b = &panel[start / 2 * COLUMNS..][..block_pairs * COLUMNS];
                for (row, a) in (0..c.rows()).step_by(ROWS).zip(block.chunks_exact(panel_of_a)) {
                    kernel(a, b, &mut sums);
                    let count = COLUMNS.min(n - column);
                    for (r, sums) in sums.chunks_exact(COLUMNS).enumerate().take(c.rows() - row) {
                        let to = &mut c.row(row + r)[column..column + count];
                        for (to, sum) in to.iter_mut().zip(sums) {
                            *to = if add { *to + sum } else { *sum };
                        }
                    }
                }
            }
        }
    });
}

/// Rows of `m` from `first`, `inner` of their numbers from `start`, as a panel (pairs, WIDTH) of pairs
/// side by side; what lies outside is 0.
#[inline(always)]
fn pack<const WIDTH: usize>(m: MatRef<'_, f32>, first: usize, [start, inner]: [usize; 2], panel: &mut [u32]) {
    let count = WIDTH.min(m.rows() - first);
    let whole = panel.len() / WIDTH;
    if m.has_contiguous_rows() {
        for r in 0..WIDTH {
            let row = if r < count { &m.row(first + r)[start..start + inner] } else { &[] };
            for p in 0..whole {
                panel[p * WIDTH + r] = pair_of(row, p);
            }
        }
        return;
    }
    for (p, pairs) in panel.chunks_exact_mut(WIDTH).enumerate() {
        let (low, high) = two_columns::<WIDTH>(m, [first, count], [start, inner], p);
        for ((pair_at, low), high) in pairs.iter_mut().zip(low).zip(high) {
            *pair_at = pair(low, high);
        }
    }
}

/// Pair p of a row; what is beyond its end is 0.
#[inline(always)]
fn pair_of(row: &[f32], p: usize) -> u32 {
    let number = |i: usize| row.get(i).copied().unwrap_or(0.0);
    pair(number(2 * p), number(2 * p + 1))
}

/// The numbers of pair p in rows of a matrix whose columns are contiguous; 0 outside.
#[inline(always)]
fn two_columns<const WIDTH: usize>(
    m: MatRef<'_, f32>,
    [first, count]: [usize; 2],
    [start, inner]: [usize; 2],
    p: usize,
) -> ([f32; WIDTH], [f32; WIDTH]) {
    let columns = m.t();
    let column = |i: usize| {
        let mut numbers = [0.0; WIDTH];
        if i < inner {
            numbers[..count].copy_from_slice(&columns.row(start + i)[first..first + count]);
        }
        numbers
    };
    (column(2 * p), column(2 * p + 1))
}

#[inline(always)]
fn pair(low: f32, high: f32) -> u32 {
    u32::from(to_bf16(high)) << 16 | u32::from(to_bf16(low))
}
