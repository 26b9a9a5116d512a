//! The mLSTM on a GPU: the launches of mlstm.cuh, in its order and with its work space.
//!
//! In bf16, head sizes that are multiples of 8 go by chunks of 128 ([`cuda_wide`](super::cuda_wide)).

use super::MlstmConfig;
use super::cuda_wide;
use super::operation::Sizes;
use crate::cell::{ForgetGate, InputGate};
use crate::engine::Precision;
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments, launch::Queue};
use crate::error::Result;

/// The parts of a file of kernels, one after another.
macro_rules! source {
    ($name:literal) => {
        Source::new(
            $name,
            concat!(
                include_str!("mlstm.cuh"),
                include_str!("mlstm_tiles.cuh"),
                include_str!(concat!($name, ".cu"))
            ),
        )
    };
}
pub(super) const FORWARD: Source = source!("mlstm_forward");
pub(super) const BACKWARD: Source = source!("mlstm_backward");

/// Tokens of a chunk, and rows and columns of a tile: L of mlstm.cuh.
const L: usize = 64;
/// Threads for a tile, or for each of the two of a block: GROUP of mlstm_tiles.cuh.
const GROUP: usize = 128;

// Bytes of shared memory, as at the end of mlstm_tiles.cuh.
const SCORES_SHARED: usize = 66 << 10;
const STATES_SHARED: usize = 64 << 10;
const OUTPUTS_SHARED: usize = 50 << 10;
const BACKWARD_SCORES_SHARED: usize = 88 << 10;
const BACKWARD_KEYS_SHARED: usize = (98 << 10) + 512;

/// Work space for rows of operands of products, padded as in mlstm.cuh.
fn operands(queue: &mut Queue, rows: usize, width: usize) -> Result<u64> {
    queue.scratch((rows * width.next_multiple_of(8) * queue.precision().bytes()).div_ceil(4))
}

pub(super) fn flags(config: &MlstmConfig) -> u32 {
    u32::from(config.input_gate == InputGate::Sigmoid)
        | u32::from(config.forget_gate == ForgetGate::Exponential) << 1
        | u32::from(config.normalize) << 2
}

/// Whether the kernels for chunks of 128 take these sizes.
fn is_wide(queue: &Queue, sizes: &Sizes) -> bool {
    queue.precision() == Precision::Bf16
        && sizes.dqk.is_multiple_of(8)
        && sizes.dhv.is_multiple_of(8)
        && sizes.batch * sizes.heads <= cuda_wide::MAX_TASKS
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
        // Blocks for every multiprocessor, else rows of 256 bytes.
        let columns = if tasks * value_tiles < 1024 { 16 } else { 64 };
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
            eps,
            columns
        ];
        let grid = [dhv.div_ceil(columns), tasks, 1];
        return queue.launch_early(&FORWARD, "mlstm_step", grid, 256, arguments);
    }
    if is_wide(queue, &sizes) {
        return cuda_wide::forward(config, marked, sizes, io);
    }
    let tokens = tasks * chunks * L;
    let scores = operands(queue, tokens, L)?;
    let keys = operands(queue, tokens, dqk)?;
    let states = operands(queue, tasks * chunks * dqk, dhv)?;
    let sums = queue.scratch(tokens)?;
    let e = queue.scratch(tokens)?;
    let normals = queue.scratch(tasks * chunks * dqk)?;
    let arguments = arguments![i, f, marks, n0, m0, stabilizers, m, length, heads, dqk, flags];
    queue.launch(&FORWARD, "mlstm_gates", [tasks, 1, 1], 1024, arguments)?;
    let arguments = arguments![
        q,
        k,
        i,
        f,
        marks,
        n0,
        m0,
        stabilizers,
        scores,
        keys,
        sums,
        e,
        normals,
        length,
        heads,
        dqk,
        flags
    ];
    let grid = [chunks, tasks, 1];
    queue.launch_shared(&FORWARD, "mlstm_scores", grid, GROUP, SCORES_SHARED, arguments)?;
    let arguments = arguments![keys, v, e, c0, n0, states, normals, c, n, length, heads, dqk, dhv];
    let grid = [value_tiles, key_tiles, tasks];
    queue.launch_shared(&FORWARD, "mlstm_states", grid, GROUP, STATES_SHARED, arguments)?;
    let arguments = arguments![
        q,
        v,
        marks,
        stabilizers,
        scores,
        sums,
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
    let grid = [value_tiles, chunks, tasks];
    queue.launch_shared(&FORWARD, "mlstm_outputs", grid, GROUP, OUTPUTS_SHARED, arguments)
}

/// Which gradients are to be written whole, a bit each: q, k, v, i, f.
pub(super) fn fresh(io: &CudaBackward<'_>) -> u32 {
    (0..5).map(|slot| u32::from(io.is_fresh(slot)) << slot).sum()
}

