//! The gradient of the chunkwise form: first left to right for the states that chunks
//! start from, then right to left with the gradients of those states.
//!
//! The normaliser is one more value column of ones: with dnum_t = dh_t / N_t and
//! dd_t = -(dh_t . h_t) / N_t sign(d_t) where |d_t| is above its floor, and C, n, dC, dn
//! those before and after the chunk,
//!
//! ```text
//! P = dnum V^T + dd 1^T            G = A ∘ P            Z = dnum C^T + dd n^T
//! Y = V dC^T + 1 dn^T              b = W_L. ∘ (K ∘ Y) 1
//! dQ = s (W ∘ P) K + s e ∘ Z       dK = s (W ∘ P)^T Q + W_L. ∘ Y
//! dV = A^T dnum + (W_L. ∘ K) dC
//! dC <- e_L dC + (s e ∘ Q)^T dnum  dn <- e_L dn + (s e ∘ Q)^T dd
//! dlog i_j = sum_t G_tj + b_j
//! dlog f_u = sum_{t>=u} (s e_t q_t . Z_t + sum_{j<u} G_tj) + e_L (C.dC + n.dn) + sum_{j<u} b_j
//! ```
//!
//! The sums for log f hold no differences, so nothing cancels where forget gates are shut.
//! The stabiliser cancels everywhere but in eps and in the last state; what is left walks
//! back along its maxima ([`unwind_stabilizer`]).

use super::chunkwise::{Work, chunk_gates, chunk_weights, dense, scale_rows};
use super::{HeadGradients, HeadInput, HeadSaved, MlstmConfig, chunk_end, inner, unwind_stabilizer};
use crate::engine::Scalar;
use crate::engine::matrix::{MatMut, MatRef, Threads, product};
use crate::engine::vector::{add_to, axpy, dot, sum, vectorize};

/// Elements of work space for one head of `length` tokens with at most `resets` resets.
pub(super) fn work_size<T: Scalar>(
    length: usize,
    resets: usize,
    chunk: usize,
    (dqk, dhv): (usize, usize),
) -> usize {
    let chunks = length.div_ceil(chunk) + resets;
    let state = dqk * dhv + dqk;
    let pieces = chunk * (chunk + dqk + 2 * dhv) + 4 * chunk;
    Work::<T>::size(chunk, dqk) + pieces + chunks * state
}

