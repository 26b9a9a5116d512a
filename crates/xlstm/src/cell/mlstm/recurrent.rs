//! The recurrent form: the equations a token at a time. Its forward is the decode step;
//! its backward is the chain rule taken literally, the stabiliser a variable like any
//! other, keeping every C_t: slow, and the truth for the other forms.

use super::{HeadGradients, HeadInput, HeadOutput, HeadSaved, MlstmConfig};
use crate::engine::Scalar;
use crate::engine::vector::{dot, vectorize};

/// All tokens of one head, in order.
pub(super) fn forward<T: Scalar>(
    config: &MlstmConfig,
    input: &HeadInput<'_, T>,
    out: &mut HeadOutput<'_, T>,
) {
    for t in 0..input.len() {
        if input.is_reset(t) {
            out.c.fill(T::ZERO);
            out.n.fill(T::ZERO);
            *out.m = config.empty_stabilizer();
        }
        if input.is_pad(t) {
            out.h.row(t).fill(T::ZERO);
            (out.stabilizers[t], out.denominators[t]) = (*out.m, T::ZERO);
            continue;
        }
        let (d, m) = vectorize!(|| {
            let (q, k, v) = (input.q.row(t), input.k.row(t), input.v.row(t));
            step(config, input, t, (q, k, v), (&mut *out.c, &mut *out.n, *out.m), out.h.row(t))
        });
        *out.m = m;
        (out.stabilizers[t], out.denominators[t]) = (m, d);
    }
}

/// One token: updates C and n, writes h, returns (d_t, m_t). One pass over C.
#[inline(always)]
fn step<T: Scalar>(
    config: &MlstmConfig,
    input: &HeadInput<'_, T>,
    t: usize,
    (q, k, v): (&[T], &[T], &[T]),
    (c, n, m0): (&mut [T], &mut [T], T),
    h: &mut [T],
) -> (T, T) {
    let kept = input.log_f[t] + m0;
    let m = kept.max(input.log_i[t]);
    let (f, i) = ((kept - m).exp(), (input.log_i[t] - m).exp());
    let scale = input.scale();
    h.fill(T::ZERO);
    for (r, row) in c.chunks_exact_mut(v.len()).enumerate() {
        let (write, read) = (i * k[r], scale * q[r]);
        for ((c, v), h) in row.iter_mut().zip(v).zip(h.iter_mut()) {
            *c = f.mul_add(*c, write * *v);
            *h = read.mul_add(*c, *h);
        }
        n[r] = f.mul_add(n[r], write);
    }
    let d = scale * dot(q, n);
    let inverse = T::ONE / config.normalizer(d, m);
    for h in h.iter_mut() {
        *h *= inverse;
    }
    (d, m)
}

