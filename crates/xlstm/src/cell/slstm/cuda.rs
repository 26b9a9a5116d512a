//! The sLSTM and the LSTM on a GPU: the launches of slstm.cu and, in cuda_wide.rs, of slstm_wide.cuh, in
//! their order and with their work space.

use super::cuda_wide::Wide;
use super::{BIAS, CellFunction, LAST, Layout, RECURRENT, STATE, Slstm};
use crate::cell::{ForgetGate, InputGate};
use crate::engine::cuda::blas::{Operand, Product};
use crate::engine::cuda::launch::Queue;
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::Argument, context::arguments};
use crate::error::{Error, Result};

const SOURCE: Source = Source::new("slstm", concat!(include_str!("slstm.cuh"), include_str!("slstm.cu")));

/// Sequences of a block: ROWS of slstm.cu.
const ROWS: usize = 4;
const R_SHARED: u32 = 16;
/// The largest head that slstm.cu takes.
const LARGEST: usize = 1024;
/// The bit of the first gate whose gradient is written whole.
const FRESH_GATES: usize = 5;

/// What all kernels are told of the cell.
pub(super) fn cell_flags(slstm: &Slstm) -> u32 {
    let config = &slstm.config;
    u32::from(config.input_gate == InputGate::Sigmoid)
        | u32::from(config.forget_gate == ForgetGate::Exponential) << 1
        | u32::from(config.function == CellFunction::Lstm) << 2
        | u32::from(config.gradient_cut) << 3
}

/// What backward is told of the gates' gradients.
pub(super) fn fresh_flags(io: &CudaBackward<'_>) -> u32 {
    (0..4).fold(0, |flags, gate| flags | u32::from(io.is_fresh(gate)) << (FRESH_GATES + gate))
}

/// Flags and bytes of shared memory.
fn flags(slstm: &Slstm, dim: usize, queue: &Queue) -> Result<(u32, usize)> {
    let flags = cell_flags(slstm);
    let (own, matrix) = (ROWS * 48 * dim, 16 * dim * dim);
    // A matrix that fits stays on chip for the whole sequence.
    let available = queue.gpu().shared_memory()?;
    if dim > LARGEST || own > available {
        return Err(Error::shape(format!(
            "{} heads of {dim} features are too large for this GPU",
            slstm.config.heads
        ))
        .hint("use more heads, or --device cpu"));
    }
    let fits = own + matrix <= available;
    Ok(if fits { (flags | R_SHARED, own + matrix) } else { (flags, own) })
}

/// Launches a kernel that walks along the sequences: a block for a head of [`ROWS`] of them.
fn walk(
    queue: &Queue,
    name: &'static str,
    layout: &Layout,
    shared: usize,
    arguments: &[Argument],
) -> Result<()> {
    let grid = [layout.batch.div_ceil(ROWS), layout.heads, 1];
    let block = (4 * layout.dim).next_multiple_of(32).min(1024);
    queue.launch_shared(&SOURCE, name, grid, block, shared, arguments)
}

/// See [`Kernel::forward_cuda`](crate::engine::Kernel::forward_cuda).
pub(super) fn forward(slstm: &Slstm, io: &mut CudaForward<'_>) -> Result<()> {
    let layout = Layout::of(io.shapes, slstm.config.heads);
    let Layout { batch, steps, heads, dim, .. } = layout;
    if let Some(wide) = Wide::of(&layout, io.queue)? {
        return wide.forward(slstm, &layout, io);
    }
    let parts = slstm.state_parts();
    let (flags, shared) = flags(slstm, dim, io.queue)?;
    let transposed = io.queue.scratch(heads * 4 * dim * dim)?;
    let grid = [dim.div_ceil(32), (4 * dim).div_ceil(32), heads];
    let arguments = arguments![io.input(RECURRENT), transposed, dim];
    io.queue.launch_square(&SOURCE, "slstm_transpose", grid, [32, 8], arguments)?;
    let [gate_i, gate_f, gate_z, gate_o, ..] = io.inputs;
    let state = |part: usize| (part < parts).then(|| io.inputs[STATE + part]).flatten();
    let last = |part: usize| (part < parts).then(|| io.outputs[LAST + part]);
    // The h before each token is not saved: backward finds it in h.
    let record = slstm.train.then(|| io.outputs[LAST + parts]);
    let arguments = arguments![
        gate_i,
        gate_f,
        gate_z,
        gate_o,
        transposed,
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
        record,
        batch,
        steps,
        heads,
        dim,
        flags
    ];
    walk(io.queue, "slstm_forward", &layout, shared, arguments)
}

/// See [`Kernel::backward_cuda`](crate::engine::Kernel::backward_cuda).
pub(super) fn backward(slstm: &Slstm, io: &mut CudaBackward<'_>) -> Result<()> {
    let layout = Layout::of(io.shapes, slstm.config.heads);
    let Layout { batch, steps, heads, dim, .. } = layout;
    if let Some(wide) = Wide::of(&layout, io.queue)? {
        return wide.backward(slstm, &layout, io);
    }
    let parts = slstm.state_parts();
    let (flags, shared) = flags(slstm, dim, io.queue)?;
    let flags = flags | fresh_flags(io);
    let draw = io.queue.scratch(batch * steps * heads * 4 * dim)?;
    let state = |part: usize| (part < parts).then(|| io.inputs[STATE + part]).flatten();
    let last = |part: usize| (part < parts).then(|| io.outputs[LAST + part]);
    let dlast = |part: usize| (part < parts).then(|| io.output_gradients[LAST + part]).flatten();
    let dstate = |part: usize| (part < parts).then(|| io.input_gradients[STATE + part]).flatten();
    let record = io.outputs[LAST + parts];
    let [dgate_i, dgate_f, dgate_z, dgate_o, ..] = io.input_gradients;
    let arguments = arguments![
        io.input(RECURRENT),
        record,
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
    walk(io.queue, "slstm_backward", &layout, shared, arguments)?;
    if let Some(db) = io.input_gradients[BIAS] {
        let arguments = arguments![draw, db, batch * steps, heads, dim];
        let grid = [(heads * 4 * dim).div_ceil(32), 1, 1];
        io.queue.launch_square(&SOURCE, "slstm_bias", grid, [32, 32], arguments)?;
    }
    let Some(dr) = io.input_gradients[RECURRENT] else { return Ok(()) };
    let n = batch * steps * heads * dim;
    let before = io.queue.scratch(n)?;
    let arguments = arguments![io.outputs[0], state(0), io.ids[0], before, n as u64, steps, heads * dim];
    io.queue.launch_each(&SOURCE, "slstm_before", n, arguments)?;
    io.queue.product(&Product {
        size: [4 * dim, dim, batch * steps],
        a: Operand::new(draw, heads * 4 * dim).batched(4 * dim).t().full(),
        b: Operand::new(before, heads * dim).batched(dim).full(),
        c: Operand::new(dr, dim).batched(4 * dim * dim).full(),
        batch: heads,
        accumulate: true,
    })
}
