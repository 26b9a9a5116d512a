//! The two cells, element by element: forward directly above backward.
//!
//! Elements go through in blocks of [`LANES`]: a loop reads slices of one length and writes
//! local arrays, which are then copied out. That it becomes SIMD code needs no proof that a
//! dozen slices do not overlap. Loads and stores are spelled out one by one, because an
//! array of slices, or a length known to be 16, makes the loops scalar again (10 to 20 ns
//! an element forward instead of 4).

use super::SlstmConfig;
use crate::engine::Scalar;

/// Elements of a block.
const LANES: usize = 32;
type Block<T> = [T; LANES];

/// What an sLSTM element leaves behind at a step: h, c and n before it, i', f', tanh(~z),
/// sigmoid(~o), d log f / d ~f (and d log i / d ~i of a sigmoid input gate).
pub(super) const SLSTM_RECORD: usize = 8;
/// What an LSTM element leaves behind at a step: h and c before it, i, f, tanh(~z), o.
pub(super) const LSTM_RECORD: usize = 6;

/// `len` elements of part `part` of a row of parts of `dim` elements, from element `at`.
#[inline(always)]
fn part<T>(x: &[T], dim: usize, part: usize, at: usize, len: usize) -> &[T] {
    &x[part * dim + at..][..len]
}

#[inline(always)]
fn part_mut<T>(x: &mut [T], dim: usize, part: usize, at: usize, len: usize) -> &mut [T] {
    &mut x[part * dim + at..][..len]
}

/// Writes a block, or what there is of it, to such a place.
#[inline(always)]
fn store<T: Scalar>(x: &mut [T], dim: usize, part: usize, at: usize, len: usize, block: &Block<T>) {
    let x = part_mut(x, dim, part, at, len);
    match <&mut Block<T>>::try_from(&mut *x) {
        Ok(whole) => *whole = *block,
        Err(_) => x.copy_from_slice(&block[..len]),
    }
}

/// One token of one head of an sLSTM: raw (4 DH) -> h into `out` (DH), the new `state`
/// (h, c, n, m: 4 DH), and what backward needs into `record`.
#[inline(always)]
pub(super) fn slstm_forward<T: Scalar>(
    config: &SlstmConfig,
    raw: &[T],
    state: &mut [T],
    out: &mut [T],
    record: &mut [T],
) {
    let dim = out.len();
    for at in (0..dim).step_by(LANES) {
        let len = LANES.min(dim - at);
        let raw_i = part(raw, dim, 0, at, len);
        let raw_f = part(raw, dim, 1, at, len);
        let raw_z = part(raw, dim, 2, at, len);
        let raw_o = part(raw, dim, 3, at, len);
        let h0 = part(state, dim, 0, at, len);
        let c0 = part(state, dim, 1, at, len);
        let n0 = part(state, dim, 2, at, len);
        let m0 = part(state, dim, 3, at, len);
        let [mut log_i, mut log_f] = [[T::ZERO; LANES]; 2];
        for l in 0..len {
            log_i[l] = config.input_gate.log(raw_i[l]);
        }
        for l in 0..len {
            log_f[l] = config.forget_gate.log(raw_f[l]);
        }
        let [mut i, mut f, mut z, mut o, mut slope] = [[T::ZERO; LANES]; 5];
        let [mut h, mut c, mut n, mut m] = [[T::ZERO; LANES]; 4];
        for l in 0..len {
            let old = log_f[l] + m0[l];
            m[l] = if n0[l] == T::ZERO { log_i[l] } else { log_i[l].max(old) };
            // In this order of arguments a NaN survives.
            i[l] = T::ONE.min((log_i[l] - m[l]).exp());
            f[l] = T::ONE.min((old - m[l]).exp());
            z[l] = raw_z[l].tanh();
            o[l] = raw_o[l].sigmoid();
            c[l] = f[l] * c0[l] + i[l] * z[l];
            n[l] = f[l] * n0[l] + i[l];
            h[l] = o[l] * c[l] / n[l];
        }
        for l in 0..len {
            slope[l] = config.forget_gate.log_derivative(raw_f[l]);
        }
        part_mut(record, dim, 0, at, len).copy_from_slice(h0);
        part_mut(record, dim, 1, at, len).copy_from_slice(c0);
        part_mut(record, dim, 2, at, len).copy_from_slice(n0);
        store(record, dim, 3, at, len, &i);
        store(record, dim, 4, at, len, &f);
        store(record, dim, 5, at, len, &z);
        store(record, dim, 6, at, len, &o);
        store(record, dim, 7, at, len, &slope);
        store(state, dim, 0, at, len, &h);
        store(state, dim, 1, at, len, &c);
        store(state, dim, 2, at, len, &n);
        store(state, dim, 3, at, len, &m);
        if record.len() > SLSTM_RECORD * dim {
            for l in 0..len {
                slope[l] = config.input_gate.log_derivative(raw_i[l]);
            }
            store(record, dim, SLSTM_RECORD, at, len, &slope);
        }
        store(out, dim, 0, at, len, &h);
    }
}

