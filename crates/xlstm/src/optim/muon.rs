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
    x.par_chunks_mut(TILE).for_each(|x| vectorize!(|| x.iter_mut().for_each(|x| *x = *x * by)));
}
