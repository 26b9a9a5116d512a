//! Headwise maps on a GPU: launches. Neighbours with blocks of 4 x 4 are taken two at a time.

use super::{Headwise, LARGE, SMALL, bias_of, sizes, weight_of};
use crate::engine::cuda::{
    CudaBackward, CudaForward, Source, blas::Operand, blas::Product, context::arguments, launch::ROWS,
};
use crate::engine::operation::NodeShapes;
use crate::error::Result;

const SOURCE: Source = Source::new("headwise", include_str!("../headwise.cu"));

/// Rows that a thread goes over with a block of 4 x 4: ROWS of headwise.cu.
const SMALL_ROWS: usize = 64;

impl Headwise {
    /// The maps that are given, each with the next one if both have blocks of 4 x 4.
    fn groups(&self, shapes: &NodeShapes, given: impl Fn(usize) -> bool) -> Vec<(usize, Option<usize>)> {
        let is_small = |map: usize| {
            let (_, outer, inner) = sizes(shapes.input(weight_of(map)));
            (outer, inner) == (SMALL, SMALL)
        };
        let mut maps = (0..self.maps).filter(|&map| given(map)).peekable();
        let mut groups = Vec::new();
        while let Some(map) = maps.next() {
            groups.push((map, maps.next_if(|&other| is_small(map) && is_small(other))));
        }
        groups
    }
}

/// See [`Kernel::forward_cuda`](crate::engine::Kernel::forward_cuda).
pub(super) fn forward(maps: &Headwise, io: &mut CudaForward<'_>) -> Result<()> {
    let (rows, x, full) = (io.shapes.input(0).rows(), io.input(0), maps.full);
    for (map, other) in maps.groups(io.shapes, |_| true) {
        let (heads, outer, inner) = sizes(io.shapes.input(weight_of(map)));
        let (w, bias, y) = (io.input(weight_of(map)), io.inputs[bias_of(map)], io.outputs[map]);
        let width = heads * outer;
        if (outer, inner) == (SMALL, SMALL) && !full {
            let w2 = other.map(|other| io.input(weight_of(other)));
            let bias2 = other.and_then(|other| io.inputs[bias_of(other)]);
            let y2 = other.map(|other| io.outputs[other]);
            let arguments = arguments![x, w, bias, y, w2, bias2, y2, rows, heads];
            let grid = [rows.div_ceil(SMALL_ROWS), heads.div_ceil(128), 1];
            io.queue.launch(&SOURCE, "headwise_forward_4", grid, 128, arguments)?;
        } else if outer < LARGE || inner < LARGE {
            let n = rows * width;
            let arguments = arguments![x, w, bias, y, n as u64, heads, outer, inner];
            let name = if full { "headwise_forward_full" } else { "headwise_forward" };
            io.queue.launch_each(&SOURCE, name, n, arguments)?;
        } else {
            if let Some(bias) = bias {
                io.queue.fill_rows(bias, y, full, rows, width)?;
            }
            let c = Operand::new(y, width).batched(outer);
            io.queue.product(&Product {
                size: [rows, outer, inner],
                a: Operand::new(x, heads * inner).batched(inner),
                b: Operand::new(w, inner).batched(outer * inner).t(),
                c: if full { c.full() } else { c },
                batch: heads,
                accumulate: bias.is_some(),
            })?;
        }
    }
    Ok(())
}

/// See [`Kernel::backward_cuda`](crate::engine::Kernel::backward_cuda).
pub(super) fn backward(maps: &Headwise, io: &mut CudaBackward<'_>) -> Result<()> {
    let (rows, mut fresh) = (io.shapes.input(0).rows(), io.is_fresh(0));
    let gradients = io.output_gradients;
    for map in (0..maps.maps).filter(|&map| gradients[map].is_none()) {
        // The gradients of parameters that nobody reads.
        let (heads, outer, inner) = sizes(io.shapes.input(weight_of(map)));
        for (slot, n) in [(weight_of(map), heads * outer * inner), (bias_of(map), heads * outer)] {
            if let Some(gradient) = io.input_gradients[slot].filter(|_| io.is_fresh(slot)) {
                io.queue.zero(gradient, n)?;
            }
        }
    }
    for (map, other) in maps.groups(io.shapes, |map| gradients[map].is_some()) {
        let (heads, outer, inner) = sizes(io.shapes.input(weight_of(map)));
        let given = gradients[map].unwrap_or(0);
        let dy = if maps.full { io.queue.rounded(given, rows * heads * outer)? } else { given };
        if (outer, inner) == (SMALL, SMALL) {
            small_backward(io, (map, other), dy, fresh)?;
        } else {
            alone_backward(io, map, dy, fresh)?;
        }
        fresh = false;
        for (map, dy) in
            [Some((map, dy)), other.map(|other| (other, gradients[other].unwrap_or(0)))].into_iter().flatten()
        {
            if let Some(db) = io.input_gradients[bias_of(map)] {
                let fresh = io.is_fresh(bias_of(map));
                io.queue.give_rows(dy, false, [rows, heads * outer], (db, fresh))?;
            }
        }
    }
    Ok(())
}

