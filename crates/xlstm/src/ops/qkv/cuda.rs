//! Queries, keys, values and gates on a GPU: launches.
//!
//! In bf16 with blocks of 4 x 4 and few heads, a kernel each way. Bytes bound it: of D features of a row forward
//! reads c and a and writes q, k and v, backward reads c, a, dq, dk and dv and writes dc and da (and reads them where
//! something else has been given to them). That is 10 and 14 bytes, where the maps and the gates one after the other
//! move 16 and 32. Backward gives dW_g in the same pass: three products would read q, k and v again, 6 bytes, to save
//! the arithmetic of 12 multiplications a feature, which the pass has time for.

use super::{GATES, OF_A, OF_C, SLOTS, WEIGHTS, of_gates, of_map, shapes_of};
use crate::engine::Precision;
use crate::engine::cuda::{
    CudaBackward, CudaForward, Source, context::arguments, few_rows::Next, launch::ROWS,
};
use crate::engine::operation::{Kernel, MAX_SLOTS, NodeShapes};
use crate::error::Result;
use crate::ops::gates::MAX_PARTS;

/// A file of kernels behind what both have in common.
macro_rules! source {
    ($name:literal) => {
        Source::new($name, concat!(include_str!("qkv.cuh"), include_str!(concat!($name, ".cu"))))
    };
}
const FORWARD: Source = source!("qkv_forward");
const BACKWARD: Source = source!("qkv_backward");

/// Side of the blocks that the kernels take.
const BLOCK: usize = 4;
/// Rows of a block of the forward kernel: BLOCK_ROWS of qkv_forward.cu.
const FORWARD_ROWS: usize = 32;
/// Threads of one: WARPS of qkv_forward.cu, 32 each.
const FORWARD_THREADS: usize = 6 * 32;
/// Columns of a block of the backward kernel: of its four warps, 32 each.
const BACKWARD_COLUMNS: usize = 128;
/// Tiles of rows that partial sums are made of, at the most, and rows of the smallest.
const TILES: usize = 64;

/// Rows, features and heads of one gate.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    width: usize,
    heads: usize,
}

impl Sizes {
    /// None where the kernels do not take them: they are for bf16, blocks of 4 x 4, up to `outputs` of both gates,
    /// and pieces of `piece` features, in which everything is read.
    fn of(
        shapes: &NodeShapes,
        precision: Precision,
        outputs: usize,
        piece: usize,
        pointers: &[Option<u64>],
    ) -> Option<Sizes> {
        let sizes = Sizes {
            rows: shapes.outputs[0].rows(),
            width: shapes.outputs[0].last(),
            heads: shapes.outputs[3].last(),
        };
        let blocks = WEIGHTS[..3].iter().all(|&slot| shapes.input(slot).dims()[1..] == [BLOCK, BLOCK]);
        let bytes = (piece * precision.bytes()) as u64;
        let takes = precision == Precision::Bf16
            && blocks
            && 2 * sizes.heads <= outputs
            && sizes.width.is_multiple_of(piece)
            && pointers.iter().flatten().all(|pointer| pointer.is_multiple_of(bytes));
        takes.then_some(sizes)
    }
}

/// See [`Kernel::forward_cuda`].
pub(super) fn forward(io: &mut CudaForward<'_>) -> Result<()> {
    let Some(sizes) = Sizes::of(io.shapes, io.queue.precision(), 32, 8, &io.inputs) else {
        return forward_apart(io);
    };
    let Sizes { rows, width, heads } = sizes;
    let [c, a, wq, bq, wk, bk, wv, bv, wi, bi, wf, bf] = io.inputs;
    let [q, k, v, i, f, ..] = io.outputs;
    let name = match heads {
        0..=4 => "qkv_forward_8",
        5..=8 => "qkv_forward_16",
        _ => "qkv_forward_32",
    };
    let arguments =
        arguments![c, a, wq, bq, wk, bk, wv, bv, wi, bi, wf, bf, q, k, v, i, f, rows, width, heads];
    io.queue.launch(&FORWARD, name, [rows.div_ceil(FORWARD_ROWS), 1, 1], FORWARD_THREADS, arguments)
}

