//! Products of matrices rounded to bf16, summed in f32: an option for training on processors that
//! multiply these faster than f32. No library has them.
//!
//! Rows of A and columns of B are packed as pairs of neighbours along the inner dimension, in panels of
//! as many as a kernel takes, and a task owns some rows of C. A processor without such instructions, or
//! one where they are no gain, rounds the operands and multiplies in f32: the same numbers but for the
//! order of their sums, and for those below 2^-126, which the instructions take as 0.

use rayon::prelude::*;

use super::matrix::{MatMut, MatRef, Threads, product};
use super::precision::Precision;
use super::scalar::Scalar;
use super::vector::vectorize;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod packed;

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
        (Ok(c), Some(a), Some(b)) => match way() {
            #[cfg(target_arch = "x86_64")]
            Way::Amx => packed::product::<amx::Amx>(c, a, b, accumulate),
            #[cfg(target_arch = "x86_64")]
            Way::Avx512 => packed::product::<avx512::Avx512>(c, a, b, accumulate),
            Way::Single => rounded_product(c, a, b, accumulate),
        },
        (Err(c), ..) => product(c, T::ONE, a, b, accumulate, Threads::All),
        (Ok(_), ..) => unreachable!("A, B and C have one type"),
    }
}

/// How a processor multiplies bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By AMX's tiles.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// By AVX512-BF16.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// Rounded, in f32.
    Single,
}

/// Whether this processor multiplies bf16 faster than f32.
pub fn has_bf16_products() -> bool {
    way() != Way::Single
}

/// The fastest way that there is.
fn way() -> Way {
    #[cfg(target_arch = "x86_64")]
    {
        if amx::has_amx() {
            return Way::Amx;
        }
        if avx512::has_avx512() && avx512::is_gain() {
            return Way::Avx512;
        }
    }
    Way::Single
}

/// C = A B, or C += A B with `accumulate`, of rounded operands.
fn rounded_product(c: MatMut<'_, f32>, a: MatRef<'_, f32>, b: MatRef<'_, f32>, accumulate: bool) {
    let size = [c.rows(), c.columns(), a.columns()];
    let (a, b) = (rounded(a), rounded(b.t()));
    let (a, b) = (MatRef::new(&a, size[0], size[2]), MatRef::new(&b, size[1], size[2]));
    product(c, 1.0, a, b.t(), accumulate, Threads::All);
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

#[cfg(test)]
mod tests {
    use super::packed::{COLUMNS, Kernel, SIDE};
    use super::*;

    type Product = fn(MatMut<'_, f32>, MatRef<'_, f32>, MatRef<'_, f32>, bool);

    /// Every transposition, accumulating or not, against the sum of rounded numbers in f64.
    fn check(product: Product, [m, n, k]: [usize; 3]) {
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
            product(MatMut::new(&mut got, m, n), left, right, accumulate);
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

    /// A kernel that every processor has.
    struct SpelledOut;

    impl Kernel for SpelledOut {
        const ROWS: usize = 16;

        fn ready() -> SpelledOut {
            SpelledOut
        }

        fn multiply(&self, a: &[u32], b: &[u32], sums: &mut [f32]) {
            let halves = |pair: u32| [pair << 16, pair & 0xffff_0000].map(f32::from_bits);
            for (i, sum) in sums.iter_mut().enumerate() {
                let a = a.chunks_exact(SIDE).skip(i / COLUMNS).step_by(Self::ROWS).flatten();
                let b = b.chunks_exact(COLUMNS).map(|b| b[i % COLUMNS]);
                *sum =
                    b.zip(a).map(|(b, &a)| halves(a)[0] * halves(b)[0] + halves(a)[1] * halves(b)[1]).sum();
            }
        }
    }

    /// All ways that this processor has, taken or not.
    fn ways() -> Vec<Product> {
        let mut ways: Vec<Product> = vec![rounded_product, packed::product::<SpelledOut>];
        #[cfg(target_arch = "x86_64")]
        {
            ways.extend(avx512::has_avx512().then_some(packed::product::<avx512::Avx512> as Product));
            ways.extend(amx::has_amx().then_some(packed::product::<amx::Amx> as Product));
        }
        ways
    }

    #[test]
    fn products_are_those_of_rounded_numbers() {
        for shape in
            [[1, 1, 1], [12, 32, 2], [13, 33, 3], [40, 70, 255], [5, 100, 513], [250, 31, 20], [32, 64, 288]]
        {
            for product in ways() {
                check(product, shape);
            }
        }
    }

    #[test]
    fn threads_do_not_matter() {
        let x: Vec<f32> = (0..300 * 70).map(|i| (i % 97) as f32 / 50.0 - 1.0).collect();
        let run = |threads, product: Product| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (a, b) = (MatRef::new(&x, 300, 70), MatRef::new(&x, 70, 300));
            let mut c = vec![0.0; 300 * 300];
            pool.install(|| product(MatMut::new(&mut c, 300, 300), a, b, false));
            c
        };
        for product in ways() {
            assert_eq!(run(1, product), run(3, product));
        }
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
