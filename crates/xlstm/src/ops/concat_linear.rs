//! y = [x_1; x_2; …] W^T + b without building the concatenation.
//!
//! The mLSTM's gates are this: q, k and v side by side in, one number a head out. Each part
//! is multiplied with its columns of the weight. Backward with so few outputs goes row by
//! row, straight from the cache: a matrix product would pack all of x (or write all of dx)
//! to use each number four times, and takes up to twice as long. Forward the product wins.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments, launch::ROWS};
use crate::engine::matrix::{MatMut, MatRef, Threads, product};
use crate::engine::operation::{Backward, Forward, Kernel, Slots, scratch};
#[cfg(feature = "cuda")]
use crate::engine::operation::{MAX_SLOTS, NodeShapes};
use crate::engine::projection::{Projection, project};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::{add_to, axpy, vectorize};
use crate::engine::{Scalar, Shape, Storable};
use crate::error::{Error, Result};
use crate::ops::TILE;
use crate::ops::linear::{reduce_tiles, sum_rows};

/// x_i (…, w_i), W (out, Σ w_i), optional b (out) -> y (…, out).
#[derive(Debug)]
struct ConcatLinear {
    parts: usize,
}

/// Records the linear map of the parts side by side; the parts are different values.
///
/// # Errors
/// When the parts differ in all but their last dimension, or W does not have a column for
/// each of their features.
pub fn concat_linear(tape: &mut Tape, parts: &[Var], weight: Var, bias: Option<Var>) -> Result<Var> {
    let operation = ConcatLinear { parts: parts.len() };
    if parts.is_empty() || parts.len() > MAX_PARTS {
        return Err(Error::shape(format!("concat_linear takes 1 to {MAX_PARTS} parts")));
    }
    let inputs: Vec<Option<Var>> = parts.iter().copied().chain([weight]).map(Some).chain([bias]).collect();
    Ok(tape.record(operation, &inputs, &[])?[0])
}

/// As many parts as the GPU's kernels have pointers for.
const MAX_PARTS: usize = 4;

/// Outputs that those kernels take at a time: OUTPUTS of concat_linear.cu.
#[cfg(feature = "cuda")]
const CUDA_OUTPUTS: usize = 8;

/// Rows that the kernel of dx takes: 4 TOGETHER of concat_linear.cu.
#[cfg(feature = "cuda")]
const CUDA_ROWS: usize = 16;

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("concat_linear", include_str!("concat_linear.cu"));

/// Rows that share one pass over what they are added to.
const GROUP: usize = 4;

/// Up to so many outputs, backward goes row by row.
const FEW: usize = 8;

