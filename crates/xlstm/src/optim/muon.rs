//! Muon (Jordan et al. 2024): of the momentum of a matrix only the directions count. The update is about
//! the nearest matrix whose singular values are all 1, scaled as in Liu et al. 2025 so that its numbers are
//! as large as AdamW's, and one learning rate serves both.
//!
//! ```text
//! m <- mu m + g,  u = g + mu m                           (Nesterov's momentum)
//! X = u / (|u| + eps)                                    (|u| the Frobenius norm)
//! five times  A = X X^T,  X <- a X + (b A + c A A) X     (on X^T where X has more rows than columns)
//! w <- w (1 - rate decay) - rate 0.2 sqrt(max(rows, columns)) X
//! ```
//!
//! A step takes a singular value s to a s + b s³ + c s⁵. With these a, b and c small ones grow fastest and
//! those above settle between 0.68 and 1.14, without ever converging: it need not.

use rayon::prelude::*;

use super::optimizer::{TILE, Tensor, square_sum};
use crate::engine::Scalar;
use crate::engine::matrix::{MatMut, MatRef, Threads, product};
use crate::engine::vector::vectorize;

/// a, b and c.
pub(super) const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];

/// How often they are applied.
pub(super) const ITERATIONS: usize = 5;

/// Added to the norm: the update of a matrix without gradient is zero.
pub(super) const EPS: f64 = 1e-7;

/// The constants of Muon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonOptions {
    /// mu, the decay of the momentum.
    pub momentum: f64,
}

impl MuonOptions {
    /// A momentum of 0.95.
    pub const DEFAULT: MuonOptions = MuonOptions { momentum: 0.95 };
}

/// What the learning rate of a matrix of these rows and columns is multiplied by.
pub(super) fn scale_of([rows, columns]: [usize; 2]) -> f64 {
    0.2 * (rows.max(columns) as f64).sqrt()
}

/// A step of matrices of these rows and columns, one after the other, at learning rate `rate`; `clip`
/// multiplies their gradient, `keep` is what decay leaves of the weights.
pub(super) fn update<T: Scalar>(
    options: &MuonOptions,
    tensor: Tensor<'_, T>,
    sizes: &[[usize; 2]],
    [clip, rate, keep]: [f64; 3],
) {
    let Tensor { mut w, mut g, mut first, .. } = tensor;
    for &size in sizes {
        let n = size[0] * size[1];
        let (matrix, gradient, momentum);
        (matrix, w) = w.split_at_mut(n);
        (gradient, g) = g.split_at(n);
        (momentum, first) = first.split_at_mut(n);
        let x = orthogonalized(nesterov(options.momentum, clip, gradient, momentum), size);
        let [keep, rate] = [keep, rate * scale_of(size)].map(T::from_f64);
        matrix.par_chunks_mut(TILE).zip(x.par_chunks(TILE)).for_each(|(w, x)| {
            vectorize!(|| w.iter_mut().zip(x).for_each(|(w, x)| *w = *w * keep - rate * *x));
        });
    }
}

/// Adds the gradient to the momentum and returns where that will be after the next step like this one.
fn nesterov<T: Scalar>(mu: f64, clip: f64, gradient: &[T], momentum: &mut [T]) -> Vec<T> {
    let [mu, clip] = [mu, clip].map(T::from_f64);
    let mut ahead = vec![T::ZERO; gradient.len()];
    let tiles = gradient.par_chunks(TILE).zip(momentum.par_chunks_mut(TILE));
    ahead.par_chunks_mut(TILE).zip(tiles).for_each(|(u, (g, m))| {
        vectorize!(|| {
            for (u, (g, m)) in u.iter_mut().zip(g.iter().zip(m.iter_mut())) {
                let g = *g * clip;
                *m = mu * *m + g;
                *u = g + mu * *m;
            }
        });
    });
    ahead
}

/// About the nearest matrix to `x` (rows, columns) whose singular values are 1; where its are 0, they stay.
pub fn orthogonalized<T: Scalar>(mut x: Vec<T>, [rows, columns]: [usize; 2]) -> Vec<T> {
    let inverse = T::from_f64(1.0 / (square_sum(&x).sqrt() + EPS));
    scale(&mut x, inverse);
    let [a, b, c] = COEFFICIENTS.map(T::from_f64);
    let side = rows.min(columns);
    let mut gram = vec![T::ZERO; side * side];
    let (mut polynomial, mut next) = (gram.clone(), x.clone());
    for _ in 0..ITERATIONS {
        let matrix = MatRef::new(&x, rows, columns);
        // X^T X X is X X^T X: the smaller of the two products serves.
        let wide = if rows > columns { matrix.t() } else { matrix };
        product(MatMut::new(&mut gram, side, side), T::ONE, wide, wide.t(), false, Threads::All);
        polynomial.copy_from_slice(&gram);
        scale(&mut polynomial, b);
        let gram = MatRef::new(&gram, side, side);
        product(MatMut::new(&mut polynomial, side, side), c, gram, gram, true, Threads::All);
        next.copy_from_slice(&x);
        scale(&mut next, a);
        let polynomial = MatRef::new(&polynomial, side, side);
        let (left, right) = if rows > columns { (matrix, polynomial) } else { (polynomial, matrix) };
        product(MatMut::new(&mut next, rows, columns), T::ONE, left, right, true, Threads::All);
        std::mem::swap(&mut x, &mut next);
    }
    x
}

