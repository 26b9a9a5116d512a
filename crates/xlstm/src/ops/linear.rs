//! y = x W^T + b, over all rows of x.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, blas::Operand, blas::Product};
use crate::engine::matrix::{MatMut, MatRef, Threads, product};
use crate::engine::operation::{Backward, Forward, Kernel, Slots, scratch};
use crate::engine::projection::project;
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::{add_to, vectorize};
use crate::engine::{Scalar, Shape, Storable};
use crate::error::{Error, Result};
use crate::ops::TILE;

/// x (…, in), W (out, in), optional b (out) -> y (…, out).
#[derive(Debug)]
struct Linear;

/// Records y = x W^T + b.
///
/// # Errors
/// When the inner dimensions differ.
pub fn linear(tape: &mut Tape, x: Var, weight: Var, bias: Option<Var>) -> Result<Var> {
    Ok(tape.record(Linear, &[Some(x), Some(weight), bias], &[])?[0])
}

impl Kernel for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let (Some(x), Some(w)) = (inputs[0], inputs[1]) else {
            return Err(Error::shape("x and W are needed"));
        };
        if x.last() != w.last() {
            return Err(Error::shape(format!("x {x:?} and W {w:?} differ in their last dimension")));
        }
        Ok(vec![x.with_last(w.rows())])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[0, 1], &[])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[2], &[])
    }

    fn weights(&self) -> u32 {
        1 << 1
    }

    fn storable(&self, slot: usize) -> Storable {
        if slot == 1 { Storable::Quantized } else { Storable::Wide }
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let y = io.output(0);
        let (rows, inner, outer) =
            (io.shapes.input(0).rows(), io.shapes.input(0).last(), io.shapes.outputs[0].last());
        if let Some(bias) = io.inputs[2] {
            y.par_chunks_mut(outer * TILE).for_each(|tile| {
                tile.chunks_mut(outer).for_each(|row| row.copy_from_slice(bias));
            });
        }
        let accumulate = io.inputs[2].is_some();
        let (size, columns) = ([rows, inner, outer], [0, inner]);
        project(y, io.input(0), io.weight(1), size, columns, accumulate, io.scratch);
    }

    /// dx += dy W, dW += dy^T x, db += sum over rows of dy.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let (rows, inner) = (io.shapes.input(0).rows(), io.shapes.input(0).last());
        let outer = io.shapes.outputs[0].last();
        let dy = MatRef::new(io.gradient(), rows, outer);
        if let Some(dx) = io.input_gradient(0) {
            let w = MatRef::new(io.input(1), outer, inner);
            let (dx, accumulate) = dx.into_parts();
            product(MatMut::new(dx, rows, inner), T::ONE, dy, w, accumulate, Threads::All);
        }
        if let Some(dw) = io.input_gradient(1) {
            let x = MatRef::new(io.input(0), rows, inner);
            let (dw, accumulate) = dw.into_parts();
            product(MatMut::new(dw, outer, inner), T::ONE, dy.t(), x, accumulate, Threads::All);
        }
        if let Some(db) = io.input_gradient(2) {
            sum_rows(io.gradient(), outer, db.cleared(), io.scratch);
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let y = io.shapes.outputs[0];
        let (rows, inner, outer) = (y.rows(), io.shapes.input(0).last(), y.last());
        if let Some(bias) = io.inputs[2] {
            io.queue.fill_rows(bias, io.outputs[0], false, rows, outer)?;
        }
        io.queue.product(&Product {
            size: [rows, outer, inner],
            a: Operand::new(io.input(0), inner),
            b: Operand::new(io.input(1), inner).t(),
            c: Operand::new(io.outputs[0], outer),
            batch: 1,
            accumulate: io.inputs[2].is_some(),
        })
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let y = io.shapes.outputs[0];
        let (rows, inner, outer) = (y.rows(), io.shapes.input(0).last(), y.last());
        let dy = Operand::new(io.gradient(), outer);
        if let Some(dx) = io.input_gradients[0] {
            io.queue.product(&Product {
                size: [rows, inner, outer],
                a: dy,
                b: Operand::new(io.input(1), inner),
                c: Operand::new(dx, inner),
                batch: 1,
                accumulate: true,
            })?;
        }
        if let Some(dw) = io.input_gradients[1] {
            io.queue.product(&Product {
                size: [outer, inner, rows],
                a: dy.t(),
                b: Operand::new(io.input(0), inner),
                c: Operand::new(dw, inner).full(),
                batch: 1,
                accumulate: true,
            })?;
        }
        io.input_gradients[2].map_or(Ok(()), |db| io.queue.add_rows(io.gradient(), false, rows, outer, db))
    }
}

/// sums += the sum over the rows of x (rows, width), in fixed tiles.
pub(crate) fn sum_rows<T: Scalar>(x: &[T], width: usize, sums: &mut [T], space: &mut Vec<T>) {
    reduce_tiles(
        x.len() / width,
        width,
        sums,
        space,
        #[inline(always)]
        |rows, partial| {
            for row in x[rows.start * width..rows.end * width].chunks_exact(width) {
                add_to(row, partial);
            }
        },
    );
}

/// sums += the sum over tiles of rows of what `tile` leaves in its zeroed partial sums.
/// Tiles are fixed and added in order, so the result does not depend on the threads.
pub(crate) fn reduce_tiles<T: Scalar>(
    rows: usize,
    width: usize,
    sums: &mut [T],
    space: &mut Vec<T>,
    tile: impl Fn(std::ops::Range<usize>, &mut [T]) + Sync,
) {
    let tiles = rows.div_ceil(TILE);
    let partials = scratch(space, tiles * width);
    partials.par_chunks_mut(width).enumerate().for_each(|(i, partial)| {
        partial.fill(T::ZERO);
        vectorize!(|| tile(i * TILE..rows.min((i + 1) * TILE), partial));
    });
    for partial in partials.chunks_exact(width) {
        add_to(partial, sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::Check;

    #[test]
    fn gradients() {
        Check::new()
            .input([3, 7, 5])
            .input([4, 5])
            .input([4])
            .run(|tape, v, _| Ok(vec![linear(tape, v[0], v[1], Some(v[2]))?]));
        Check::new().input([2, 6]).input([3, 6]).run(|tape, v, _| Ok(vec![linear(tape, v[0], v[1], None)?]));
    }
}