/// Back-propagation through time over all stored states.
pub(super) fn backward<T: Scalar>(
    config: &MlstmConfig,
    input: &HeadInput<'_, T>,
    saved: &HeadSaved<'_, T>,
    grads: &mut HeadGradients<'_, T>,
) {
    let (length, (dqk, dhv)) = (input.len(), input.sizes);
    let scale = input.scale();
    let (cs, ns, ms) = all_states(config, input, saved);
    let zeros = vec![T::ZERO; dqk * dhv.max(1)];
    for t in (0..length).rev() {
        (grads.di[t], grads.df[t]) = (T::ZERO, T::ZERO);
        if input.is_pad(t) {
            continue;
        }
        let (c0, c1) = (&cs[t * dqk * dhv..][..dqk * dhv], &cs[(t + 1) * dqk * dhv..][..dqk * dhv]);
        let (n0, n1) = (&ns[t * dqk..][..dqk], &ns[(t + 1) * dqk..][..dqk]);
        let (m0, m1) = (ms[t], ms[t + 1]);
        let (c0, n0, m0) = if input.is_reset(t) {
            (&zeros[..], &zeros[..dqk], config.empty_stabilizer())
        } else {
            (c0, n0, m0)
        };
        let (q, k, v, dh) = (input.q.row(t), input.k.row(t), input.v.row(t), grads.dh.row(t));
        let (dc, dn) = (&mut *grads.dc, &mut *grads.dn);
        // h = num / N
        let d = scale * dot(q, n1);
        let normalizer = config.normalizer(d, m1);
        let dh_h: T = dot(dh, saved.h.row(t));
        let (dd, _) = config.normalizer_gradients(dh_h, d, m1, normalizer);
        let mut dm = *grads.dm;
        // N's own m: through exp(-m) where it is the larger, and where h is not normalised.
        let floor = (-m1).exp();
        let slope = -dh_h / normalizer;
        let in_floor = if !config.normalize {
            T::ONE
        } else {
            let eps = match config.input_gate {
                super::InputGate::Sigmoid => T::from_f64(config.eps),
                super::InputGate::Exponential => T::ZERO,
            };
            if d.abs() > floor { eps } else { T::ONE + eps }
        };
        if in_floor != T::ZERO && slope != T::ZERO {
            dm -= slope * in_floor * floor;
        }
        let dq = grads.dq.row(t);
        for r in 0..dqk {
            let row = r * dhv..(r + 1) * dhv;
            dq[r] += scale * (dot(dh, &c1[row.clone()]) / normalizer + dd * n1[r]);
            for (dc, dh) in dc[row].iter_mut().zip(dh) {
                *dc += scale * q[r] * *dh / normalizer;
            }
            dn[r] += scale * q[r] * dd;
        }
        // C = f C0 + i k v^T, n = f n0 + i k
        let kept = input.log_f[t] + m0;
        let (f, i) = ((kept - m1).exp(), (input.log_i[t] - m1).exp());
        let (mut df, mut di) = (T::ZERO, T::ZERO);
        let (dk, dv) = (grads.dk.row(t), grads.dv.row(t));
        for r in 0..dqk {
            let row = r * dhv..(r + 1) * dhv;
            let dc_v = dot(&dc[row.clone()], v) + dn[r];
            df += dot(&dc[row.clone()], &c0[row.clone()]) + dn[r] * n0[r];
            di += k[r] * dc_v;
            dk[r] += i * dc_v;
            for (dv, dc) in dv.iter_mut().zip(&dc[row.clone()]) {
                *dv += i * k[r] * *dc;
            }
            for dc in &mut dc[row] {
                *dc *= f;
            }
            dn[r] *= f;
        }
        // f = exp(log f + m0 - m), i = exp(log i - m), m = max(log f + m0, log i)
        let (df, di) = (df * f, di * i);
        dm -= df + di;
        let (mut dlog_f, mut dlog_i) = (df, di);
        let mut dm0 = df;
        if kept >= input.log_i[t] {
            dlog_f += dm;
            dm0 += dm;
        } else {
            dlog_i += dm;
        }
        (grads.di[t], grads.df[t], *grads.dm) = (dlog_i, dlog_f, dm0);
        if input.is_reset(t) {
            grads.dc.fill(T::ZERO);
            grads.dn.fill(T::ZERO);
            *grads.dm = T::ZERO;
        }
    }
}

/// C, n and m before the first token and after every one.
fn all_states<T: Scalar>(
    config: &MlstmConfig,
    input: &HeadInput<'_, T>,
    saved: &HeadSaved<'_, T>,
) -> (Vec<T>, Vec<T>, Vec<T>) {
    let (length, (dqk, dhv)) = (input.len(), input.sizes);
    let mut cs = vec![T::ZERO; (length + 1) * dqk * dhv];
    let mut ns = vec![T::ZERO; (length + 1) * dqk];
    let mut ms = vec![T::ZERO; length + 1];
    if let Some((c, n, m)) = saved.initial {
        cs[..dqk * dhv].copy_from_slice(c);
        ns[..dqk].copy_from_slice(n);
        ms[0] = m;
    } else {
        ms[0] = config.empty_stabilizer();
    }
    for t in 0..length {
        let (before, after) = cs.split_at_mut((t + 1) * dqk * dhv);
        let (c0, c1) = (&before[t * dqk * dhv..], &mut after[..dqk * dhv]);
        let (before, after) = ns.split_at_mut((t + 1) * dqk);
        let (n0, n1) = (&before[t * dqk..], &mut after[..dqk]);
        if input.is_pad(t) {
            c1.copy_from_slice(c0);
            n1.copy_from_slice(n0);
            ms[t + 1] = ms[t];
            continue;
        }
        let reset = input.is_reset(t);
        let kept = input.log_f[t] + if reset { config.empty_stabilizer() } else { ms[t] };
        let m = kept.max(input.log_i[t]);
        let f = if reset { T::ZERO } else { (kept - m).exp() };
        let i = (input.log_i[t] - m).exp();
        let (k, v) = (input.k.row(t), input.v.row(t));
        for r in 0..dqk {
            for e in 0..dhv {
                c1[r * dhv + e] = f * c0[r * dhv + e] + i * k[r] * v[e];
            }
            n1[r] = f * n0[r] + i * k[r];
        }
        ms[t + 1] = m;
    }
    (cs, ns, ms)
}
