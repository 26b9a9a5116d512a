//! Strided matrix views and the product of two of them, by the `gemm` crate.
//!
//! A view is checked once, where it is made; disjoint parts come from splitting a mutable
//! one, so that the code above needs no `unsafe`.

use std::marker::PhantomData;

use super::scalar::Scalar;

/// A read-only matrix: element (i, j) lies at `i * row_stride + j * column_stride`.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T: Scalar> MatRef<'a, T> {
    /// Row-major and dense.
    pub fn new(data: &'a [T], rows: usize, columns: usize) -> Self {
        MatRef::strided(data, rows, columns, columns)
    }

    /// Row-major, `row_stride` elements from one row to the next.
    pub fn strided(data: &'a [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(
            rows == 0 || columns == 0 || data.len() >= (rows - 1) * row_stride + columns,
            "a {rows}x{columns} view with row stride {row_stride} does not fit {} elements",
            data.len()
        );
        MatRef { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Element (i, j).
    #[inline(always)]
    pub fn at(&self, i: usize, j: usize) -> T {
        self.data[i * self.row_stride + j * self.column_stride]
    }

    /// Whether a row's elements lie side by side; otherwise a column's do.
    pub fn has_contiguous_rows(&self) -> bool {
        self.column_stride == 1
    }

    /// The matrix itself, where it is of f32.
    pub(super) fn single(self) -> Option<MatRef<'a, f32>> {
        let MatRef { data, rows, columns, row_stride, column_stride } = self;
        let single = size_of::<T>() == size_of::<f32>();
        let data = bytemuck::try_cast_slice(data).ok().filter(|_| single)?;
        Some(MatRef { data, rows, columns, row_stride, column_stride })
    }

    /// The same memory read as the transpose.
    pub fn t(self) -> Self {
        MatRef {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// `count` rows from `first`.
    pub fn rows_at(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows);
        MatRef { data: &self.data[(first * self.row_stride).min(self.data.len())..], rows: count, ..self }
    }

    /// `count` columns from `first`.
    pub fn columns_at(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.columns);
        MatRef {
            data: &self.data[(first * self.column_stride).min(self.data.len())..],
            columns: count,
            ..self
        }
    }

    /// Row `i` of a matrix whose columns are contiguous.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [T] {
        debug_assert_eq!(self.column_stride, 1);
        &self.data[i * self.row_stride..][..self.columns]
    }
}

/// A mutable matrix; no two live ones share an element.
#[derive(Debug)]
pub struct MatMut<'a, T> {
    data: *mut T,
    rows: usize,
    columns: usize,
    row_stride: usize,
    marker: PhantomData<&'a mut [T]>,
}

// SAFETY: a MatMut is an exclusive borrow of the elements it addresses, like `&mut [T]`.
unsafe impl<T: Send> Send for MatMut<'_, T> {}
// SAFETY: shared access through `&MatMut` only reads, as through `&&mut [T]`.
unsafe impl<T: Sync> Sync for MatMut<'_, T> {}

impl<'a, T: Scalar> MatMut<'a, T> {
    /// Row-major and dense.
    pub fn new(data: &'a mut [T], rows: usize, columns: usize) -> Self {
        assert!(data.len() >= rows * columns, "a {rows}x{columns} view of {} elements", data.len());
        MatMut { data: data.as_mut_ptr(), rows, columns, row_stride: columns, marker: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The matrix itself, where it is of f32; else given back.
    pub(super) fn single(self) -> Result<MatMut<'a, f32>, Self> {
        if size_of::<T>() != size_of::<f32>() {
            return Err(self);
        }
        // f32 is the only scalar of four bytes.
        let MatMut { data, rows, columns, row_stride, .. } = self;
        Ok(MatMut { data: data.cast(), rows, columns, row_stride, marker: PhantomData })
    }

    /// Row `i`.
    #[inline(always)]
    pub fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows);
        // SAFETY: the constructor checked that all rows lie inside the borrow, splits keep
        // that, and `&mut self` makes this the only access to the row.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(i * self.row_stride), self.columns) }
    }

    /// `count` rows from `first`, borrowed.
    pub fn rows_at(&mut self, first: usize, count: usize) -> MatMut<'_, T> {
        assert!(first + count <= self.rows);
        // SAFETY: inside the allocation by the check above (one past its end when empty).
        let data = unsafe { self.data.add(if count == 0 { 0 } else { first * self.row_stride }) };
        MatMut { data, rows: count, marker: PhantomData, ..*self }
    }

    /// `count` columns from `first`, borrowed.
    pub fn columns_at(&mut self, first: usize, count: usize) -> MatMut<'_, T> {
        assert!(first + count <= self.columns);
        // SAFETY: inside the allocation by the check above (one past its end when empty).
        let data = unsafe { self.data.add(if self.rows == 0 { 0 } else { first }) };
        MatMut { data, columns: count, marker: PhantomData, ..*self }
    }

    /// The matrix cut into blocks of `rows` x `columns`, row blocks outermost: for
    /// (batch x length, heads x size) data, one block a (sequence, head).
    pub fn blocks(self, rows: usize, columns: usize) -> Vec<MatMut<'a, T>> {
        assert!(
            rows > 0 && columns > 0 && self.rows.is_multiple_of(rows) && self.columns.is_multiple_of(columns)
        );
        let mut blocks = Vec::with_capacity((self.rows / rows) * (self.columns / columns));
        for i in (0..self.rows).step_by(rows) {
            for j in (0..self.columns).step_by(columns) {
                // SAFETY: blocks tile the matrix without overlap, and `self` is consumed.
                let data = unsafe { self.data.add(i * self.row_stride + j) };
                blocks.push(MatMut { data, rows, columns, row_stride: self.row_stride, marker: PhantomData });
            }
        }
        blocks
    }

    /// The matrix cut into blocks of `rows` rows, the last of which may have fewer.
    pub fn row_tiles(self, rows: usize) -> Vec<MatMut<'a, T>> {
        let tile = |first: usize| {
            // SAFETY: tiles do not overlap and lie inside the matrix, and `self` is consumed.
            let data = unsafe { self.data.add(first * self.row_stride) };
            MatMut { data, rows: rows.min(self.rows - first), marker: PhantomData, ..self }
        };
        (0..self.rows).step_by(rows).map(tile).collect()
    }

    /// Sets every element.
    pub fn fill(&mut self, value: T) {
        for i in 0..self.rows {
            self.row(i).fill(value);
        }
    }
}

