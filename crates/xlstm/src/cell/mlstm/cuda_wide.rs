//! The mLSTM on a GPU in bf16, by chunks of 128: the launches of mlstm_wide.cuh, in its order and
//! with its work space.

use super::MlstmConfig;
use super::cuda::{BACKWARD, FORWARD, flags, fresh, output_gradient};
use super::operation::Sizes;
use crate::engine::cuda::{
    CudaBackward, CudaForward, Source,
    context::{Argument, arguments},
    launch::Queue,
};
use crate::error::Result;

/// The parts of a file of kernels, one after another.
macro_rules! source {
    ($name:literal) => {
        Source::new(
            $name,
            concat!(
                include_str!("mlstm.cuh"),
                include_str!("mlstm_tiles.cuh"),
                include_str!("mlstm_wide.cuh"),
                include_str!("mlstm_wide_pass.cuh"),
                include_str!("mlstm_wide_resident.cuh"),
                include_str!("mlstm_wide_results.cuh"),
                include_str!(concat!($name, ".cu"))
            ),
        )
    };
}
const WIDE_FORWARD: Source = source!("mlstm_wide_forward");
const WIDE_BACKWARD: Source = source!("mlstm_wide_backward");
const RESIDENT_FORWARD: Source = source!("mlstm_resident_forward");
const RESIDENT_BACKWARD: Source = source!("mlstm_resident_backward");

/// Tokens of a chunk: CHUNK of mlstm_wide.cuh.
const CHUNK: usize = 128;
/// Rows and columns of a tile, and threads that have a tile of rows.
const L: usize = 64;
const GROUP: usize = 128;
/// Bytes of a tile.
const TILE: usize = L * L * 2;
/// Most pairs of a sequence and a head: a grid has a block for each and direction.
pub(super) const MAX_TASKS: usize = 65_535 / 2;

/// Columns that a block has of a state, for enough blocks to fill a card, where there are as many
/// blocks as `rows` for each slice of columns.
fn state_slice(dhv: usize, rows: usize) -> usize {
    if dhv > L && dhv.div_ceil(2 * L) * rows >= 200 { 2 * L } else { L }
}

/// Shared memory of a walk over states: `Walk` of mlstm_wide.cuh.
fn walk_shared(columns: usize) -> usize {
    4 * ((1 + columns / L) * TILE + 2 * L * 4)
}

/// Whether the card multiplies by warp groups: WARPGROUP of mlstm_wide.cuh.
fn has_warp_groups(queue: &Queue) -> bool {
    queue.gpu().architecture() == "sm_90a"
}

/// What passes are like on a card: with products of warp groups, or of warps and in less shared memory.
struct Passes {
    warp_groups: bool,
}

impl Passes {
    fn of(queue: &Queue) -> Passes {
        Passes { warp_groups: has_warp_groups(queue) }
    }

    /// Columns that a block has of `width`.
    fn slice(&self, width: usize) -> usize {
        if self.warp_groups && width > L { 2 * L } else { L }
    }

    /// Shared memory of a pass of some groups: `Pass::Shared` of mlstm_wide_pass.cuh.
    fn shared(&self, out: usize, groups: usize) -> usize {
        self.staged(groups + 2 + out / L, groups)
    }

    /// Shared memory of dq and dk: of `Both` of mlstm_wide_backward.cu, or of a pass.
    fn key_shared(&self, out: usize) -> usize {
        let tiles = out / L;
        self.staged(if self.warp_groups { 4 + 2 * tiles } else { (4 + tiles).max(4 * tiles) }, 2)
    }

    fn staged(&self, in_stage: usize, groups: usize) -> usize {
        let stages = if self.warp_groups { groups + 1 } else { 2 };
        stages * in_stage * TILE + (4 * CHUNK + 2 * L) * 4
    }