/// The gradient of h, of `n` numbers: zeros where the loss sees the last state alone.
pub(super) fn output_gradient(queue: &mut Queue, dh: Option<u64>, n: usize) -> Result<u64> {
    if let Some(dh) = dh {
        return Ok(dh);
    }
    let zeros = queue.scratch(n)?;
    queue.zero(zeros, n)?;
    Ok(zeros)
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
    if is_wide(io.queue, &sizes) {
        return cuda_wide::backward(config, marked, sizes, io);
    }
    let (flags, eps, fresh) = (flags(config), config.eps, fresh(io));
    let (tasks, chunks) = (batch * heads, length.div_ceil(L));
    let (key_tiles, value_tiles) = (dqk.div_ceil(L), dhv.div_ceil(L));
    let queue = &mut *io.queue;
    // These are added to by tiles.
    for (slot, (gradient, width)) in [(dq, dqk), (dk, dqk), (dv, dhv)].into_iter().enumerate() {
        if let Some(gradient) = gradient.filter(|_| fresh >> slot & 1 == 1) {
            let bytes = batch * length * heads * width * queue.precision().bytes();
            queue.zero(gradient, bytes.div_ceil(4))?;
        }
    }
    let tokens = tasks * chunks * L;
    let scores = operands(queue, tokens, L)?;
    let pairs = operands(queue, tokens, L)?;
    let queries = operands(queue, tokens, dqk)?;
    let keys = operands(queue, tokens, dqk)?;
    let states = operands(queue, tasks * chunks * dqk, dhv)?;
    let dstates = operands(queue, tasks * chunks * dqk, dhv)?;
    let normals = queue.scratch(tasks * chunks * dqk)?;
    let dnormals = queue.scratch(tasks * chunks * dqk)?;
    let [mut w, mut e, mut inverse, mut dd, mut dm, mut di, mut df] = [0; 7];
    for part in [&mut w, &mut e, &mut inverse, &mut dd, &mut dm, &mut di, &mut df] {
        *part = queue.scratch(tokens)?;
    }
    let arriving = queue.scratch(key_tiles * tokens)?;
    let leaving = queue.scratch(key_tiles * tokens)?;
    let crossing = queue.scratch(key_tiles * tasks * chunks)?;
    let inner_last = queue.scratch(tasks * key_tiles * value_tiles)?;
    let inner_first = queue.scratch(tasks * key_tiles * value_tiles)?;
    let dh = output_gradient(queue, dh, batch * length * heads * dhv)?;
    let arguments =
        arguments![h, dh, marks, stabilizers, denominators, inverse, dd, dm, length, heads, dhv, flags, eps];
    queue.launch(&BACKWARD, "mlstm_backward_tokens", [(chunks * L).div_ceil(8), tasks, 1], 256, arguments)?;
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
        queries,
        keys,
        w,
        e,
        normals,
        dnormals,
        di,
        df,
        length,
        heads,
        dqk,
        dhv,
        flags
    ];
    let grid = [chunks, tasks, 1];
    queue.launch_shared(
        &BACKWARD,
        "mlstm_backward_scores",
        grid,
        2 * GROUP,
        BACKWARD_SCORES_SHARED,
        arguments,
    )?;
    let none = None::<u64>;
    let arguments = arguments![keys, v, e, c0, n0, states, normals, none, none, length, heads, dqk, dhv];
    let grid = [value_tiles, key_tiles, tasks];
    queue.launch_shared(&FORWARD, "mlstm_states", grid, GROUP, STATES_SHARED, arguments)?;
    let arguments = arguments![
        queries,
        dh,
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
    queue.launch_shared(&BACKWARD, "mlstm_backward_states", grid, GROUP, STATES_SHARED, arguments)?;
    if let Some(dv) = dv {
        let arguments = arguments![keys, dh, scores, dstates, dv, length, heads, dqk, dhv];
        let grid = [value_tiles, chunks, tasks];
        queue.launch_shared(&BACKWARD, "mlstm_backward_values", grid, GROUP, OUTPUTS_SHARED, arguments)?;
    }
    let arguments = arguments![
        q, k, v, dh, inverse, dd, pairs, w, e, states, normals, dstates, dnormals, dq, dk, arriving, leaving,
        crossing, length, heads, dqk, dhv
    ];
    let grid = [key_tiles, chunks, tasks];
    queue.launch_shared(
        &BACKWARD,
        "mlstm_backward_keys",
        grid,
        2 * GROUP,
        BACKWARD_KEYS_SHARED,
        arguments,
    )?;
    let arguments = arguments![arriving, leaving, crossing, di, df, key_tiles];
    queue.launch(&BACKWARD, "mlstm_backward_gates", [chunks, tasks, 1], L, arguments)?;
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
        fresh >> 3,
        length,
        chunks * L,
        heads,
        dqk,
        flags,
        key_tiles * value_tiles
    ];
    queue.launch(&BACKWARD, "mlstm_backward_unwind", [tasks, 1, 1], 1024, arguments)
}
