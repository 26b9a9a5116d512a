//! The mLSTM on a GPU: the launches of mlstm.cu, in its order and with its work space.

use super::MlstmConfig;
use super::operation::Sizes;
use crate::cell::{ForgetGate, InputGate};
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::error::Result;

const SOURCE: Source = Source::new("mlstm", include_str!("mlstm.cu"));

/// Tokens of a chunk, and rows and columns of a tile: L of mlstm.cu.
const L: usize = 64;

fn flags(config: &MlstmConfig) -> u32 {
    u32::from(config.input_gate == InputGate::Sigmoid)
        | u32::from(config.forget_gate == ForgetGate::Exponential) << 1
        | u32::from(config.normalize) << 2
}

/// See [`Kernel::forward_cuda`](crate::engine::Kernel::forward_cuda).
pub(super) fn forward(
    config: &MlstmConfig,
    marked: bool,
    sizes: Sizes,
    io: &mut CudaForward<'_>,
) -> Result<()> {
    let Sizes { batch, length, heads, dqk, dhv } = sizes;
    let [q, k, v, i, f, c0, n0, m0, ..] = io.inputs;
    let [h, c, n, m, stabilizers, denominators, ..] = io.outputs;
    let marks = marked.then_some(io.ids[0]);
    let (flags, eps) = (flags(config), config.eps);
    let (tasks, chunks) = (batch * heads, length.div_ceil(L));
    let (key_tiles, value_tiles) = (dqk.div_ceil(L), dhv.div_ceil(L));
    let queue = &mut *io.queue;
    if length == 1 {
        let arguments = arguments![
            q,
            k,
            v,
            i,
            f,
            marks,
            c0,
            n0,
            m0,
            h,
            c,
            n,
            m,
            stabilizers,
            denominators,
            heads,
            dqk,
            dhv,
            flags,
            eps
        ];
        return queue.launch(&SOURCE, "mlstm_step", [value_tiles, tasks, 1], 256, arguments);
    }
    let scores = queue.scratch(tasks * chunks * L * L)?;
    let w = queue.scratch(tasks * chunks * L)?;
    let e = queue.scratch(tasks * chunks * L)?;
    let states = queue.scratch(tasks * chunks * dqk * dhv)?;
    let normals = queue.scratch(tasks * chunks * dqk)?;
    let arguments = arguments![i, f, marks, n0, m0, stabilizers, m, length, heads, dqk, flags];
    queue.launch(&SOURCE, "mlstm_gates", [tasks, 1, 1], 32, arguments)?;
    let arguments =
        arguments![q, k, i, f, marks, n0, m0, stabilizers, scores, w, e, length, heads, dqk, flags];
    queue.launch(&SOURCE, "mlstm_scores", [chunks, tasks, 1], 256, arguments)?;
    let arguments = arguments![k, v, w, e, c0, n0, states, normals, c, n, length, heads, dqk, dhv];
    queue.launch(&SOURCE, "mlstm_states", [value_tiles, key_tiles, tasks], 256, arguments)?;
    let arguments = arguments![
        q,
        v,
        marks,
        stabilizers,
        scores,
        e,
        states,
        normals,
        h,
        denominators,
        length,
        heads,
        dqk,
        dhv,
        flags,
        eps
    ];
    queue.launch(&SOURCE, "mlstm_outputs", [value_tiles, chunks, tasks], 256, arguments)
}