    /// Blocks of dq and dk that a slice of features has: KEY_BLOCKS of mlstm_wide_backward.cu.
    fn key_blocks(&self) -> usize {
        if self.warp_groups { 1 } else { 2 }
    }
}

/// Blocks from which on they keep their slices of C on the chip forward (mlstm_resident_forward.cu), and heads
/// from which on they keep dC there backward (mlstm_resident_backward.cu): one, and three, for two
/// multiprocessors of an H100. A number of its own on every card would be another sum on each.
const RESIDENT_BLOCKS: usize = 64;
const RESIDENT_HEADS: usize = 198;

/// The kernel forward that keeps C on the chip: its tiles of keys, and the blocks that a head takes.
struct ResidentForward {
    keys: usize,
    blocks: usize,
}

impl ResidentForward {
    /// If there is one for these sizes.
    fn of(queue: &Queue, sizes: &Sizes) -> Option<ResidentForward> {
        let keys = [1, 2, 4, 6].into_iter().find(|keys| sizes.dqk <= keys * L)?;
        let resident = ResidentForward { keys, blocks: sizes.dhv.div_ceil(Self::values(keys) * L) };
        let blocks = sizes.batch * sizes.heads * resident.blocks;
        (has_warp_groups(queue) && sizes.dhv > L && blocks >= RESIDENT_BLOCKS).then_some(resident)
    }

    /// Tiles of values of a block.
    fn values(keys: usize) -> usize {
        if keys > 4 { 1 } else { 2 }
    }

    fn name(&self) -> &'static str {
        match self.keys {
            1 => "mlstm_resident_outputs_64",
            2 => "mlstm_resident_outputs_128",
            4 => "mlstm_resident_outputs_256",
            _ => "mlstm_resident_outputs_384",
        }
    }

    /// Shared memory of a block: `ResidentForward` of mlstm_resident_forward.cu.
    fn shared(&self) -> usize {
        let (keys, values) = (self.keys, Self::values(self.keys));
        let stages = if keys > 2 { 2 } else { 3 };
        let tiles = stages * (2 * keys + values) + if values == 1 { 1 } else { 3 };
        let weights = stages * (2 * L + 4) + 6 * L;
        tiles * TILE + weights * 4 + 3 * (keys * L + 8 + L + 8) * 2
    }
}

/// Whether backward keeps dC on the chip.
fn is_resident_backward(queue: &Queue, sizes: &Sizes) -> bool {
    let Sizes { batch, heads, dqk, dhv, .. } = *sizes;
    let fits = has_warp_groups(queue) && dqk <= 2 * L && dhv > L && dhv <= 2 * L;
    fits && batch * heads >= RESIDENT_HEADS
}

/// Shared memory of a block that keeps dC: `ResidentBackward`.
fn resident_backward_shared(dqk: usize) -> usize {
    let keys = dqk.div_ceil(L);
    let weights = (2 * CHUNK + 2 * L) * 4;
    (4 * keys + 8 + 4 * keys) * TILE + weights + (4 * CHUNK + 2 * keys * L + 2 * GROUP / 32) * 4
}

/// Work space for `n` numbers of bf16.
fn halves(queue: &mut Queue, n: usize) -> Result<u64> {
    queue.scratch(n.div_ceil(2))
}

