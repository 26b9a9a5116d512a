//! The sLSTM and the LSTM in bf16 on tensor cores: the launches of slstm_wide.cuh.

use super::cuda::{cell_flags, fresh_flags};
use super::{BIAS, LAST, Layout, RECURRENT, STATE, Slstm};
use crate::engine::Precision;
use crate::engine::cuda::blas::{Operand, Product};
use crate::engine::cuda::launch::{Queue, WIDE};
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::error::Result;

/// The parts of a file of kernels, one after another.
macro_rules! source {
    ($name:literal) => {
        Source::new(
            $name,
            concat!(
                include_str!("slstm.cuh"),
                include_str!("slstm_wide.cuh"),
                include_str!(concat!($name, ".cu"))
            ),
        )
    };
}
const FORWARD: Source = source!("slstm_wide_forward");
const BACKWARD: Source = source!("slstm_wide_backward");

/// Sequences of a block, and features of a warp.
const OCTET: usize = 8;
/// Bytes that a thread holds a piece of R in.
const PIECE: usize = 16;

/// A kernel forward and its twin backward, as they are made at the end of their files.
#[derive(Debug)]
pub(super) struct Wide {
    names: [&'static str; 2],
    /// KT, C and W of slstm_wide.cuh.
    tiles: usize,
    blocks: usize,
    warps: usize,
    /// KiB of shared memory of a block, forward and backward.
    shared: [usize; 2],
}

macro_rules! wide {
    ($name:literal, $tiles:literal, $blocks:literal, $warps:literal, $shared:expr) => {
        Wide {
            names: [concat!("slstm_wide_forward_", $name), concat!("slstm_wide_backward_", $name)],
            tiles: $tiles,
            blocks: $blocks,
            warps: $warps,
            shared: $shared,
        }
    };
}

/// By head size, and of one size first what fills more multiprocessors.
const ALL: [Wide; 5] = [
    wide!("64", 4, 1, 8, [48, 48]),
    wide!("128_cluster", 8, 4, 4, [48, 48]),
    wide!("128", 8, 1, 16, [80, 144]),
    wide!("192_cluster", 12, 2, 12, [48, 96]),
    wide!("256_cluster", 16, 4, 8, [48, 48]),
];

impl Wide {
    /// The kernels for these sizes, where there are any.
    pub(super) fn of(layout: &Layout, queue: &Queue) -> Result<Option<&'static Wide>> {
        let &Layout { batch, steps, heads, dim, .. } = layout;
        let vectors = batch * steps * heads * dim / WIDE;
        if queue.precision() != Precision::Bf16 || dim % OCTET != 0 || vectors > i32::MAX as usize {
            return Ok(None);
        }
        let gpu = queue.gpu();
        let (has_clusters, available) = (gpu.has_clusters()?, gpu.shared_memory()?);
        let multiprocessors = gpu.multiprocessors()?;
        Ok(ALL.iter().find(|wide| {
            // Two small blocks of a cluster share a multiprocessor; with more, one large one is faster.
            let is_crowded = layout.units() * wide.blocks > 2 * multiprocessors;
            let has_other = dim <= 128 && wide.blocks > 1;
            dim <= wide.tiles * 16
                && (wide.blocks == 1 || has_clusters && !(is_crowded && has_other))
                && wide.shared.iter().all(|kibibytes| kibibytes << 10 <= available)
        }))
    }

    /// Work space with R as the kernels hold it, and the number of its pieces.
    fn fragments(&self, layout: &Layout, queue: &mut Queue) -> Result<(u64, usize)> {
        let pieces = layout.heads * self.blocks * self.warps * 2 * self.tiles * 32;
        Ok((queue.scratch(pieces * PIECE / 4)?, pieces))
    }

    fn grid(&self, layout: &Layout) -> [usize; 3] {
        [self.blocks * layout.batch.div_ceil(OCTET), layout.heads, 1]
    }