/// See [`Kernel::backward_cuda`](crate::engine::Kernel::backward_cuda).
pub(super) fn backward(
    config: &MlstmConfig,
    marked: bool,
    sizes: Sizes,
    io: &mut CudaBackward<'_>,
) -> Result<()> {
    let Sizes { batch, length, heads, dqk, dhv } = sizes;
    let [q, k, v, i, f, c0, n0, m0, ..] = io.inputs;
    let [h, c, n, _, stabilizers, denominators, ..] = io.outputs;
    let [dh, dc, dn, dm_last, ..] = io.output_gradients;
    let [dq, dk, dv, di_out, df_out, dc0, dn0, dm0, ..] = io.input_gradients;
    let marks = marked.then_some(io.ids[0]);
    let (flags, eps) = (flags(config), config.eps);
    let (tasks, chunks) = (batch * heads, length.div_ceil(L));
    let (key_tiles, value_tiles) = (dqk.div_ceil(L), dhv.div_ceil(L));
    let queue = &mut *io.queue;
    let tokens = tasks * chunks * L;
    let scores = queue.scratch(tokens * L)?;
    let pairs = queue.scratch(tokens * L)?;
    let [mut w, mut e, mut inverse, mut dd, mut dm, mut di, mut df] = [0; 7];
    for part in [&mut w, &mut e, &mut inverse, &mut dd, &mut dm, &mut di, &mut df] {
        *part = queue.scratch(tokens)?;
    }
    let states = queue.scratch(tasks * chunks * dqk * dhv)?;
    let normals = queue.scratch(tasks * chunks * dqk)?;
    let dstates = queue.scratch(tasks * chunks * dqk * dhv)?;
    let dnormals = queue.scratch(tasks * chunks * dqk)?;
    let arriving = queue.scratch(key_tiles * tokens)?;
    let leaving = queue.scratch(key_tiles * tokens)?;
    let crossing = queue.scratch(key_tiles * tasks * chunks)?;
    let inner_last = queue.scratch(tasks * key_tiles * value_tiles)?;
    let inner_first = queue.scratch(tasks * key_tiles * value_tiles)?;
    // A gradient of zero, where the loss sees the last state alone.
    let dh = match dh {
        Some(dh) => dh,
        None => {
            let zeros = queue.scratch(batch * length * heads * dhv)?;
            queue.zero(zeros, batch * length * heads * dhv)?;
            zeros
        }
    };
    let arguments =
        arguments![h, dh, marks, stabilizers, denominators, inverse, dd, dm, length, heads, dhv, flags, eps];
    queue.launch(&SOURCE, "mlstm_backward_tokens", [(chunks * L).div_ceil(8), tasks, 1], 256, arguments)?;
    let arguments = arguments![
        q,
        k,
        v,
        dh,
        i,
        f,
        marks,
        n0,
        m0,
        stabilizers,
        inverse,
        dd,
        scores,
        pairs,
        w,
        e,
        di,
        df,
        length,
        heads,
        dqk,
        dhv,
        flags
    ];
    queue.launch(&SOURCE, "mlstm_backward_scores", [chunks, tasks, 1], 256, arguments)?;
    let none = None::<u64>;
    let arguments = arguments![k, v, w, e, c0, n0, states, normals, none, none, length, heads, dqk, dhv];
    let tiles = [value_tiles, key_tiles, tasks];
    queue.launch(&SOURCE, "mlstm_states", tiles, 256, arguments)?;
    let arguments = arguments![
        q,
        dh,
        inverse,
        dd,
        e,
        c0,
        n0,
        c,
        n,
        dc,
        dn,
        dstates,
        dnormals,
        inner_last,
        inner_first,
        dc0,
        dn0,
        length,
        heads,
        dqk,
        dhv
    ];
    queue.launch(&SOURCE, "mlstm_backward_states", tiles, 256, arguments)?;
    if let Some(dv) = dv {
        let arguments = arguments![k, dh, inverse, scores, w, dstates, dv, length, heads, dqk, dhv];
        queue.launch(&SOURCE, "mlstm_backward_values", [value_tiles, chunks, tasks], 256, arguments)?;
    }
    let arguments = arguments![
        q, k, v, dh, inverse, dd, pairs, w, e, states, normals, dstates, dnormals, dq, dk, arriving, leaving,
        crossing, length, heads, dqk, dhv
    ];
    queue.launch(&SOURCE, "mlstm_backward_keys", [key_tiles, chunks, tasks], 256, arguments)?;
    let arguments = arguments![arriving, leaving, crossing, di, df, key_tiles];
    queue.launch(&SOURCE, "mlstm_backward_gates", [chunks, tasks, 1], L, arguments)?;
    let arguments = arguments![
        i,
        f,
        marks,
        n0,
        m0,
        stabilizers,
        dm,
        di,
        df,
        dm_last,
        inner_last,
        inner_first,
        di_out,
        df_out,
        dm0,
        length,
        heads,
        dqk,
        flags,
        key_tiles * value_tiles
    ];
    queue.launch(&SOURCE, "mlstm_backward_unwind", [tasks, 1, 1], 32, arguments)
}