impl Kernel for ConcatLinear {
    fn name(&self) -> &'static str {
        "concat_linear"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let (parts, rest) = inputs.split_at(self.parts);
        let (Some(Some(first)), Some(w)) = (parts.first(), rest[0]) else {
            return Err(Error::shape("a part and W are needed"));
        };
        let mut total = 0;
        for (i, part) in parts.iter().flatten().enumerate() {
            if part.with_last(1) != first.with_last(1) {
                return Err(Error::shape(format!("part {i} {part:?} and part 0 {first:?} differ in rows")));
            }
            total += part.last();
        }
        if w.last() != total || w.rows() == 0 {
            return Err(Error::shape(format!("W {w:?} does not have {total} columns, one a feature")));
        }
        if let Some(b) = rest[1]
            && b.len() != w.rows()
        {
            return Err(Error::shape(format!("b {b:?} is not one number an output of W {w:?}")));
        }
        Ok(vec![first.with_last(w.rows())])
    }

    fn reads(&self) -> Slots {
        Slots { inputs: (1 << (self.parts + 1)) - 1, outputs: 0 }
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[self.parts + 1], &[0])
    }

    fn weights(&self) -> u32 {
        1 << self.parts
    }

    fn storable(&self, slot: usize) -> Storable {
        // Groups of quantised weights may lie across two parts.
        if slot == self.parts { Storable::Half } else { Storable::Wide }
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let y = io.output(0);
        let (rows, outer) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        let total = io.shapes.input(self.parts).last();
        let bias = io.inputs[self.parts + 1];
        y.par_chunks_mut(outer * TILE).for_each(|tile| match bias {
            Some(bias) => tile.chunks_mut(outer).for_each(|row| row.copy_from_slice(bias)),
            None => tile.fill(T::ZERO),
        });
        let mut first = 0;
        for part in 0..self.parts {
            let (x, width) = (io.input(part), io.shapes.input(part).last());
            if width == 0 {
                continue;
            }
            let w = io.weight(self.parts);
            let map = Projection { y: &mut *y, w, outer, accumulate: true };
            project(&mut [map], x, [rows, width], [first, total], io.scratch);
            first += width;
        }
    }

    /// dx_i += dy W_i, dW_i += dy^T x_i, db += sum over rows of dy, with W_i the columns of
    /// part i.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let dy = io.gradient();
        let (rows, outer) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        let (w, total) = (io.input(self.parts), io.shapes.input(self.parts).last());
        let mut first = 0;
        for part in 0..self.parts {
            let width = io.shapes.input(part).last();
            let columns = first..first + width;
            first += width;
            let Some(dx) = io.input_gradient(part) else { continue };
            if width == 0 {
                continue;
            }
            if outer > FEW {
                let w = MatRef::new(w, outer, total).columns_at(columns.start, width);
                let dy = MatRef::new(dy, rows, outer);
                let (dx, accumulate) = dx.into_parts();
                product(MatMut::new(dx, rows, width), T::ONE, dy, w, accumulate, Threads::All);
                continue;
            }
            dx.tiles(width * TILE).zip(dy.par_chunks(outer * TILE)).for_each(|(dx, dy)| {
                vectorize!(|| {
                    for (dx, dy) in dx.chunks_exact_mut(width).zip(dy.chunks_exact(outer)) {
                        add_combination(dx, |o| dy[o], &w[columns.start..], total, outer);
                    }
                });
            });
        }
        if let Some(dw) = io.input_gradient(self.parts) {
            let dw = dw.cleared();
            if outer > FEW {
                self.add_weight_products(dw, io);
            } else {
                let (inputs, all_rows) = (io.inputs, rows);
                reduce_tiles(
                    rows,
                    outer * total,
                    dw,
                    io.scratch,
                    #[inline(always)]
                    |rows, partial| {
                        let dy = &dy[rows.start * outer..rows.end * outer];
                        let mut first = 0;
                        for x in inputs[..self.parts].iter().flatten() {
                            let width = x.len() / all_rows;
                            let x = &x[rows.start * width..rows.end * width];
                            for o in 0..outer {
                                let dw = &mut partial[o * total + first..][..width];
                                add_combination(dw, |row| dy[row * outer + o], x, width, rows.len());
                            }
                            first += width;
                        }
                    },
                );
            }
        }
        if let Some(db) = io.input_gradient(self.parts + 1) {
            sum_rows(dy, outer, db.cleared(), io.scratch);
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let (rows, outer) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        let ([x0, x1, x2, x3], [w0, w1, w2, w3]) = (self.given(&io.inputs), self.widths(io.shapes));
        let (w, bias, y) = (io.input(self.parts), io.inputs[self.parts + 1], io.outputs[0]);
        let arguments = arguments![x0, x1, x2, x3, w0, w1, w2, w3, w, bias, y, rows, outer];
        let grid = [rows.div_ceil(32), outer.div_ceil(CUDA_OUTPUTS), 1];
        io.queue.launch(&SOURCE, "concat_linear_forward", grid, 256, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let (rows, outer) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        let (w, total) = (io.input(self.parts), io.shapes.input(self.parts).last());
        let (dy, tiles) = (io.gradient(), rows.div_ceil(ROWS));
        let ([x0, x1, x2, x3], [w0, w1, w2, w3]) = (self.given(&io.inputs), self.widths(io.shapes));
        let mut first = 0;
        for part in 0..self.parts {
            let width = io.shapes.input(part).last();
            if let Some(dx) = io.input_gradients[part] {
                for o in (0..outer).step_by(CUDA_OUTPUTS) {
                    let arguments = arguments![dy, w, dx, rows, outer, o, total, first, width];
                    let grid = [width.div_ceil(1024), rows.div_ceil(CUDA_ROWS), 1];
                    io.queue.launch(&SOURCE, "concat_linear_inputs", grid, 128, arguments)?;
                }
            }
            first += width;
        }
        if let Some(dw) = io.input_gradients[self.parts] {
            let sums = io.queue.scratch(tiles * outer * total)?;
            let arguments = arguments![x0, x1, x2, x3, w0, w1, w2, w3, dy, sums, rows, outer];
            let grid = [total.div_ceil(1024), tiles, outer.div_ceil(CUDA_OUTPUTS)];
            io.queue.launch(&SOURCE, "concat_linear_weights", grid, 128, arguments)?;
            io.queue.add_parts(sums, tiles, outer * total, dw)?;
        }
        io.input_gradients[self.parts + 1].map_or(Ok(()), |db| io.queue.add_rows(dy, true, rows, outer, db))
    }
}