/// The same token backward: gradient `dh` of its h (None: zero) and the gradients of the
/// state after it, `carried_h` (DH) and `carry` (dc, dn, g: 3 DH), -> `draw` (4 DH), and
/// in `carry` those of the state before it. `carried_h` becomes zero, for the product with
/// R to be added.
///
/// m cancels in h and in everything later, so c and n carry the whole gradient as if it
/// were constant. What remains is the last m's own: carry holds as its third part
/// g = dm - c dc - n dn of the last state, which goes to log f of each token until the one
/// whose log i set m.
#[inline(always)]
pub(super) fn slstm_backward<T: Scalar>(
    record: &[T],
    dh: Option<&[T]>,
    carried_h: &mut [T],
    carry: &mut [T],
    draw: &mut [T],
) {
    let dim = carried_h.len();
    for at in (0..dim).step_by(LANES) {
        let len = LANES.min(dim - at);
        let c0 = part(record, dim, 1, at, len);
        let n0 = part(record, dim, 2, at, len);
        let i = part(record, dim, 3, at, len);
        let f = part(record, dim, 4, at, len);
        let z = part(record, dim, 5, at, len);
        let o = part(record, dim, 6, at, len);
        let slope_f = part(record, dim, 7, at, len);
        let mut slope_i = [T::ONE; LANES];
        if record.len() > SLSTM_RECORD * dim {
            slope_i[..len].copy_from_slice(part(record, dim, SLSTM_RECORD, at, len));
        }
        let mut dh_all = [T::ZERO; LANES];
        dh_all[..len].copy_from_slice(part(carried_h, dim, 0, at, len));
        let dc = part(carry, dim, 0, at, len);
        let dn = part(carry, dim, 1, at, len);
        let g = part(carry, dim, 2, at, len);
        let [mut dc0, mut dn0, mut g0] = [[T::ZERO; LANES]; 3];
        if let Some(dh) = dh {
            let dh = part(dh, dim, 0, at, len);
            for l in 0..len {
                dh_all[l] += dh[l];
            }
        }
        let [mut di, mut df, mut dz, mut d_o] = [[T::ZERO; LANES]; 4];
        for l in 0..len {
            let n = f[l] * n0[l] + i[l];
            let ratio = (f[l] * c0[l] + i[l] * z[l]) / n;
            let dy = dh_all[l] * o[l] / n;
            d_o[l] = dh_all[l] * ratio * o[l] * (T::ONE - o[l]);
            let dc_all = dc[l] + dy;
            let dn_all = dn[l] - dy * ratio;
            let set_here = i[l] == T::ONE;
            let to_i = if set_here { g[l] } else { T::ZERO };
            let to_f = if set_here { T::ZERO } else { g[l] };
            di[l] = slope_i[l] * (i[l] * (z[l] * dc_all + dn_all) + to_i);
            df[l] = slope_f[l] * (f[l] * (c0[l] * dc_all + n0[l] * dn_all) + to_f);
            dz[l] = dc_all * i[l] * (T::ONE - z[l] * z[l]);
            dc0[l] = f[l] * dc_all;
            dn0[l] = f[l] * dn_all;
            g0[l] = to_f;
        }
        carried_h[at..at + len].fill(T::ZERO);
        store(carry, dim, 0, at, len, &dc0);
        store(carry, dim, 1, at, len, &dn0);
        store(carry, dim, 2, at, len, &g0);
        store(draw, dim, 0, at, len, &di);
        store(draw, dim, 1, at, len, &df);
        store(draw, dim, 2, at, len, &dz);
        store(draw, dim, 3, at, len, &d_o);
    }
}