/// See [`Kernel::backward_cuda`].
pub(super) fn backward(io: &mut CudaBackward<'_>) -> Result<()> {
    let Some(sizes) = Sizes::of(io.shapes, io.queue.precision(), 24, BLOCK, &io.inputs) else {
        return backward_apart(io);
    };
    let Sizes { rows, width, heads } = sizes;
    let [c, a, wq, bq, wk, bk, wv, bv, wi, _, wf, _] = io.inputs;
    let [dq, dk, dv, di, df, ..] = io.output_gradients;
    let [dc, da, dwq, dbq, dwk, dbk, dwv, dbv, dwi, dbi, dwf, dbf] = io.input_gradients;
    let tile_rows = rows.div_ceil(TILES).next_multiple_of(16).max(TILES);
    let (tiles, slope_tiles) = (rows.div_ceil(tile_rows), rows.div_ceil(ROWS));
    let (outputs, biased) = (2 * heads, [bq, bk, bv] != [None; 3]);
    let pieces = outputs.div_ceil(8);

    // The gradients of the gates, as operands; their sums, for the biases.
    let fragments = io.queue.scratch(rows.div_ceil(16) * pieces * 32 * 4)?;
    let [slopes, sums] = [slope_tiles * outputs, outputs].map(|n| io.queue.scratch(n));
    let (slopes, sums) = (slopes?, sums?);
    let arguments = arguments![di, df, fragments, slopes, rows, heads, pieces];
    io.queue.launch(&BACKWARD, "qkv_slopes", [slope_tiles, 1, 1], 128, arguments)?;
    io.queue.give_parts(slopes, slope_tiles, outputs, (sums, true))?;

    // What is added up of a tile of rows: for W of q, k and v, of both gates, and the biases of q, k and v.
    let count = width * (3 * BLOCK + 3 * outputs + if biased { 3 } else { 0 });
    let parts = io.queue.scratch(tiles * count)?;
    let name = match (pieces, biased) {
        (0..=1, false) => "qkv_backward_8",
        (0..=1, true) => "qkv_backward_8_biased",
        (2, false) => "qkv_backward_16",
        (2, true) => "qkv_backward_16_biased",
        (_, false) => "qkv_backward_24",
        (_, true) => "qkv_backward_24_biased",
    };
    let fresh = |slots: std::ops::Range<usize>| {
        (0..).zip(slots).map(|(bit, slot)| u32::from(io.is_fresh(slot)) << bit).sum::<u32>()
    };
    let of_inputs = fresh(0..2);
    let arguments = arguments![
        c, a, wq, bq, wk, bk, wv, bv, wi, wf, dq, dk, dv, fragments, dc, da, parts, rows, width, heads,
        tile_rows, count, of_inputs
    ];
    io.queue.launch(&BACKWARD, name, [tiles, width.div_ceil(BACKWARD_COLUMNS), 2], 128, arguments)?;
    let of_parameters = fresh(2..MAX_SLOTS);
    let arguments = arguments![
        parts,
        sums,
        dwq,
        dbq,
        dwk,
        dbk,
        dwv,
        dbv,
        dwi,
        dbi,
        dwf,
        dbf,
        width,
        heads,
        tiles,
        count,
        of_parameters
    ];
    io.queue.launch(&BACKWARD, "qkv_sums", [(count / 4 + outputs).div_ceil(128), 1, 1], 128, arguments)
}

/// The maps and the gates, one after the other.
fn forward_apart(io: &mut CudaForward<'_>) -> Result<()> {
    let [of_c, of_a, gates] = shapes_of(io.shapes);
    let (ids, next, [q, k, v, i, f, ..]) = (io.ids, Next::Other, io.outputs);
    let (inputs, outputs) = (of_map(0, &io.inputs), padded([q, k]));
    OF_C.forward_cuda(&mut CudaForward { inputs, outputs, ids, shapes: &of_c, next, queue: &mut *io.queue })?;
    let (inputs, outputs) = (of_map(1, &io.inputs), padded([v]));
    OF_A.forward_cuda(&mut CudaForward { inputs, outputs, ids, shapes: &of_a, next, queue: &mut *io.queue })?;
    let (inputs, outputs) = (of_gates([q, k, v], &io.inputs), padded([i, f]));
    GATES.forward_cuda(&mut CudaForward { inputs, outputs, ids, shapes: &gates, next, queue: &mut *io.queue })
}

/// The gates and the maps, one after the other: the gradients of q, k and v with the gates' share are in work
/// space between them.
fn backward_apart(io: &mut CudaBackward<'_>) -> Result<()> {
    let [of_c, of_a, gates] = shapes_of(io.shapes);
    let (ids, outputs, [q, k, v, ..]) = (io.ids, [0; MAX_SLOTS], io.outputs);
    let [dq, dk, dv, di, df, ..] = io.output_gradients;
    let words = (io.shapes.outputs[0].len() * io.queue.precision().bytes()).div_ceil(4);
    let mut totals = [0; MAX_PARTS];
    for total in &mut totals {
        *total = io.queue.scratch(words)?;
    }
    // Those of our inputs that are fresh, at a part's places.
    let fresh = SLOTS
        .map(|slots| (0..).zip(slots).map(|(at, &slot)| u32::from(io.is_fresh(slot)) << at).sum::<u32>());
    let mut part = CudaBackward {
        inputs: of_gates([q, k, v], &io.inputs),
        outputs,
        output_gradients: padded([di, df]),
        input_gradients: of_gates(totals, &io.input_gradients),
        fresh: fresh[2] << MAX_PARTS | ((1 << MAX_PARTS) - 1),
        ids,
        shapes: &gates,
        queue: &mut *io.queue,
    };
    GATES.backward_with(&mut part, [dq, dk, dv])?;
    let [q, k, v] = totals.map(Some);
    for (map, shapes, totals) in [(0, &of_c, padded([q, k])), (1, &of_a, padded([v]))] {
        let mut part = CudaBackward {
            inputs: of_map(map, &io.inputs),
            outputs,
            output_gradients: totals,
            input_gradients: of_map(map, &io.input_gradients),
            fresh: fresh[map],
            ids,
            shapes,
            queue: &mut *io.queue,
        };
        if map == 0 { OF_C.backward_cuda(&mut part)? } else { OF_A.backward_cuda(&mut part)? }
    }
    Ok(())
}

/// Some slots and nothing else.
fn padded<X: Copy + Default, const N: usize>(some: [X; N]) -> [X; MAX_SLOTS] {
    std::array::from_fn(|i| some.get(i).copied().unwrap_or_default())
}