/// States along the sequence: mlstm_wide_states, with its arguments.
fn walk(queue: &mut Queue, sizes: Sizes, arguments: &[Argument]) -> Result<()> {
    let Sizes { batch, heads, dqk, dhv, .. } = sizes;
    let (tasks, key_tiles) = (batch * heads, dqk.div_ceil(L));
    let columns = state_slice(dhv, key_tiles * tasks);
    let name = if columns == L { "mlstm_wide_states_64" } else { "mlstm_wide_states_128" };
    let grid = [dhv.div_ceil(columns), key_tiles, tasks];
    queue.launch_shared(&WIDE_FORWARD, name, grid, GROUP, walk_shared(columns), arguments)
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
    let (tasks, chunks, key_tiles) = (batch * heads, length.div_ceil(CHUNK), dqk.div_ceil(L));
    let queue = &mut *io.queue;
    let [mut prefix, mut entry, mut w] = [0; 3];
    for part in [&mut prefix, &mut entry, &mut w] {
        *part = queue.scratch(tasks * chunks * CHUNK)?;
    }
    let arguments = arguments![i, f, marks, n0, m0, stabilizers, m, length, heads, dqk, flags];
    queue.launch(&FORWARD, "mlstm_gates", [tasks, 1, 1], 1024, arguments)?;
    let arguments = arguments![i, f, marks, n0, m0, stabilizers, prefix, entry, w, length, heads, dqk, flags];
    queue.launch(&WIDE_FORWARD, "mlstm_wide_exponents", [chunks, tasks, 1], CHUNK, arguments)?;
    if let Some(resident) = ResidentForward::of(queue, &sizes) {
        let arguments = arguments![
            q,
            k,
            v,
            marks,
            stabilizers,
            prefix,
            entry,
            c0,
            n0,
            h,
            denominators,
            c,
            n,
            length,
            heads,
            dqk,
            dhv,
            flags,
            eps
        ];
        let grid = [resident.blocks, tasks, 1];
        let (name, shared) = (resident.name(), resident.shared());
        return queue.launch_shared(&RESIDENT_FORWARD, name, grid, 2 * GROUP, shared, arguments);
    }
    let states = halves(queue, tasks * chunks * dqk * dhv)?;
    let normals = queue.scratch(tasks * chunks * dqk)?;
    let arguments = arguments![k, v, w, prefix, c0, n0, states, normals, c, n, length, heads, dqk, dhv];
    walk(queue, sizes, arguments)?;
    let arguments = arguments![
        q,
        k,
        v,
        marks,
        stabilizers,
        prefix,
        entry,
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
    let passes = Passes::of(queue);
    let out = passes.slice(dhv);
    let name = if out == L { "mlstm_wide_outputs_64" } else { "mlstm_wide_outputs_128" };
    // Besides the pass, n in three parts.
    let shared = passes.shared(out, 1) + 3 * (key_tiles * L + 8) * 2;
    queue.launch_shared(&WIDE_FORWARD, name, [dhv.div_ceil(out), 2 * chunks, tasks], GROUP, shared, arguments)
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
    let (flags, eps, fresh) = (flags(config), config.eps, fresh(io));
    let (tasks, chunks, key_tiles) = (batch * heads, length.div_ceil(CHUNK), dqk.div_ceil(L));
    let tokens = tasks * chunks * CHUNK;
    let resident = is_resident_backward(io.queue, &sizes);
    let passes = Passes::of(io.queue);
    let key_out = passes.slice(dqk);
    let value_out = passes.slice(dhv).max(key_out);
    let (value_slices, key_slices) = (dhv.div_ceil(value_out), dqk.div_ceil(key_out));
    let columns = state_slice(dhv, 2 * key_tiles * tasks);
    let state_tiles = if resident { 1 } else { key_tiles * dhv.div_ceil(columns) };
    let queue = &mut *io.queue;
    let states = halves(queue, tasks * chunks * dqk * dhv)?;
    let normals = queue.scratch(tasks * chunks * dqk)?;
    let [mut prefix, mut entry, mut w, mut inverse, mut dd, mut dm] = [0; 6];
    let [mut query, mut slope, mut di, mut df] = [0; 4];
    for part in [
        &mut prefix,
        &mut entry,
        &mut w,
        &mut inverse,
        &mut dd,
        &mut dm,
        &mut query,
        &mut slope,
        &mut di,
        &mut df,
    ] {
        *part = queue.scratch(tokens)?;
    }
    let [mut a, mut leaving, mut b] = [0; 3];
    for part in [&mut a, &mut leaving, &mut b] {
        *part = queue.scratch(key_slices * tokens)?;
    }
    let crossing = queue.scratch(value_slices * tasks * chunks)?;
    let inner_last = queue.scratch(tasks * state_tiles)?;
    let inner_first = queue.scratch(tasks * state_tiles)?;
    let dh = output_gradient(queue, dh, batch * length * heads * dhv)?;
    let arguments = arguments![
        h,
        dh,
        i,
        f,
        marks,
        n0,
        m0,
        stabilizers,
        denominators,
        prefix,
        entry,
        w,
        inverse,
        dd,
        dm,
        query,
        slope,
        length,
        heads,
        dqk,
        dhv,
        flags,
        eps
    ];
    queue.launch(&WIDE_BACKWARD, "mlstm_wide_tokens", [chunks, tasks, 1], 256, arguments)?;
    if resident {
        let none = None::<u64>;
        let arguments =
            arguments![k, v, w, prefix, c0, n0, states, normals, none, none, length, heads, dqk, dhv];
        walk(queue, sizes, arguments)?;
        let arguments = arguments![
            q,
            k,
            v,
            dh,
            prefix,
            entry,
            inverse,
            dd,
            query,
            slope,
            states,
            normals,
            c0,
            n0,
            c,
            n,
            dc,
            dn,
            dq,
            dk,
            dv,
            fresh & 7,
            a,
            leaving,
            b,
            crossing,
            inner_last,
            inner_first,
            dc0,
            dn0,
            length,
            heads,
            dqk,
            dhv
        ];
        let name = if dqk <= L { "mlstm_resident_gradients_64" } else { "mlstm_resident_gradients_128" };
        let shared = resident_backward_shared(dqk);
        queue.launch_shared(&RESIDENT_BACKWARD, name, [tasks, 1, 1], 2 * GROUP, shared, arguments)?;
    } else {
        let dstates = halves(queue, tasks * chunks * dqk * dhv)?;
        let dnormals = queue.scratch(tasks * chunks * dqk)?;
        let arguments = arguments![
            q,
            k,
            v,
            dh,
            w,
            query,
            slope,
            prefix,
            c0,
            n0,
            c,
            n,
            dc,
            dn,
            states,
            normals,
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
        let name =
            if columns == L { "mlstm_wide_backward_states_64" } else { "mlstm_wide_backward_states_128" };
        let grid = [dhv.div_ceil(columns), key_tiles, 2 * tasks];
        queue.launch_shared(&WIDE_BACKWARD, name, grid, GROUP, walk_shared(columns), arguments)?;
        let arguments = arguments![
            q,
            k,
            v,
            dh,
            prefix,
            entry,
            inverse,
            dd,
            states,
            normals,
            dstates,
            dnormals,
            dq,
            dk,
            dv,
            fresh & 7,
            a,
            leaving,
            b,
            crossing,
            length,
            heads,
            dqk,
            dhv
        ];
        let name = match (value_out > L, key_out > L) {
            (false, false) => "mlstm_wide_gradients_64_64",
            (true, false) => "mlstm_wide_gradients_128_64",
            (_, true) => "mlstm_wide_gradients_128_128",
        };
        let grid = [value_slices + passes.key_blocks() * key_slices, chunks, tasks];
        let shared = passes.shared(value_out, 2).max(passes.key_shared(key_out));
        queue.launch_shared(&WIDE_BACKWARD, name, grid, 2 * GROUP, shared, arguments)?;
    }
    let arguments = arguments![a, leaving, b, crossing, di, df, key_slices, value_slices];
    queue.launch(&WIDE_BACKWARD, "mlstm_wide_gates", [chunks, tasks, 1], CHUNK, arguments)?;
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
        chunks * CHUNK,
        heads,
        dqk,
        flags,
        state_tiles
    ];
    queue.launch(&BACKWARD, "mlstm_backward_unwind", [tasks, 1, 1], 1024, arguments)
}