/// How many threads a product may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread alone: for products inside parallel work.
    One,
    /// The pool's threads.
    All,
}

/// C = alpha A B, or C += alpha A B with `accumulate`.
///
/// The sum over the inner dimension is blocked in an order that depends on the shape
/// alone, so the result does not depend on the number of threads.
pub fn product<T: Scalar>(
    c: MatMut<'_, T>,
    alpha: T,
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
    accumulate: bool,
    threads: Threads,
) {
    let (m, n, k) = (c.rows, c.columns, a.columns);
    assert!(
        a.rows == m && b.columns == n && b.rows == k,
        "product of {}x{} and {}x{} into {m}x{n}",
        a.rows,
        a.columns,
        b.rows,
        b.columns
    );
    if m == 0 || n == 0 {
        return;
    }
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: all three views were checked against their borrows where they were made, the
    // dimensions agree, and C, being mutable, overlaps neither A nor B.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.data,
            1,
            c.row_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            T::ONE,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every transposition, accumulating or not, against the sum written out.
    fn check<T: Scalar>(m: usize, n: usize, k: usize, tolerance: f64) {
        let numbers = |count: usize, seed: usize| -> Vec<T> {
            (0..count).map(|i| T::from_f64(((i * 37 + seed * 11) % 23) as f64 / 11.0 - 1.0)).collect()
        };
        let (a, b, c) = (numbers(m * k, 1), numbers(k * n, 2), numbers(m * n, 3));
        for case in 0..8 {
            let (at, bt, accumulate) = (case & 1 == 1, case & 2 == 2, case & 4 == 4);
            let left = if at { MatRef::new(&a, k, m).t() } else { MatRef::new(&a, m, k) };
            let right = if bt { MatRef::new(&b, n, k).t() } else { MatRef::new(&b, k, n) };
            let run = |threads| {
                let mut got = c.clone();
                product(MatMut::new(&mut got, m, n), T::from_f64(0.5), left, right, accumulate, threads);
                got
            };
            let got = run(Threads::One);
            assert_eq!(got, run(Threads::All), "{m}x{n}x{k} case {case}: one thread and all differ");
            for (i, got) in got.iter().enumerate() {
                let (row, column) = (i / n, i % n);
                let term = |l: usize| {
                    let x = if at { a[l * m + row] } else { a[row * k + l] };
                    let y = if bt { b[column * k + l] } else { b[l * n + column] };
                    x.to_f64() * y.to_f64()
                };
                let before = if accumulate { c[i].to_f64() } else { 0.0 };
                let want = before + 0.5 * (0..k).map(term).sum::<f64>();
                let error = (got.to_f64() - want).abs();
                assert!(error < tolerance * (k as f64), "{m}x{n}x{k} case {case} [{i}]: {got} and {want}");
            }
        }
    }

    #[test]
    fn products_of_every_small_shape() {
        for m in [1, 2, 3, 5, 8, 13, 16, 24, 32, 33, 64, 100] {
            for n in [1, 2, 4, 7, 8, 16, 24, 31, 32, 64] {
                for k in [1, 3, 4, 8, 16, 26, 32, 65] {
                    check::<f64>(m, n, k, 1e-13);
                    check::<f32>(m, n, k, 1e-5);
                }
            }
        }
    }
}
