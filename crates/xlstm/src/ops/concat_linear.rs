//! y = [x_1; x_2; …] W^T + b without building the concatenation.
//!
//! The mLSTM's gates are this: q, k and v side by side in, one number a head out. With so
//! few outputs a matrix product would pack all of x to use each number four times; instead
//! [`GROUP`] outputs at a time share one pass over each row. Wider outputs are one matrix
//! product a part, with that part's columns of the weight.

use rayon::prelude::*;

use crate::engine::matrix::{MatMut, MatRef, Threads, product};
use crate::engine::operation::{Backward, Forward, Kernel, MAX_SLOTS, Reads, scratch};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::{add_to, axpy, sum, vectorize};
use crate::engine::{Scalar, Shape};
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
    if parts.is_empty() || parts.len() + 2 > MAX_SLOTS {
        return Err(Error::shape(format!("concat_linear takes 1 to {} parts", MAX_SLOTS - 2)));
    }
    let inputs: Vec<Option<Var>> = parts.iter().copied().chain([weight]).map(Some).chain([bias]).collect();
    Ok(tape.record(operation, &inputs, &[])?[0])
}

/// Outputs that share one pass over a row.
const GROUP: usize = 4;

/// Up to so many outputs are worked out by rows.
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

    fn reads(&self) -> Reads {
        Reads { inputs: (1 << (self.parts + 1)) - 1, outputs: 0 }
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let y = io.output(0);
        let (rows, outer) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        let (w, total) = (io.input(self.parts), io.shapes.input(self.parts).last());
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
            if outer > FEW {
                let w = MatRef::new(w, outer, total).columns_at(first, width);
                let x = MatRef::new(x, rows, width);
                product(MatMut::new(y, rows, outer), T::ONE, x, w.t(), true, Threads::All);
            } else {
                let row_of_w = |o: usize| &w[o * total + first..][..width];
                y.par_chunks_mut(outer * TILE).zip(x.par_chunks(width * TILE)).for_each(|(y, x)| {
                    vectorize(
                        #[inline(always)]
                        || {
                            for (y, x) in y.chunks_exact_mut(outer).zip(x.chunks_exact(width)) {
                                let mut groups = y.chunks_exact_mut(GROUP);
                                let mut o = 0;
                                for y in &mut groups {
                                    let w = std::array::from_fn(
                                        #[inline(always)]
                                        |i| row_of_w(o + i),
                                    );
                                    let sums: [T; GROUP] = dots(x, w);
                                    for (y, sum) in y.iter_mut().zip(sums) {
                                        *y += sum;
                                    }
                                    o += GROUP;
                                }
                                for y in groups.into_remainder() {
                                    *y += dots(x, [row_of_w(o)])[0];
                                    o += 1;
                                }
                            }
                        },
                    );
                });
            }
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
                product(MatMut::new(dx, rows, width), T::ONE, dy, w, true, Threads::All);
                continue;
            }
            dx.par_chunks_mut(width * TILE).zip(dy.par_chunks(outer * TILE)).for_each(|(dx, dy)| {
                vectorize(
                    #[inline(always)]
                    || {
                        for (dx, dy) in dx.chunks_exact_mut(width).zip(dy.chunks_exact(outer)) {
                            add_combination(dx, dy, &w[columns.start..], total);
                        }
                    },
                );
            });
        }
        if let Some(dw) = io.input_gradient(self.parts) {
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
                            weight_gradient(dy, x, outer, &mut partial[first..], total);
                            first += width;
                        }
                    },
                );
            }
        }
        if let Some(db) = io.input_gradient(self.parts + 1) {
            sum_rows(dy, outer, db, io.scratch);
        }
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

/// Independent partial sums, as in [`dot`](crate::engine::vector::dot).
const LANES: usize = 16;

