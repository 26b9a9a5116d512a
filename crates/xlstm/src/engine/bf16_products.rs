//! Products of matrices rounded to bf16, summed in f32: an option for training on processors whose
//! AVX512-BF16 does two of their multiplications for one in f32. No library has them.
//!
//! Rows of A and columns of B are packed as pairs of neighbours along the inner dimension, in panels of
//! as many as the kernel takes, and a task owns some rows of C. A processor without the instructions
//! rounds the operands and multiplies in f32: the same numbers but for the order of their sums.

use rayon::prelude::*;

use super::matrix::{MatMut, MatRef, Threads, product};
use super::precision::{Precision, to_bf16};
use super::scalar::Scalar;
use super::vector::vectorize;

/// C = A B, or C += A B with `accumulate`, on all threads; f32 operands are rounded to `precision`
/// first, others are not.
///
/// As with [`product`], the result does not depend on the number of threads.
pub fn product_in<T: Scalar>(
    precision: Precision,
    c: MatMut<'_, T>,
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
    accumulate: bool,
) {
    if precision == Precision::F32 {
        return product(c, T::ONE, a, b, accumulate, Threads::All);
    }
    match (c.single(), a.single(), b.single()) {
        (Ok(c), Some(a), Some(b)) => Instructions::of_this_processor().product(c, a, b, accumulate),
        (Err(c), ..) => product(c, T::ONE, a, b, accumulate, Threads::All),
        (Ok(_), ..) => unreachable!("A, B and C have one type"),
    }
}

/// Whether this processor multiplies in bf16, rather than in f32 after rounding.
pub fn has_bf16_products() -> bool {
    Instructions::of_this_processor() != Instructions::Plain
}

/// Rows of A that the kernel takes.
const ROWS: usize = 12;

/// Columns of B that the kernel takes. With 12 rows its sums fill 24 of the 32 registers.
const COLUMNS: usize = 32;

/// Inner dimension of a block: a panel of B then takes 16 KiB, half of the innermost cache.
const INNER: usize = 256;

/// The most rows of C of a task, and the least tasks where there are rows enough.
const TASK_ROWS: usize = 10 * ROWS;
const TASKS: usize = 16;

/// What products are computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Instructions {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Instructions {
    fn of_this_processor() -> Instructions {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
            return Instructions::Avx512;
        }
        Instructions::Plain
    }

    /// The instructions are such as the processor has.
    fn product(self, c: MatMut<'_, f32>, a: MatRef<'_, f32>, b: MatRef<'_, f32>, accumulate: bool) {
        match self {
            Instructions::Plain => {
                let size = [c.rows(), c.columns(), a.columns()];
                let (a, b) = (rounded(a), rounded(b.t()));
                let (a, b) = (MatRef::new(&a, size[0], size[2]), MatRef::new(&b, size[1], size[2]));
                product(c, 1.0, a, b.t(), accumulate, Threads::All);
            }
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => packed_product(c, a, b, accumulate),
        }
    }
}

/// The rows of a matrix one after the other, each number rounded.
fn rounded(m: MatRef<'_, f32>) -> Vec<f32> {
    let width = m.columns();
    let mut rows = vec![0.0; m.rows() * width];
    rows.par_chunks_mut(width.max(1)).enumerate().for_each(|(i, row)| {
        vectorize!(|| {
            for (j, to) in row.iter_mut().enumerate() {
                *to = Precision::Bf16.round(m.at(i, j));
            }
        });
    });
    rows
}

#[cfg(target_arch = "x86_64")]
fn packed_product(c: MatMut<'_, f32>, a: MatRef<'_, f32>, b: MatRef<'_, f32>, accumulate: bool) {
    let (m, n, k) = (c.rows(), c.columns(), a.columns());
    assert!(a.rows() == m && b.columns() == n && b.rows() == k);
    let (columns, pairs) = (b.t(), k.div_ceil(2));
    let mut panels = vec![0; n.div_ceil(COLUMNS) * pairs * COLUMNS];
    panels.par_chunks_mut((pairs * COLUMNS).max(1)).enumerate().for_each(|(i, panel)| {
        vectorize!(|| pack::<COLUMNS>(columns, i * COLUMNS, [0, k], panel));
    });
    let task_rows = (m.div_ceil(TASKS).next_multiple_of(ROWS)).min(TASK_ROWS);
    c.row_tiles(task_rows).into_par_iter().enumerate().for_each(|(i, mut c)| {
        let mut block = vec![0; task_rows * INNER / 2];
        for start in (0..k).step_by(INNER) {
            let inner = INNER.min(k - start);
            let (block_pairs, add) = (inner.div_ceil(2), accumulate || start > 0);
            for (row, panel) in (0..c.rows()).step_by(ROWS).zip(block.chunks_exact_mut(block_pairs * ROWS)) {
                let first = i * task_rows + row;
                vectorize!(|| pack::<ROWS>(a, first, [start, inner], panel));
            }
            for (column, panel) in (0..n).step_by(COLUMNS).zip(panels.chunks_exact(pairs * COLUMNS)) {
                let b = &panel[start / 2 * COLUMNS..][..block_pairs * COLUMNS];
                for (row, a) in (0..c.rows()).step_by(ROWS).zip(block.chunks_exact(block_pairs * ROWS)) {
                    // SAFETY: the processor has the instructions.
                    let sums = unsafe { kernel(a, b) };
                    let count = COLUMNS.min(n - column);
                    for (r, sums) in sums.iter().enumerate().take(c.rows() - row) {
                        let to = &mut c.row(row + r)[column..column + count];
                        for (to, sum) in to.iter_mut().zip(sums) {
                            *to = if add { *to + sum } else { *sum };
                        }
                    }
                }
            }
        }
        if k == 0 && !accumulate {
            c.fill(0.0);
        }
    });
}