#[cfg(feature = "cuda")]
impl ConcatLinear {
    /// The parts, as many as kernels take.
    fn given(&self, inputs: &[Option<u64>; MAX_SLOTS]) -> [Option<u64>; MAX_PARTS] {
        std::array::from_fn(|part| inputs[part].filter(|_| part < self.parts))
    }

    fn widths(&self, shapes: &NodeShapes) -> [usize; MAX_PARTS] {
        std::array::from_fn(|part| if part < self.parts { shapes.input(part).last() } else { 0 })
    }
}

impl ConcatLinear {
    /// dW_i += dy^T x_i as matrix products, through a dense copy of the columns of part i.
    fn add_weight_products<T: Scalar>(&self, dw: &mut [T], io: &mut Backward<'_, T>) {
        let (rows, outer) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        let total = io.shapes.input(self.parts).last();
        let dy = MatRef::new(io.gradient(), rows, outer);
        let mut first = 0;
        for part in 0..self.parts {
            let (x, width) = (io.input(part), io.shapes.input(part).last());
            let x = MatRef::new(x, rows, width);
            let dense = scratch(io.scratch, outer * width);
            product(MatMut::new(dense, outer, width), T::ONE, dy.t(), x, false, Threads::All);
            for (dw, dense) in dw.chunks_exact_mut(total).zip(dense.chunks_exact(width.max(1))) {
                add_to(dense, &mut dw[first..]);
            }
            first += width;
        }
    }
}

/// y += Σ_i a_i x_i for `count` rows x_i, `stride` elements apart; [`GROUP`] rows share one
/// pass over y.
#[inline(always)]
fn add_combination<T: Scalar>(y: &mut [T], a: impl Fn(usize) -> T, x: &[T], stride: usize, count: usize) {
    let width = y.len();
    let row = |i: usize| &x[i * stride..][..width];
    let mut i = 0;
    while i + GROUP <= count {
        let (a0, a1, a2, a3) = (a(i), a(i + 1), a(i + 2), a(i + 3));
        let rows = row(i).iter().zip(row(i + 1)).zip(row(i + 2).iter().zip(row(i + 3)));
        for (y, ((x0, x1), (x2, x3))) in y.iter_mut().zip(rows) {
            *y = a3.mul_add(*x3, a2.mul_add(*x2, a1.mul_add(*x1, a0.mul_add(*x0, *y))));
        }
        i += GROUP;
    }
    for i in i..count {
        axpy(a(i), row(i), y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Mode;
    use crate::ops::check::Check;

    #[test]
    fn gradients() {
        for outer in [1, 4, 7, 9] {
            Check::new()
                .input([2, 35, 5])
                .input([2, 35, 34])
                .input([2, 35, 16])
                .input([outer, 55])
                .input([outer])
                .run(|tape, v, _| Ok(vec![concat_linear(tape, &v[..3], v[3], Some(v[4]))?]));
        }
        Check::new()
            .input([3, 6])
            .input([4, 6])
            .run(|tape, v, _| Ok(vec![concat_linear(tape, &v[..1], v[1], None)?]));
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let mut tape = Tape::new(Mode::Train);
        let (a, b, w) = (tape.input([2, 3]), tape.input([2, 4]), tape.input([4, 6]));
        let message = concat_linear(&mut tape, &[a, b], w, None).unwrap_err().to_string();
        assert!(message.contains("[4, 6]") && message.contains("7 columns"), "{message}");
        let c = tape.input([3, 3]);
        assert!(concat_linear(&mut tape, &[a, c], w, None).is_err());
    }
}