/// One token of one head of an LSTM; as [`slstm_forward`], with a state of h and c.
#[inline(always)]
pub(super) fn lstm_forward<T: Scalar>(raw: &[T], state: &mut [T], out: &mut [T], record: &mut [T]) {
    let dim = out.len();
    for at in (0..dim).step_by(LANES) {
        let len = LANES.min(dim - at);
        let raw_i = part(raw, dim, 0, at, len);
        let raw_f = part(raw, dim, 1, at, len);
        let raw_z = part(raw, dim, 2, at, len);
        let raw_o = part(raw, dim, 3, at, len);
        let h0 = part(state, dim, 0, at, len);
        let c0 = part(state, dim, 1, at, len);
        let [mut i, mut f, mut z, mut o, mut c, mut h] = [[T::ZERO; LANES]; 6];
        for l in 0..len {
            i[l] = raw_i[l].sigmoid();
            f[l] = raw_f[l].sigmoid();
            z[l] = raw_z[l].tanh();
            o[l] = raw_o[l].sigmoid();
            c[l] = f[l] * c0[l] + i[l] * z[l];
            h[l] = o[l] * c[l].tanh();
        }
        part_mut(record, dim, 0, at, len).copy_from_slice(h0);
        part_mut(record, dim, 1, at, len).copy_from_slice(c0);
        store(record, dim, 2, at, len, &i);
        store(record, dim, 3, at, len, &f);
        store(record, dim, 4, at, len, &z);
        store(record, dim, 5, at, len, &o);
        store(state, dim, 0, at, len, &h);
        store(state, dim, 1, at, len, &c);
        store(out, dim, 0, at, len, &h);
    }
}

/// The same token backward; as [`slstm_backward`], of which it uses dh and dc.
#[inline(always)]
pub(super) fn lstm_backward<T: Scalar>(
    record: &[T],
    dh: Option<&[T]>,
    carried_h: &mut [T],
    carry: &mut [T],
    draw: &mut [T],
) {
    let dim = carried_h.len();
    for at in (0..dim).step_by(LANES) {
        let len = LANES.min(dim - at);
        let c0 = part(record, dim, 1, at, len);
        let i = part(record, dim, 2, at, len);
        let f = part(record, dim, 3, at, len);
        let z = part(record, dim, 4, at, len);
        let o = part(record, dim, 5, at, len);
        let mut dh_all = [T::ZERO; LANES];
        dh_all[..len].copy_from_slice(part(carried_h, dim, 0, at, len));
        let dc = part(carry, dim, 0, at, len);
        let mut dc0 = [T::ZERO; LANES];
        if let Some(dh) = dh {
            let dh = part(dh, dim, 0, at, len);
            for l in 0..len {
                dh_all[l] += dh[l];
            }
        }
        let [mut di, mut df, mut dz, mut d_o] = [[T::ZERO; LANES]; 4];
        for l in 0..len {
            let y = (f[l] * c0[l] + i[l] * z[l]).tanh();
            d_o[l] = dh_all[l] * y * o[l] * (T::ONE - o[l]);
            let dc_all = dc[l] + dh_all[l] * o[l] * (T::ONE - y * y);
            di[l] = dc_all * z[l] * i[l] * (T::ONE - i[l]);
            df[l] = dc_all * c0[l] * f[l] * (T::ONE - f[l]);
            dz[l] = dc_all * i[l] * (T::ONE - z[l] * z[l]);
            dc0[l] = f[l] * dc_all;
        }
        carried_h[at..at + len].fill(T::ZERO);
        store(carry, dim, 0, at, len, &dc0);
        store(draw, dim, 0, at, len, &di);
        store(draw, dim, 1, at, len, &df);
        store(draw, dim, 2, at, len, &dz);
        store(draw, dim, 3, at, len, &d_o);
    }
}