/// Rows of `m` from `first`, `inner` of their numbers from `start`, as pairs in a panel
/// (pairs, WIDTH); what lies outside is 0.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn pack<const WIDTH: usize>(m: MatRef<'_, f32>, first: usize, [start, inner]: [usize; 2], panel: &mut [u32]) {
    let count = WIDTH.min(m.rows() - first);
    if m.has_contiguous_rows() {
        for r in 0..WIDTH {
            let row = if r < count { &m.row(first + r)[start..start + inner] } else { &[] };
            for (p, pairs) in panel.chunks_exact_mut(WIDTH).enumerate() {
                let number = |i: usize| row.get(i).copied().unwrap_or(0.0);
                pairs[r] = pair(number(2 * p), number(2 * p + 1));
            }
        }
        return;
    }
    let columns = m.t();
    let column = |i: usize| &columns.row(start + i)[first..first + count];
    for (p, pairs) in panel.chunks_exact_mut(WIDTH).enumerate() {
        let low = column(2 * p);
        let high = if 2 * p + 1 < inner { column(2 * p + 1) } else { &[0.0; WIDTH][..count] };
        for ((pair_of, low), high) in pairs.iter_mut().zip(low).zip(high) {
            *pair_of = pair(*low, *high);
        }
        pairs[count..].fill(0);
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn pair(low: f32, high: f32) -> u32 {
    u32::from(to_bf16(high)) << 16 | u32::from(to_bf16(low))
}

/// A panel of A (pairs, [`ROWS`]) times a panel of B (pairs, [`COLUMNS`]).
///
/// # Safety
/// The processor has the instructions.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn kernel(a: &[u32], b: &[u32]) -> [[f32; COLUMNS]; ROWS] {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    let mut sums = [[_mm512_setzero_ps(); COLUMNS / 16]; ROWS];
    for (a, b) in a.chunks_exact(ROWS).zip(b.chunks_exact(COLUMNS)) {
        // SAFETY: b has COLUMNS numbers; a vector of bf16 is 512 bits like any other.
        let b: [__m512bh; COLUMNS / 16] = unsafe {
            [
                transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.as_ptr().cast())),
                transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.as_ptr().add(16).cast())),
            ]
        };
        for (sums, a) in sums.iter_mut().zip(a) {
            // SAFETY: as above.
            let a: __m512bh = unsafe { transmute(_mm512_set1_epi32(*a as i32)) };
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = _mm512_dpbf16_ps(*sum, a, b);
            }
        }
    }
    // SAFETY: both are ROWS x COLUMNS numbers.
    unsafe { transmute(sums) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every transposition, accumulating or not, against the sum of rounded numbers in f64.
    fn check(instructions: Instructions, [m, n, k]: [usize; 3]) {
        let numbers = |count: usize, seed: usize| -> Vec<f32> {
            (0..count).map(|i| ((i * 37 + seed * 11) % 1009) as f32 / 503.0 - 1.0).collect()
        };
        let (a, b, c) = (numbers(m * k, 1), numbers(k * n, 2), numbers(m * n, 3));
        for case in 0..8 {
            let (at, bt, accumulate) = (case & 1 == 1, case & 2 == 2, case & 4 == 4);
            let left = if at { MatRef::new(&a, k, m).t() } else { MatRef::new(&a, m, k) };
            let right = if bt { MatRef::new(&b, n, k).t() } else { MatRef::new(&b, k, n) };
            let mut got = c.clone();
            if !accumulate {
                got.fill(f32::NAN);
            }
            instructions.product(MatMut::new(&mut got, m, n), left, right, accumulate);
            for (i, got) in got.iter().enumerate() {
                let (row, column) = (i / n, i % n);
                let number = |x: f32| f64::from(Precision::Bf16.round(x));
                let term = |l: usize| {
                    number(if at { a[l * m + row] } else { a[row * k + l] })
                        * number(if bt { b[column * k + l] } else { b[l * n + column] })
                };
                let before = if accumulate { f64::from(c[i]) } else { 0.0 };
                let want = before + (0..k).map(term).sum::<f64>();
                let error = (f64::from(*got) - want).abs();
                let bound = 1e-6 * (k as f64 + 1.0);
                assert!(error < bound, "{m}x{n}x{k} case {case} [{i}]: {got} and {want}");
            }
        }
    }

    #[test]
    fn products_are_those_of_rounded_numbers() {
        for shape in [[1, 1, 1], [12, 32, 2], [13, 33, 3], [40, 70, 255], [5, 100, 513], [250, 31, 20]] {
            check(Instructions::Plain, shape);
            check(Instructions::of_this_processor(), shape);
        }
    }

    #[test]
    fn threads_do_not_matter() {
        let x: Vec<f32> = (0..300 * 70).map(|i| (i % 97) as f32 / 50.0 - 1.0).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (a, b) = (MatRef::new(&x, 300, 70), MatRef::new(&x, 70, 300));
            let mut c = vec![0.0; 300 * 300];
            pool.install(|| product_in(Precision::Bf16, MatMut::new(&mut c, 300, 300), a, b, false));
            c
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn f64_is_not_rounded() {
        let x = [1.0 + 1e-12, 2.0];
        let mut y = [0.0];
        let (a, b) = (MatRef::new(&x, 1, 2), MatRef::new(&x, 2, 1));
        product_in(Precision::Bf16, MatMut::new(&mut y, 1, 1), a, b, false);
        assert_eq!(y[0], x[0] * x[0] + 4.0);
    }
}