/// Inner products of x with N others.
#[inline(always)]
fn dots<T: Scalar, const N: usize>(x: &[T], w: [&[T]; N]) -> [T; N] {
    let w = w.map(
        #[inline(always)]
        |w| &w[..x.len()],
    );
    let mut lanes = [[T::ZERO; LANES]; N];
    let whole = x.len() / LANES * LANES;
    for (i, x) in x.chunks_exact(LANES).enumerate() {
        for (w, lanes) in w.iter().zip(&mut lanes) {
            let w = &w[i * LANES..][..LANES];
            for lane in 0..LANES {
                lanes[lane] = x[lane].mul_add(w[lane], lanes[lane]);
            }
        }
    }
    for (w, lanes) in w.iter().zip(&mut lanes) {
        for (lane, (x, w)) in lanes.iter_mut().zip(x[whole..].iter().zip(&w[whole..])) {
            *lane = x.mul_add(*w, *lane);
        }
    }
    let mut sums = [T::ZERO; N];
    for (total, lanes) in sums.iter_mut().zip(&lanes) {
        *total = sum(lanes);
    }
    sums
}

/// dx += Σ_o dy[o] w_o, the w_o being the first columns of rows of `stride` elements.
#[inline(always)]
fn add_combination<T: Scalar>(dx: &mut [T], dy: &[T], w: &[T], stride: usize) {
    let width = dx.len();
    let row = |o: usize| &w[o * stride..][..width];
    let mut o = 0;
    while o + GROUP <= dy.len() {
        let (w0, w1, w2, w3) = (row(o), row(o + 1), row(o + 2), row(o + 3));
        for (dx, ((w0, w1), (w2, w3))) in dx.iter_mut().zip(w0.iter().zip(w1).zip(w2.iter().zip(w3))) {
            let sum = dy[o].mul_add(*w0, dy[o + 1].mul_add(*w1, dy[o + 2].mul_add(*w2, dy[o + 3] * *w3)));
            *dx += sum;
        }
        o += GROUP;
    }
    for o in o..dy.len() {
        axpy(dy[o], row(o), dx);
    }
}

/// dw_o = Σ over rows of dy[o] x, the dw_o being the first columns of rows of `stride`
/// elements; columns outermost so that the sums stay in registers.
#[inline(always)]
fn weight_gradient<T: Scalar>(dy: &[T], x: &[T], outer: usize, dw: &mut [T], stride: usize) {
    let width = x.len() / (dy.len() / outer);
    let mut c = 0;
    while c < width {
        let step = if c + LANES <= width { LANES } else { 1 };
        let mut o = 0;
        while o < outer {
            let count = if o + GROUP <= outer { GROUP } else { 1 };
            match (count, step) {
                (GROUP, LANES) => gradient_block::<T, GROUP, LANES>(dy, x, outer, o, c, dw, stride),
                (GROUP, _) => gradient_block::<T, GROUP, 1>(dy, x, outer, o, c, dw, stride),
                (_, LANES) => gradient_block::<T, 1, LANES>(dy, x, outer, o, c, dw, stride),
                _ => gradient_block::<T, 1, 1>(dy, x, outer, o, c, dw, stride),
            }
            o += count;
        }
        c += step;
    }
}

/// [`weight_gradient`] for N outputs from `o` and L columns from `c`.
#[inline(always)]
fn gradient_block<T: Scalar, const N: usize, const L: usize>(
    dy: &[T],
    x: &[T],
    outer: usize,
    o: usize,
    c: usize,
    dw: &mut [T],
    stride: usize,
) {
    let width = x.len() / (dy.len() / outer);
    let mut sums = [[T::ZERO; L]; N];
    for (dy, x) in dy.chunks_exact(outer).zip(x.chunks_exact(width)) {
        let (Some(dy), Some(x)) = (dy[o..].first_chunk::<N>(), x[c..].first_chunk::<L>()) else { return };
        for (sums, dy) in sums.iter_mut().zip(dy) {
            for lane in 0..L {
                sums[lane] = dy.mul_add(x[lane], sums[lane]);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        dw[(o + i) * stride + c..][..L].copy_from_slice(sums);
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