    /// See [`Kernel::forward_cuda`](crate::engine::Kernel::forward_cuda).
    pub(super) fn forward(&self, slstm: &Slstm, layout: &Layout, io: &mut CudaForward<'_>) -> Result<()> {
        let &Layout { batch, steps, heads, dim, .. } = layout;
        let parts = slstm.state_parts();
        let (fragments, pieces) = self.fragments(layout, io.queue)?;
        let octets = self.blocks * self.warps;
        let arguments = arguments![io.input(RECURRENT), fragments, pieces, octets, self.tiles, dim];
        io.queue.launch_each(&FORWARD, "slstm_wide_rows", pieces, arguments)?;
        let [gate_i, gate_f, gate_z, gate_o, ..] = io.inputs;
        let state = |part: usize| (part < parts).then(|| io.inputs[STATE + part]).flatten();
        let last = |part: usize| (part < parts).then(|| io.outputs[LAST + part]);
        let arguments = arguments![
            gate_i,
            gate_f,
            gate_z,
            gate_o,
            fragments,
            io.input(BIAS),
            state(0),
            state(1),
            state(2),
            state(3),
            io.ids[0],
            io.outputs[0],
            last(0),
            last(1),
            last(2),
            last(3),
            slstm.train.then(|| io.outputs[LAST + parts]),
            batch,
            steps,
            heads,
            dim,
            cell_flags(slstm)
        ];
        let [shared, _] = self.shared;
        let (grid, block) = (self.grid(layout), 32 * self.warps);
        io.queue.launch_shared(&FORWARD, self.names[0], grid, block, shared << 10, arguments)
    }

    /// See [`Kernel::backward_cuda`](crate::engine::Kernel::backward_cuda).
    pub(super) fn backward(&self, slstm: &Slstm, layout: &Layout, io: &mut CudaBackward<'_>) -> Result<()> {
        let &Layout { batch, steps, heads, dim, .. } = layout;
        let parts = slstm.state_parts();
        let (n, width) = (batch * steps * heads * dim, heads * dim);
        let (fragments, pieces) = self.fragments(layout, io.queue)?;
        // Of bf16.
        let draw = io.queue.scratch(2 * n)?;
        let before = io.queue.scratch(n.div_ceil(2))?;
        let tiles = batch.div_ceil(OCTET);
        let sums = io.queue.scratch(tiles * 4 * width)?;
        let flags = cell_flags(slstm) | fresh_flags(io);
        let cuts = (self.warps / self.tiles).max(1);
        let arguments = arguments![
            io.input(RECURRENT),
            fragments,
            pieces,
            self.blocks,
            self.warps,
            cuts,
            (self.tiles / self.warps).max(1),
            2 * self.warps / cuts,
            dim
        ];
        io.queue.launch_each(&BACKWARD, "slstm_wide_columns", pieces, arguments)?;
        let state = |part: usize| (part < parts).then(|| io.inputs[STATE + part]).flatten();
        let last = |part: usize| (part < parts).then(|| io.outputs[LAST + part]);
        let dlast = |part: usize| (part < parts).then(|| io.output_gradients[LAST + part]).flatten();
        let dstate = |part: usize| (part < parts).then(|| io.input_gradients[STATE + part]).flatten();
        let [dgate_i, dgate_f, dgate_z, dgate_o, ..] = io.input_gradients;
        let arguments = arguments![
            fragments,
            io.outputs[LAST + parts],
            io.ids[0],
            state(1),
            state(2),
            last(1),
            last(2),
            io.output_gradients[0],
            dlast(0),
            dlast(1),
            dlast(2),
            dlast(3),
            draw,
            sums,
            dgate_i,
            dgate_f,
            dgate_z,
            dgate_o,
            dstate(0),
            dstate(1),
            dstate(2),
            dstate(3),
            slstm.config.gradient_clip.unwrap_or(-1.0),
            batch,
            steps,
            heads,
            dim,
            flags
        ];
        let [_, shared] = self.shared;
        let (grid, block) = (self.grid(layout), 32 * self.warps);
        io.queue.launch_shared(&BACKWARD, self.names[1], grid, block, shared << 10, arguments)?;
        if let Some(db) = io.input_gradients[BIAS] {
            io.queue.give_parts(sums, tiles, 4 * width, (db, false))?;
        }
        let Some(dr) = io.input_gradients[RECURRENT] else { return Ok(()) };
        let arguments = arguments![io.outputs[0], state(0), io.ids[0], before, n / WIDE, steps, width];
        io.queue.launch_wide(&BACKWARD, "slstm_wide_before", n, arguments)?;
        io.queue.product(&Product {
            size: [4 * dim, dim, batch * steps],
            a: Operand::new(draw, 4 * width).batched(4 * dim).t(),
            b: Operand::new(before, width).batched(dim),
            c: Operand::new(dr, dim).batched(4 * dim * dim).full(),
            batch: heads,
            accumulate: true,
        })
    }
}
