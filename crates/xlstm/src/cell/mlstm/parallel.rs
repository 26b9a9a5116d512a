//! The parallel form: all pairs of tokens of one sequence, quadratic in its length.
//!
//! ```text
//! log D_tj = sum of log f over j+1..t, plus log i_j      (j <= t)
//! m_t = max_j log D_tj
//! A_tj = s (q_t . k_j) exp(log D_tj - m_t)
//! h_t = sum_j A_tj v_j / (max(|sum_j A_tj|, exp(-m_t)) + eps)
//! ```
//!
//! Row t of log D is row t-1 plus log f_t: sums of what lies between, never differences of
//! prefix sums.

use super::{HeadGradients, HeadInput, HeadOutput, HeadSaved, MlstmConfig};
use crate::engine::Scalar;
use crate::engine::vector::{axpy, dot, sum, vectorize};

/// exp(log D_t. - m_t) for row t from log D of row t-1; returns m_t.
fn advance_row<T: Scalar>(input: &HeadInput<'_, T>, t: usize, log_d: &mut [T], weights: &mut [T]) -> T {
    if input.is_reset(t) {
        log_d[..t].fill(T::NEG_INFINITY);
    }
    for x in &mut log_d[..t] {
        *x += input.log_f[t];
    }
    log_d[t] = input.log_i[t];
    let m = log_d[..=t].iter().fold(T::NEG_INFINITY, |m, x| m.max(*x));
    vectorize!(|| {
        for (w, x) in weights[..=t].iter_mut().zip(&log_d[..=t]) {
            *w = (*x - m).exp();
        }
    });
    m
}

/// All tokens of one head. The state is neither read nor written.
pub(super) fn forward<T: Scalar>(
    config: &MlstmConfig,
    input: &HeadInput<'_, T>,
    out: &mut HeadOutput<'_, T>,
    work: &mut [T],
) {
    let (log_d, weights) = work.split_at_mut(input.len());
    let scale = input.scale();
    for t in 0..input.len() {
        let h = out.h.row(t);
        h.fill(T::ZERO);
        if input.is_pad(t) {
            log_d[t] = T::NEG_INFINITY;
            (out.stabilizers[t], out.denominators[t]) = (T::ZERO, T::ZERO);
            continue;
        }
        let m = advance_row(input, t, log_d, weights);
        vectorize!(|| {
            for (j, weight) in weights[..=t].iter_mut().enumerate() {
                *weight *= scale * dot(input.q.row(t), input.k.row(j));
                axpy(*weight, input.v.row(j), h);
            }
            let d = sum(&weights[..=t]);
            let inverse = T::ONE / config.normalizer(d, m);
            for h in h.iter_mut() {
                *h *= inverse;
            }
            (out.stabilizers[t], out.denominators[t]) = (m, d);
        });
    }
}

/// Every pair once more: with P_tj = dnum_t . v_j + dd_t and G = A P,
/// dlog i_j = sum_t G_tj and dlog f_u = sum over t >= u > j of G_tj.
pub(super) fn backward<T: Scalar>(
    config: &MlstmConfig,
    input: &HeadInput<'_, T>,
    saved: &HeadSaved<'_, T>,
    grads: &mut HeadGradients<'_, T>,
    work: &mut [T],
) {
    let length = input.len();
    let (log_d, rest) = work.split_at_mut(length);
    let (weights, dnum) = rest.split_at_mut(length);
    let dnum = &mut dnum[..input.sizes.1];
    let scale = input.scale();
    grads.di.fill(T::ZERO);
    grads.df.fill(T::ZERO);
    for t in 0..length {
        if input.is_pad(t) {
            log_d[t] = T::NEG_INFINITY;
            continue;
        }
        let m = advance_row(input, t, log_d, weights);
        let winner = (0..=t).find(|&j| log_d[j] == m).unwrap_or(t);
        vectorize!(|| {
            let (q, dh) = (input.q.row(t), grads.dh.row(t));
            let d = saved.denominators[t];
            let normalizer = config.normalizer(d, m);
            let (dd, dm) = config.normalizer_gradients(dot(dh, saved.h.row(t)), d, m, normalizer);
            for (x, dh) in dnum.iter_mut().zip(dh) {
                *x = *dh / normalizer;
            }
            // Sources from the first on: what crosses u is everything before it.
            let mut crossing = T::ZERO;
            for (j, &weight) in weights[..=t].iter().enumerate() {
                if j > 0 {
                    grads.df[j] += crossing;
                }
                let p = dot(dnum, input.v.row(j)) + dd;
                let a = weight * scale * dot(q, input.k.row(j));
                grads.di[j] += a * p;
                crossing += a * p;
                let dlogit = weight * scale * p;
                axpy(dlogit, input.k.row(j), grads.dq.row(t));
                axpy(dlogit, q, grads.dk.row(j));
                axpy(a, dnum, grads.dv.row(j));
            }
            grads.di[winner] += dm;
            for df in &mut grads.df[winner + 1..=t] {
                *df += dm;
            }
        });
    }
}
