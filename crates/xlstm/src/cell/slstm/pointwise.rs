//! The two cells, element by element: forward directly above backward.
//!
//! Elements go through in blocks of [`LANES`] held in local arrays: a loop over arrays
//! needs no proof that a dozen slices do not overlap, and so becomes SIMD code.

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
fn load<T: Scalar>(x: &[T], dim: usize, part: usize, at: usize, len: usize) -> Block<T> {
    let x = &x[part * dim + at..][..len];
    // A copy of constant length is a few moves, no call.
    if let Ok(whole) = <&Block<T>>::try_from(x) {
        return *whole;
    }
    let mut block = [T::ZERO; LANES];
    block[..len].copy_from_slice(x);
    block
}

#[inline(always)]
fn store<T: Scalar>(x: &mut [T], dim: usize, part: usize, at: usize, len: usize, block: &Block<T>) {
    let x = &mut x[part * dim + at..][..len];
    match <&mut Block<T>>::try_from(&mut *x) {
        Ok(whole) => *whole = *block,
        Err(_) => x.copy_from_slice(&block[..len]),
    }
}

/// `len`, hidden from the compiler: a loop of known length it unrolls into scalar code
/// instead of vectorising it (10 ns an element).
#[inline(always)]
fn trips(len: usize) -> usize {
    std::hint::black_box(len).min(LANES)
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
        let trips = trips(len);
        let [raw_i, raw_f, raw_z, raw_o] = [0, 1, 2, 3].map(|g| load(raw, dim, g, at, len));
        let [h0, c0, n0, m0] = [0, 1, 2, 3].map(|p| load(state, dim, p, at, len));
        let mut log_i = raw_i;
        let mut log_f = raw_f;
        for l in 0..trips {
            log_i[l] = config.input_gate.log(raw_i[l]);
        }
        for l in 0..trips {
            log_f[l] = config.forget_gate.log(raw_f[l]);
        }
        let [mut i, mut f, mut z, mut o, mut slope] = [[T::ZERO; LANES]; 5];
        let [mut h, mut c, mut n, mut m] = [h0, c0, n0, m0];
        for l in 0..trips {
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
        for l in 0..trips {
            slope[l] = config.forget_gate.log_derivative(raw_f[l]);
        }
        for (part, block) in [&h, &c, &n, &m].into_iter().enumerate() {
            store(state, dim, part, at, len, block);
        }
        for (part, block) in [&h0, &c0, &n0, &i, &f, &z, &o, &slope].into_iter().enumerate() {
            store(record, dim, part, at, len, block);
        }
        if record.len() > SLSTM_RECORD * dim {
            for l in 0..trips {
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
        let trips = trips(len);
        let [c0, n0, i, f, z, o, slope_f] = [1, 2, 3, 4, 5, 6, 7].map(|p| load(record, dim, p, at, len));
        let slope_i = if record.len() > SLSTM_RECORD * dim {
            load(record, dim, SLSTM_RECORD, at, len)
        } else {
            [T::ONE; LANES]
        };
        let mut dh_all = load(carried_h, dim, 0, at, len);
        let [mut dc, mut dn, mut g] = [0, 1, 2].map(|p| load(carry, dim, p, at, len));
        if let Some(dh) = dh {
            let dh = load(dh, dim, 0, at, len);
            for l in 0..trips {
                dh_all[l] += dh[l];
            }
        }
        let [mut di, mut df, mut dz, mut d_o] = [[T::ZERO; LANES]; 4];
        for l in 0..trips {
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
            dc[l] = f[l] * dc_all;
            dn[l] = f[l] * dn_all;
            g[l] = to_f;
        }
        carried_h[at..at + len].fill(T::ZERO);
        for (part, block) in [&dc, &dn, &g].into_iter().enumerate() {
            store(carry, dim, part, at, len, block);
        }
        for (part, block) in [&di, &df, &dz, &d_o].into_iter().enumerate() {
            store(draw, dim, part, at, len, block);
        }
    }
}

/// One token of one head of an LSTM; as [`slstm_forward`], with a state of h and c.
#[inline(always)]
pub(super) fn lstm_forward<T: Scalar>(raw: &[T], state: &mut [T], out: &mut [T], record: &mut [T]) {
    let dim = out.len();
    for at in (0..dim).step_by(LANES) {
        let len = LANES.min(dim - at);
        let trips = trips(len);
        let [raw_i, raw_f, raw_z, raw_o] = [0, 1, 2, 3].map(|g| load(raw, dim, g, at, len));
        let [h0, c0] = [0, 1].map(|p| load(state, dim, p, at, len));
        let [mut i, mut f, mut z, mut o, mut c, mut h] = [[T::ZERO; LANES]; 6];
        for l in 0..trips {
            i[l] = raw_i[l].sigmoid();
            f[l] = raw_f[l].sigmoid();
            z[l] = raw_z[l].tanh();
            o[l] = raw_o[l].sigmoid();
            c[l] = f[l] * c0[l] + i[l] * z[l];
            h[l] = o[l] * c[l].tanh();
        }
        store(state, dim, 0, at, len, &h);
        store(state, dim, 1, at, len, &c);
        for (part, block) in [&h0, &c0, &i, &f, &z, &o].into_iter().enumerate() {
            store(record, dim, part, at, len, block);
        }
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
        let trips = trips(len);
        let [c0, i, f, z, o] = [1, 2, 3, 4, 5].map(|p| load(record, dim, p, at, len));
        let mut dh_all = load(carried_h, dim, 0, at, len);
        let mut dc = load(carry, dim, 0, at, len);
        if let Some(dh) = dh {
            let dh = load(dh, dim, 0, at, len);
            for l in 0..trips {
                dh_all[l] += dh[l];
            }
        }
        let [mut di, mut df, mut dz, mut d_o] = [[T::ZERO; LANES]; 4];
        for l in 0..trips {
            let y = (f[l] * c0[l] + i[l] * z[l]).tanh();
            d_o[l] = dh_all[l] * y * o[l] * (T::ONE - o[l]);
            let dc_all = dc[l] + dh_all[l] * o[l] * (T::ONE - y * y);
            di[l] = dc_all * z[l] * i[l] * (T::ONE - i[l]);
            df[l] = dc_all * c0[l] * f[l] * (T::ONE - f[l]);
            dz[l] = dc_all * i[l] * (T::ONE - z[l] * z[l]);
            dc[l] = f[l] * dc_all;
        }
        carried_h[at..at + len].fill(T::ZERO);
        store(carry, dim, 0, at, len, &dc);
        for (part, block) in [&di, &df, &dz, &d_o].into_iter().enumerate() {
            store(draw, dim, part, at, len, block);
        }
    }
}
