//! The chunkwise form: pairs of tokens within a chunk, states between chunks; the work is
//! a few dense products a chunk.
//!
//! With the stabilised exponents of [`stabilize`] (decay g_t, entry a_t, both <= 0):
//!
//! ```text
//! W_tj = exp(g_{j+1} + … + g_t + a_j)   (j <= t)       e_t = exp(g_1 + … + g_t)
//! A    = W ∘ s Q K^T
//! d    = A 1 + e ∘ (s Q n)            num = A V + (e ∘ s Q) C
//! C'   = e_L C + (W_L. ∘ K)^T V       n' = e_L n + (W_L. ∘ K)^T 1
//! ```
//!
//! A chunk ends early before a document reset, which clears the state by a branch.

use super::{HeadInput, HeadOutput, MlstmConfig, chunk_end, stabilize};
use crate::engine::Scalar;
use crate::engine::matrix::{MatMut, MatRef, Threads, product};
use crate::engine::vector::{axpy, dot, sum, vectorize};

/// The work space of one head: named pieces of one slice.
pub(super) struct Work<'a, T> {
    /// A or its gradient (L x L).
    pub(super) scores: &'a mut [T],
    /// W (L x L), zero above the diagonal.
    pub(super) weights: &'a mut [T],
    /// Scaled queries or keys (L x dqk).
    pub(super) scaled: &'a mut [T],
    /// m, decay, entry and e a token (4 x L).
    pub(super) gates: &'a mut [T],
}

impl<'a, T: Scalar> Work<'a, T> {
    pub(super) fn size(chunk: usize, dqk: usize) -> usize {
        2 * chunk * chunk + chunk * dqk + 4 * chunk
    }

    pub(super) fn new(space: &'a mut [T], chunk: usize, dqk: usize) -> Work<'a, T> {
        let (scores, rest) = space.split_at_mut(chunk * chunk);
        let (weights, rest) = rest.split_at_mut(chunk * chunk);
        let (scaled, rest) = rest.split_at_mut(chunk * dqk);
        Work { scores, weights, scaled, gates: &mut rest[..4 * chunk] }
    }
}

/// m, decay, entry and state weight e of the tokens of one chunk, given m before it.
#[inline(always)]
pub(super) fn chunk_gates<'w, T: Scalar>(
    log_i: &[T],
    log_f: &[T],
    m0: T,
    gates: &'w mut [T],
) -> (&'w [T], &'w [T], &'w [T], &'w [T]) {
    let len = log_i.len();
    let (m, rest) = gates.split_at_mut(len);
    let (decay, rest) = rest.split_at_mut(len);
    let (entry, rest) = rest.split_at_mut(len);
    let state = &mut rest[..len];
    stabilize(log_i, log_f, m0, m, decay, entry);
    let mut total = T::ZERO;
    for (e, g) in state.iter_mut().zip(decay.iter()) {
        total += *g;
        *e = total.exp();
    }
    (m, decay, entry, state)
}

/// W of one chunk: row t of the exponents is row t-1 plus decay_t.
#[inline(always)]
pub(super) fn chunk_weights<T: Scalar>(decay: &[T], entry: &[T], weights: &mut [T]) {
    let len = decay.len();
    for t in 0..len {
        let (before, row) = weights.split_at_mut(t * len);
        let row = &mut row[..len];
        if t > 0 {
            for (x, above) in row[..t].iter_mut().zip(&before[(t - 1) * len..]) {
                *x = *above + decay[t];
            }
        }
        row[t] = entry[t];
        row[t + 1..].fill(T::NEG_INFINITY);
    }
    for x in &mut weights[..len * len] {
        *x = x.exp();
    }
}

/// to = diag(factors) from, row by row.
#[inline(always)]
pub(super) fn scale_rows<T: Scalar>(
    from: MatRef<'_, T>,
    factors: impl Fn(usize) -> T,
    width: usize,
    to: &mut [T],
) {
    for (t, row) in to.chunks_exact_mut(width).enumerate() {
        let factor = factors(t);
        for (y, x) in row.iter_mut().zip(from.row(t)) {
            *y = factor * *x;
        }
    }
}

/// The rows of a column block side by side: at a stride of a few kilobytes, rows share so
/// few lines of the cache that a product with the transpose takes twice as long.
pub(super) fn dense<'w, T: Scalar>(from: MatRef<'_, T>, width: usize, to: &'w mut [T]) -> MatRef<'w, T> {
    for (t, row) in to.chunks_exact_mut(width).enumerate() {
        row.copy_from_slice(from.row(t));
    }
    MatRef::new(to, to.len() / width, width)
}

/// All tokens of one head.
pub(super) fn forward<T: Scalar>(
    config: &MlstmConfig,
    chunk: usize,
    input: &HeadInput<'_, T>,
    out: &mut HeadOutput<'_, T>,
    space: &mut [T],
) {
    let (dqk, dhv) = input.sizes;
    let scale = input.scale();
    let work = Work::new(space, chunk, dqk);
    let mut start = 0;
    while start < input.len() {
        let end = chunk_end(input, start, chunk);
        let len = end - start;
        if input.is_reset(start) {
            out.c.fill(T::ZERO);
            out.n.fill(T::ZERO);
            *out.m = config.empty_stabilizer();
        }
        let (q, k, v) =
            (input.q.rows_at(start, len), input.k.rows_at(start, len), input.v.rows_at(start, len));
        let scores = &mut work.scores[..len * len];
        let weights = &mut work.weights[..len * len];
        let scaled = &mut work.scaled[..len * dqk];
        let (m, decay, entry, state) = vectorize!(|| chunk_gates(
            &input.log_i[start..end],
            &input.log_f[start..end],
            *out.m,
            &mut *work.gates
        ));
        let keys = dense(k, dqk, scaled);
        product(MatMut::new(scores, len, len), scale, q, keys.t(), false, Threads::One);
        let denominators = &mut out.denominators[start..end];
        vectorize!(|| {
            chunk_weights(decay, entry, weights);
            for (a, w) in scores.iter_mut().zip(weights.iter()) {
                *a *= *w;
            }
            scale_rows(q, |t| state[t] * scale, dqk, scaled);
            for t in 0..len {
                denominators[t] = sum(&scores[t * len..][..len]) + dot(&scaled[t * dqk..][..dqk], out.n);
            }
        });
        let c = MatRef::new(out.c, dqk, dhv);
        product(out.h.rows_at(start, len), T::ONE, MatRef::new(scores, len, len), v, false, Threads::One);
        product(out.h.rows_at(start, len), T::ONE, MatRef::new(scaled, len, dqk), c, true, Threads::One);
        vectorize!(|| {
            for t in 0..len {
                let inverse = T::ONE / config.normalizer(denominators[t], m[t]);
                let h = out.h.row(start + t);
                if input.is_pad(start + t) {
                    h.fill(T::ZERO);
                } else {
                    for h in h {
                        *h *= inverse;
                    }
                }
            }
            let last = &weights[(len - 1) * len..];
            scale_rows(k, |t| last[t], dqk, scaled);
            let kept = state[len - 1];
            for c in out.c.iter_mut() {
                *c *= kept;
            }
            for n in out.n.iter_mut() {
                *n *= kept;
            }
            for row in scaled.chunks_exact(dqk) {
                axpy(T::ONE, row, out.n);
            }
        });
        let keys = MatRef::new(scaled, len, dqk);
        product(MatMut::new(out.c, dqk, dhv), T::ONE, keys.t(), v, true, Threads::One);
        out.stabilizers[start..end].copy_from_slice(m);
        *out.m = m[len - 1];
        start = end;
    }
}