/// All tokens of one head.
pub(super) fn backward<T: Scalar>(
    config: &MlstmConfig,
    chunk: usize,
    input: &HeadInput<'_, T>,
    saved: &HeadSaved<'_, T>,
    grads: &mut HeadGradients<'_, T>,
    space: &mut [T],
) {
    let (dqk, dhv) = input.sizes;
    let state_size = dqk * dhv + dqk;
    let (head, rest) = space.split_at_mut(Work::<T>::size(chunk, dqk));
    let mut work = Work::new(head, chunk, dqk);
    let (p, rest) = rest.split_at_mut(chunk * chunk);
    let (rows, rest) = rest.split_at_mut(chunk * dqk);
    let (dnum, rest) = rest.split_at_mut(chunk * dhv);
    let (values, rest) = rest.split_at_mut(chunk * dhv);
    let (per_token, states) = rest.split_at_mut(4 * chunk);

    let starts = chunk_states(config, chunk, input, saved, &mut work, states);
    for (index, &start) in starts.iter().enumerate().rev() {
        let end = starts.get(index + 1).copied().unwrap_or(input.len());
        let len = end - start;
        let fresh = input.is_reset(start);
        let (c, n) = states[index * state_size..][..state_size].split_at(dqk * dhv);
        let m0 = previous_stabilizer(config, input, saved, start);
        let scale = input.scale();
        let (q, k, v) =
            (input.q.rows_at(start, len), input.k.rows_at(start, len), input.v.rows_at(start, len));
        let scores = &mut work.scores[..len * len];
        let weights = &mut work.weights[..len * len];
        let scaled = &mut work.scaled[..len * dqk];
        let (p, rows, dnum) = (&mut p[..len * len], &mut rows[..len * dqk], &mut dnum[..len * dhv]);
        let (dd, rest) = per_token.split_at_mut(chunk);
        let (dm, rest) = rest.split_at_mut(chunk);
        let (columns, leaving) = rest.split_at_mut(chunk);
        let (dd, dm) = (&mut dd[..len], &mut dm[..len]);
        let (columns, leaving) = (&mut columns[..len], &mut leaving[..len]);
        let (di, df) = (&mut grads.di[start..end], &mut grads.df[start..end]);

        // W, A, dnum, dd.
        let (m, decay, entry, state) = vectorize!(|| chunk_gates(
            &input.log_i[start..end],
            &input.log_f[start..end],
            m0,
            &mut *work.gates
        ));
        let keys = dense(k, dqk, scaled);
        product(MatMut::new(scores, len, len), scale, q, keys.t(), false, Threads::One);
        vectorize!(|| {
            chunk_weights(decay, entry, weights);
            for (a, w) in scores.iter_mut().zip(weights.iter()) {
                *a *= *w;
            }
            for t in 0..len {
                let row = &mut dnum[t * dhv..][..dhv];
                if input.is_pad(start + t) {
                    row.fill(T::ZERO);
                    (dd[t], dm[t]) = (T::ZERO, T::ZERO);
                    continue;
                }
                let (dh, d) = (grads.dh.row(start + t), saved.denominators[start + t]);
                let normalizer = config.normalizer(d, m[t]);
                let dh_h = dot(dh, saved.h.row(start + t));
                (dd[t], dm[t]) = config.normalizer_gradients(dh_h, d, m[t], normalizer);
                let inverse = T::ONE / normalizer;
                for (x, dh) in row.iter_mut().zip(dh) {
                    *x = *dh * inverse;
                }
            }
        });
        let numerators = MatRef::new(dnum, len, dhv);

        // Through the pairs: P and G.
        product(
            grads.dv.rows_at(start, len),
            T::ONE,
            MatRef::new(scores, len, len).t(),
            numerators,
            true,
            Threads::One,
        );
        let values = dense(v, dhv, &mut values[..len * dhv]);
        product(MatMut::new(p, len, len), T::ONE, numerators, values.t(), false, Threads::One);
        vectorize!(|| {
            columns.fill(T::ZERO);
            for t in (0..len).rev() {
                let row = t * len..(t + 1) * len;
                for ((p, g), w) in p[row.clone()].iter_mut().zip(&mut scores[row.clone()]).zip(&weights[row])
                {
                    *p += dd[t];
                    *g *= *p;
                    *p *= *w * scale;
                }
                add_to(&scores[t * len..][..t + 1], columns);
                df[t] = sum(&columns[..t]);
            }
            di.copy_from_slice(columns);
        });
        let pairs = MatRef::new(p, len, len);
        product(grads.dq.rows_at(start, len), T::ONE, pairs, k, true, Threads::One);
        product(grads.dk.rows_at(start, len), T::ONE, pairs.t(), q, true, Threads::One);

        // Out of the chunk, through the state after it.
        product(
            MatMut::new(rows, len, dqk),
            T::ONE,
            v,
            MatRef::new(grads.dc, dqk, dhv).t(),
            false,
            Threads::One,
        );
        let kept = state[len - 1];
        vectorize!(|| {
            let last = &weights[(len - 1) * len..][..len];
            scale_rows(k, |t| last[t], dqk, scaled);
            let mut crossing = T::ZERO;
            if !fresh {
                crossing = kept * (dot(c, grads.dc) + dot(n, grads.dn));
            }
            for t in 0..len {
                let y = &mut rows[t * dqk..][..dqk];
                add_to(grads.dn, y);
                df[t] += crossing;
                leaving[t] = dot(&scaled[t * dqk..][..dqk], y);
                crossing += leaving[t];
                di[t] += leaving[t];
                axpy(last[t], y, grads.dk.row(start + t));
            }
        });
        let keys = MatRef::new(scaled, len, dqk);
        product(
            grads.dv.rows_at(start, len),
            T::ONE,
            keys,
            MatRef::new(grads.dc, dqk, dhv),
            true,
            Threads::One,
        );

        // Into the chunk, through the state before it.
        if fresh {
            grads.dc.fill(T::ZERO);
            grads.dn.fill(T::ZERO);
        } else {
            product(
                MatMut::new(rows, len, dqk),
                T::ONE,
                numerators,
                MatRef::new(c, dqk, dhv).t(),
                false,
                Threads::One,
            );
            vectorize!(|| {
                scale_rows(q, |t| state[t] * scale, dqk, scaled);
                let mut arriving = T::ZERO;
                for t in (0..len).rev() {
                    let z = &mut rows[t * dqk..][..dqk];
                    axpy(dd[t], n, z);
                    arriving += dot(&scaled[t * dqk..][..dqk], z);
                    df[t] += arriving;
                    axpy(state[t] * scale, z, grads.dq.row(start + t));
                }
                for dc in grads.dc.iter_mut() {
                    *dc *= kept;
                }
                for dn in grads.dn.iter_mut() {
                    *dn *= kept;
                }
                for t in 0..len {
                    axpy(dd[t], &scaled[t * dqk..][..dqk], grads.dn);
                }
            });
            let queries = MatRef::new(scaled, len, dqk);
            product(MatMut::new(grads.dc, dqk, dhv), T::ONE, queries.t(), numerators, true, Threads::One);
        }
        *grads.dm = unwind_stabilizer(entry, decay, dm, *grads.dm, di, df);
        if fresh {
            *grads.dm = T::ZERO;
        }
    }
    // m_0 is also the scale of C_0 and n_0.
    if let Some((c, n, _)) = saved.initial {
        *grads.dm += inner(c, grads.dc) + inner(n, grads.dn);
    }
}