fn scale<T: Scalar>(x: &mut [T], by: T) {
    x.par_chunks_mut(TILE).for_each(|x| vectorize!(|| x.iter_mut().for_each(|x| *x *= by)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// Random columns of a random rank.
    fn random(seed: u64, [rows, columns]: [usize; 2], rank: usize) -> Vec<f64> {
        let mut rng = Rng::new(seed, 5);
        let mut normal = |n: usize| (0..n).map(|_| rng.normal()).collect::<Vec<f64>>();
        let (left, right) = (normal(rows * rank), normal(rank * columns));
        let mut x = vec![0.0; rows * columns];
        let (left, right) = (MatRef::new(&left, rows, rank), MatRef::new(&right, rank, columns));
        product(MatMut::new(&mut x, rows, columns), 1.0, left, right, false, Threads::One);
        x
    }

    /// The singular values of a matrix, the largest first, by rotations of its columns against each other
    /// (one-sided Jacobi) until all are at right angles.
    fn singular_values(x: &[f64], [rows, columns]: [usize; 2]) -> Vec<f64> {
        let mut vectors: Vec<Vec<f64>> =
            (0..columns).map(|j| (0..rows).map(|i| x[i * columns + j]).collect()).collect();
        for _ in 0..30 {
            for p in 0..columns {
                for q in p + 1..columns {
                    let (before, after) = vectors.split_at_mut(q);
                    let (u, v) = (&mut before[p], &mut after[0]);
                    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                    let (alpha, beta, gamma) = (dot(u, u), dot(v, v), dot(u, v));
                    if gamma.abs() <= 1e-15 * (alpha * beta).sqrt() {
                        continue;
                    }
                    let zeta = (beta - alpha) / (2.0 * gamma);
                    let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                    let cos = 1.0 / (1.0 + t * t).sqrt();
                    let sin = cos * t;
                    for (u, v) in u.iter_mut().zip(v) {
                        (*u, *v) = (cos * *u - sin * *v, sin * *u + cos * *v);
                    }
                }
            }
        }
        let mut values: Vec<f64> =
            vectors.iter().map(|v| v.iter().map(|x| x * x).sum::<f64>().sqrt()).collect();
        values.sort_by(|a, b| b.total_cmp(a));
        values
    }

    /// Where a singular value that is this part of the norm ends.
    fn end_of(mut s: f64) -> f64 {
        let [a, b, c] = COEFFICIENTS;
        for _ in 0..ITERATIONS {
            s = a * s + b * s.powi(3) + c * s.powi(5);
        }
        s
    }

    #[test]
    fn singular_values_become_about_one() {
        let sizes: [[usize; 2]; 8] =
            [[24, 24], [16, 40], [40, 16], [1, 9], [9, 1], [33, 70], [70, 33], [64, 64]];
        for (seed, size) in (0..).zip(sizes) {
            let full = size[0].min(size[1]);
            for rank in [full, full.div_ceil(2)] {
                let x = random(seed, size, rank);
                let norm = square_sum(&x).sqrt();
                let before = singular_values(&x, size);
                let after = singular_values(&orthogonalized(x, size), size);
                let mut expected: Vec<f64> = before.iter().map(|s| end_of(s / norm)).collect();
                expected.sort_by(|a, b| b.total_cmp(a));
                for (i, (after, expected)) in after.iter().zip(&expected).enumerate() {
                    assert!((after - expected).abs() < 1e-6, "{size:?} {rank} {i}: {after} and {expected}");
                    if i >= rank {
                        assert!(*after < 1e-9, "{size:?} {rank} {i}: {after}");
                    }
                }
                // Those that are a hundredth of the norm or more arrive.
                let large = before.iter().filter(|s| **s > 0.01 * norm).count();
                assert!(large * 10 >= rank * 8, "{size:?}: {large} of {rank}");
                let arrived = &after[..large.min(rank)];
                let outside = arrived.iter().filter(|s| !(0.6..1.3).contains(*s)).count();
                assert_eq!(outside, 0, "{size:?} {rank}: {arrived:?}");
            }
        }
    }

    #[test]
    fn the_directions_stay() {
        // Of a matrix with singular values 3 and 4 along known directions.
        let (cos, sin) = (0.8, 0.6);
        let x = vec![3.0 * cos, 3.0 * sin, 0.0, -4.0 * sin, 4.0 * cos, 0.0];
        let [three, four] = [3.0, 4.0].map(|s: f64| end_of(s / (5.0 + EPS)));
        let wanted = [three * cos, three * sin, 0.0, -four * sin, four * cos, 0.0];
        for (got, wanted) in orthogonalized(x, [2, 3]).iter().zip(wanted) {
            assert!((got - wanted).abs() < 1e-12, "{got} and {wanted}");
        }
    }

    #[test]
    fn in_f32_as_in_f64() {
        for (seed, size) in (0..).zip([[48, 48], [20, 64], [64, 20], [130, 70]]) {
            let x = random(seed, size, size[0].min(size[1]));
            let narrow: Vec<f32> = x.iter().map(|x| *x as f32).collect();
            let exact: Vec<f64> = narrow.iter().map(|x| f64::from(*x)).collect();
            let (got, wanted) = (orthogonalized(narrow, size), orthogonalized(exact, size));
            let error = got.iter().zip(&wanted).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>().sqrt();
            let scale = square_sum(&wanted).sqrt();
            assert!(error < 1e-4 * scale, "{size:?}: {error:e} of {scale}");
        }
    }

    #[test]
    fn no_gradient_moves_nothing() {
        let options = MuonOptions::DEFAULT;
        let (mut w, g, mut m, mut v) = ([1.5f32; 12], [0.0; 12], [0.0; 12], [0.0; 12]);
        let tensor = Tensor { w: &mut w, g: &g, first: &mut m, second: &mut v };
        update(&options, tensor, &[[3, 2], [2, 3]], [1.0, 0.1, 1.0]);
        assert_eq!((w, m, v), ([1.5; 12], [0.0; 12], [0.0; 12]));
    }
}