/// dx and dW of one or two maps with blocks of 4 x 4.
fn small_backward(
    io: &mut CudaBackward<'_>,
    (map, other): (usize, Option<usize>),
    dy: u64,
    fresh: bool,
) -> Result<()> {
    let (rows, heads) = (io.shapes.input(0).rows(), sizes(io.shapes.input(weight_of(map))).0);
    let (tiles, count) = (rows.div_ceil(SMALL_ROWS), heads * SMALL * SMALL);
    let dw = Some(map).and_then(|map| io.input_gradients[weight_of(map)]);
    let dw2 = other.and_then(|other| io.input_gradients[weight_of(other)]);
    let parts = dw.map(|_| io.queue.scratch(tiles * count)).transpose()?;
    let parts2 = dw2.map(|_| io.queue.scratch(tiles * count)).transpose()?;
    let (x, w, dx) = (io.input(0), io.input(weight_of(map)), io.input_gradients[0]);
    let w2 = other.map(|other| io.input(weight_of(other)));
    let dy2 = other.and_then(|other| io.output_gradients[other]);
    let arguments = arguments![dy, dy2, x, w, w2, dx, parts, parts2, rows, heads, u32::from(fresh)];
    let grid = [tiles, heads.div_ceil(128), 1];
    io.queue.launch(&SOURCE, "headwise_backward_4", grid, 128, arguments)?;
    for (map, dw, parts) in [(Some(map), dw, parts), (other, dw2, parts2)] {
        if let (Some(map), Some(dw), Some(parts)) = (map, dw, parts) {
            io.queue.give_parts(parts, tiles, count, (dw, io.is_fresh(weight_of(map))))?;
        }
    }
    Ok(())
}

/// dx and dW of a map with other blocks.
fn alone_backward(io: &mut CudaBackward<'_>, map: usize, dy: u64, fresh: bool) -> Result<()> {
    let (heads, outer, inner) = sizes(io.shapes.input(weight_of(map)));
    let (rows, width, count) = (io.shapes.input(0).rows(), heads * outer, heads * outer * inner);
    let (x, w, dx) = (io.input(0), io.input(weight_of(map)), io.input_gradients[0]);
    let (dw, dw_fresh) = (io.input_gradients[weight_of(map)], io.is_fresh(weight_of(map)));
    if outer >= LARGE && inner >= LARGE {
        let dys = Operand::new(dy, width).batched(outer);
        if let Some(dx) = dx {
            io.queue.product(&Product {
                size: [rows, inner, outer],
                a: dys,
                b: Operand::new(w, inner).batched(outer * inner),
                c: Operand::new(dx, heads * inner).batched(inner),
                batch: heads,
                accumulate: !fresh,
            })?;
        }
        let Some(dw) = dw else { return Ok(()) };
        return io.queue.product(&Product {
            size: [outer, inner, rows],
            a: dys.t(),
            b: Operand::new(x, heads * inner).batched(inner),
            c: Operand::new(dw, inner).batched(outer * inner).full(),
            batch: heads,
            accumulate: !dw_fresh,
        });
    }
    if let Some(dx) = dx {
        let n = rows * heads * inner;
        let arguments = arguments![dy, w, dx, n as u64, heads, outer, inner, u32::from(fresh)];
        io.queue.launch_each(&SOURCE, "headwise_backward", n, arguments)?;
    }
    let Some(dw) = dw else { return Ok(()) };
    let tiles = rows.div_ceil(ROWS);
    let parts = io.queue.scratch(tiles * count)?;
    let grid = [count.div_ceil(128), tiles, 1];
    let arguments = arguments![dy, x, parts, rows, heads, outer, inner];
    io.queue.launch(&SOURCE, "headwise_parts", grid, 128, arguments)?;
    io.queue.give_parts(parts, tiles, count, (dw, dw_fresh))
}