fn previous_stabilizer<T: Scalar>(
    config: &MlstmConfig,
    input: &HeadInput<'_, T>,
    saved: &HeadSaved<'_, T>,
    start: usize,
) -> T {
    if input.is_reset(start) {
        config.empty_stabilizer()
    } else if start > 0 {
        saved.stabilizers[start - 1]
    } else {
        saved.initial.map_or(config.empty_stabilizer(), |(_, _, m)| m)
    }
}

/// C and n before every chunk, one after the other in `states`; returns the chunks' starts.
fn chunk_states<T: Scalar>(
    config: &MlstmConfig,
    chunk: usize,
    input: &HeadInput<'_, T>,
    saved: &HeadSaved<'_, T>,
    work: &mut Work<'_, T>,
    states: &mut [T],
) -> Vec<usize> {
    let (dqk, dhv) = input.sizes;
    let state_size = dqk * dhv + dqk;
    let mut starts = Vec::with_capacity(states.len() / state_size);
    match saved.initial {
        Some((c, n, _)) => {
            states[..dqk * dhv].copy_from_slice(c);
            states[dqk * dhv..state_size].copy_from_slice(n);
        }
        None => states[..state_size].fill(T::ZERO),
    }
    let mut start = 0;
    while start < input.len() {
        let end = chunk_end(input, start, chunk);
        let len = end - start;
        let index = starts.len();
        starts.push(start);
        if input.is_reset(start) {
            states[index * state_size..][..state_size].fill(T::ZERO);
        }
        if end == input.len() {
            break;
        }
        let (before, after) = states.split_at_mut((index + 1) * state_size);
        let before = &before[index * state_size..];
        let (c, n) = after[..state_size].split_at_mut(dqk * dhv);
        let m0 = previous_stabilizer(config, input, saved, start);
        let scaled = &mut work.scaled[..len * dqk];
        let k = input.k.rows_at(start, len);
        vectorize!(|| {
            let (_, decay, entry, state) =
                chunk_gates(&input.log_i[start..end], &input.log_f[start..end], m0, &mut *work.gates);
            // The last row of W, from its end.
            let last = &mut work.weights[..len];
            let mut exponent = T::ZERO;
            for t in (0..len).rev() {
                last[t] = (exponent + entry[t]).exp();
                exponent += decay[t];
            }
            scale_rows(k, |t| last[t], dqk, scaled);
            let kept = state[len - 1];
            for (to, from) in c.iter_mut().zip(before) {
                *to = kept * *from;
            }
            for (to, from) in n.iter_mut().zip(&before[dqk * dhv..]) {
                *to = kept * *from;
            }
            for row in scaled.chunks_exact(dqk) {
                axpy(T::ONE, row, n);
            }
        });
        let keys = MatRef::new(scaled, len, dqk);
        product(MatMut::new(c, dqk, dhv), T::ONE, keys.t(), input.v.rows_at(start, len), true, Threads::One);
        start = end;
    }
    starts
}
