//! The causal convolution on a GPU: launches.

use super::{CausalConv, sizes};
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::error::Result;

/// Tokens that a block works on: TOKENS of causal_conv.cu.
const TOKENS: usize = 32;

/// The same where a thread has four features: FOURS_TOKENS of causal_conv.cu.
const FOURS_TOKENS: usize = 64;

/// Whether the kernels for TAPS of causal_conv.cu and four features a thread fit.
fn in_fours(width: usize, taps: usize) -> bool {
    taps == 4 && width.is_multiple_of(4)
}

const SOURCE: Source = Source::new("causal_conv", include_str!("causal_conv.cu"));

/// See [`Kernel::forward_cuda`](crate::engine::Kernel::forward_cuda).
pub(super) fn forward(kernel: &CausalConv, io: &mut CudaForward<'_>) -> Result<()> {
    let (length, width, taps) = sizes(io.shapes);
    let batch = io.shapes.input(0).dims()[0];
    let [x, w, bias, window, ..] = io.inputs;
    let marks = kernel.marked.then_some(io.ids[0]);
    let (blocks, silu) = (width.div_ceil(256), u32::from(kernel.silu));
    if in_fours(width, taps) {
        let arguments = arguments![x, w, bias, window, marks, io.outputs[0], length, width, silu];
        let grid = [width.div_ceil(512), length.div_ceil(FOURS_TOKENS), batch];
        io.queue.launch(&SOURCE, "causal_conv_4", grid, 128, arguments)?;
    } else {
        let arguments = arguments![x, w, bias, window, marks, io.outputs[0], length, width, taps, silu];
        let grid = [blocks, length.div_ceil(TOKENS), batch];
        io.queue.launch(&SOURCE, "causal_conv", grid, 256, arguments)?;
    }
    if taps == 1 {
        return Ok(());
    }
    let arguments = arguments![x, window, marks, io.outputs[1], length, width, taps];
    io.queue.launch(&SOURCE, "causal_conv_window", [blocks, batch, 1], 256, arguments)
}

/// See [`Kernel::backward_cuda`](crate::engine::Kernel::backward_cuda).
pub(super) fn backward(kernel: &CausalConv, io: &mut CudaBackward<'_>) -> Result<()> {
    let (length, width, taps) = sizes(io.shapes);
    let batch = io.shapes.input(0).dims()[0];
    let [x, w, bias, window, ..] = io.inputs;
    let ([dy, dafter, ..], [dx, dw, db, dwindow, ..]) = (io.output_gradients, io.input_gradients);
    let (dafter, dwindow) = (dafter.filter(|_| taps > 1), dwindow.filter(|_| taps > 1));
    let marks = kernel.marked.then_some(io.ids[0]);
    let silu = u32::from(kernel.silu);
    let fresh = [0, 1, 2, 3].map(|slot| u32::from(io.is_fresh(slot)));
    let blocks = width.div_ceil(256);
    let fours = in_fours(width, taps) && dy.is_some();
    let tiles = length.div_ceil(if fours { FOURS_TOKENS } else { TOKENS });
    let partials = io.queue.scratch(batch * tiles * (taps + 1) * width)?;
    let du = if fours && dwindow.is_none() { 0 } else { io.queue.scratch(batch * length * width)? };
    if fours {
        let grid = [width.div_ceil(512), tiles, batch];
        let arguments = arguments![
            x, w, bias, window, marks, dy, dafter, du, partials, dx, length, width, silu, fresh[0]
        ];
        io.queue.launch(&SOURCE, "causal_conv_backward_4", grid, 128, arguments)?;
    } else {
        let grid = [blocks, tiles, batch];
        let arguments = arguments![x, w, bias, window, marks, dy, du, partials, length, width, taps, silu];
        io.queue.launch(&SOURCE, "causal_conv_backward_taps", grid, 256, arguments)?;
        if let Some(dx) = dx {
            let arguments = arguments![w, marks, du, dafter, dx, length, width, taps, fresh[0]];
            io.queue.launch(&SOURCE, "causal_conv_backward_inputs", grid, 256, arguments)?;
        }
    }
    if let Some(dwindow) = dwindow {
        let arguments = arguments![w, marks, du, dafter, dwindow, length, width, taps, fresh[3]];
        io.queue.launch(&SOURCE, "causal_conv_backward_window", [blocks, batch, 1], 256, arguments)?;
    }
    if dw.is_none() && db.is_none() {
        return Ok(());
    }
    let bits = fresh[1] << 1 | fresh[2] << 2;
    let arguments = arguments![partials, dw, db, width, taps, batch * tiles, bits];
    let grid = [width.div_ceil(32), taps + 1, 1];
    io.queue.launch_square(&SOURCE, "causal_conv_backward_weights", grid, [32, 32], arguments)
}
