//! The pre-activations of both gates of the mLSTM: y_g = cap([x_1; x_2; …] W_g^T + b_g) for the input gate
//! and the forget gate, without building the concatenation; cap(z) = c tanh(z / c) where there is a cap c.
//!
//! The parts are the input of the layer alone, or q, k and v side by side (`ops/qkv.rs`); an output is one
//! number a head. Each part is multiplied with its columns of the weights. Backward with so few outputs goes row
//! by row, straight from the cache: a matrix product would pack all of x (or write all of dx)
//! to use each number a few times, and takes up to twice as long. Forward the product wins.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{
    CudaBackward, CudaForward, Source,
    blas::{Combination, Operand, Product},
    context::arguments,
    few_rows::Map,
    launch::Queue,
};
use crate::engine::matrix::{MatMut, MatRef, Threads, product};
#[cfg(feature = "cuda")]
use crate::engine::operation::MAX_SLOTS;
use crate::engine::operation::{Backward, Forward, Kernel, NodeShapes, Slots, scratch};
use crate::engine::projection::{Projection, project};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::{add_to, axpy, vectorize};
use crate::engine::{Precision, Scalar, Shape, Storable};
use crate::error::{Error, Result};
use crate::ops::{TILE, gradient_tiles};

/// x_i (…, w_i), then W_g (heads, Σ w_i) and optional b_g (heads) of both gates -> y_g (…, heads).
#[derive(Debug)]
pub(super) struct Gates {
    /// 1 to [`MAX_PARTS`].
    pub(super) parts: usize,
    pub(super) cap: Option<f64>,
}

/// Records the pre-activations of both gates, each a linear map of x, within ±cap where there is a cap.
///
/// # Errors
/// When the gates differ in their number of heads, or a weight does not have a column for each of x's
/// features.
pub fn gates(tape: &mut Tape, x: Var, maps: [(Var, Option<Var>); 2], cap: Option<f64>) -> Result<[Var; 2]> {
    let [(weight, bias), (other, other_bias)] = maps;
    let inputs = [Some(x), Some(weight), bias, Some(other), other_bias];
    let outputs = tape.record(Gates { parts: 1, cap }, &inputs, &[])?;
    Ok([outputs[0], outputs[1]])
}

/// q, k and v.
pub(super) const MAX_PARTS: usize = 3;

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("gates", include_str!("gates.cu"));

/// Rows that share one pass over what they are added to.
const GROUP: usize = 4;

/// Up to so many heads, backward goes row by row.
const FEW: usize = 8;

impl Gates {
    fn weight(&self, gate: usize) -> usize {
        self.parts + 2 * gate
    }

    fn bias(&self, gate: usize) -> usize {
        self.weight(gate) + 1
    }

    /// Where each part's features lie among the columns of W.
    fn columns(&self, shapes: &NodeShapes) -> Vec<std::ops::Range<usize>> {
        let mut first = 0;
        (0..self.parts)
            .map(|part| {
                let width = shapes.input(part).last();
                first += width;
                first - width..first
            })
            .collect()
    }
}

impl Kernel for Gates {
    fn name(&self) -> &'static str {
        "gates"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let (parts, rest) = inputs.split_at(self.parts);
        let (Some(Some(first)), Some(w), Some(other)) = (parts.first(), rest[0], rest[2]) else {
            return Err(Error::shape("a part and two weights are needed"));
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
        if w != other {
            return Err(Error::shape(format!("the gates' W {w:?} and {other:?} differ")));
        }
        if let Some(b) = [rest[1], rest[3]].into_iter().flatten().find(|b| b.len() != w.rows()) {
            return Err(Error::shape(format!("b {b:?} is not one number an output of W {w:?}")));
        }
        Ok(vec![first.with_last(w.rows()); 2])
    }

    fn reads(&self) -> Slots {
        let weights = [self.weight(0), self.weight(1)].iter().fold(0, |set, slot| set | 1 << slot);
        let outputs = if self.cap.is_some() { 0b11 } else { 0 };
        Slots { inputs: ((1 << self.parts) - 1) | weights, outputs }
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[self.bias(0), self.bias(1)], &[0, 1])
    }

    fn weights(&self) -> u32 {
        1 << self.weight(0) | 1 << self.weight(1)
    }

    fn storable(&self, slot: usize) -> Storable {
        // Groups of quantised weights may lie across two parts.
        if self.weights() >> slot & 1 == 1 { Storable::Half } else { Storable::Wide }
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (rows, heads) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        let total = io.shapes.input(self.weight(0)).last();
        let mut both = [io.output(0), io.output(1)];
        for (gate, y) in both.iter_mut().enumerate() {
            let bias = io.inputs[self.bias(gate)];
            y.par_chunks_mut(heads * TILE).for_each(|tile| match bias {
                Some(bias) => tile.chunks_mut(heads).for_each(|row| row.copy_from_slice(bias)),
                None => tile.fill(T::ZERO),
            });
        }
        for (part, columns) in self.columns(io.shapes).into_iter().enumerate() {
            if columns.is_empty() {
                continue;
            }
            let [first, second] = &mut both;
            let mut maps = [(first, 0), (second, 1)].map(|(y, gate)| {
                let w = io.weight(self.weight(gate));
                Projection { y, w, outer: heads, accumulate: true }
            });
            let (x, size) = (io.input(part), [rows, columns.len()]);
            project(&mut maps, x, size, [columns.start, total], Precision::F32, io.scratch);
        }
        let Some(cap) = self.cap else { return };
        let (cap, inverse) = (T::from_f64(cap), T::from_f64(1.0 / cap));
        for y in both {
            y.par_chunks_mut(heads * TILE).for_each(|tile| {
                vectorize!(|| tile.iter_mut().for_each(|y| *y = cap * (*y * inverse).tanh()));
            });
        }
    }

    /// With dz_g = dy_g (1 - (y_g / c)²) and W_gi the columns of part i: dx_i += Σ_g dz_g W_gi,
    /// dW_gi += dz_g^T x_i, db_g += sum over rows of dz_g.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let (rows, heads) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        let (total, tiles) = (io.shapes.input(self.weight(0)).last(), rows.div_ceil(TILE));
        let (few, columns) = (heads <= FEW, self.columns(io.shapes));
        // Of each gate: dz, then with few heads a tile's sums for dW and db, else a part's dW.
        let each = heads * (total + 1);
        let work = if few { tiles * each } else { each };
        let inputs = io.inputs;
        let mut dx: [_; MAX_PARTS] =
            std::array::from_fn(|part| if part < self.parts { io.input_gradient(part) } else { None });
        let mut dw = [0, 1].map(|gate| io.input_gradient(self.weight(gate)));
        let mut db = [0, 1].map(|gate| io.input_gradient(self.bias(gate)));
        let weights = [0, 1].map(|gate| io.input(self.weight(gate)));
        // Without a cap, y is not there.
        let given = [0, 1].map(|gate| (io.output_gradients[gate], io.outputs[gate]));
        let space = scratch(io.scratch, 2 * rows * heads + 2 * work);
        let (slopes, sums) = space.split_at_mut(2 * rows * heads);
        for (gate, dz) in slopes.chunks_exact_mut((rows * heads).max(1)).enumerate() {
            self.slopes(given[gate], dz);
        }
        let slopes = &*slopes;
        let dz = |gate: usize| &slopes[gate * rows * heads..][..rows * heads];
        for (part, columns) in columns.iter().enumerate() {
            let width = columns.len();
            let Some(dx) = dx[part].take().filter(|_| width > 0) else { continue };
            if !few {
                let (dx, mut accumulate) = dx.into_parts();
                for (gate, weights) in weights.iter().enumerate() {
                    let w = MatRef::new(weights, heads, total).columns_at(columns.start, width);
                    let dz = MatRef::new(dz(gate), rows, heads);
                    product(MatMut::new(dx, rows, width), T::ONE, dz, w, accumulate, Threads::All);
                    accumulate = true;
                }
                continue;
            }
            gradient_tiles(Some(dx), width * TILE, tiles).enumerate().for_each(|(tile, dx)| {
                let Some(dx) = dx else { return };
                vectorize!(|| {
                    for (row, dx) in dx.chunks_exact_mut(width).enumerate() {
                        for (gate, weights) in weights.iter().enumerate() {
                            let dz = &dz(gate)[(tile * TILE + row) * heads..][..heads];
                            add_combination(dx, |o| dz[o], &weights[columns.start..], total, heads);
                        }
                    }
                });
            });
        }
        for gate in 0..2 {
            let (dw, db) = (dw[gate].take(), db[gate].take());
            let sums = &mut sums[gate * work..][..work];
            let dz = dz(gate);
            if !few {
                if let Some(dw) = dw {
                    let dw = dw.cleared();
                    for (x, columns) in inputs.iter().flatten().zip(&columns) {
                        let x = MatRef::new(x, rows, columns.len());
                        let dense = &mut sums[..heads * columns.len()];
                        let to = MatMut::new(&mut *dense, heads, columns.len());
                        product(to, T::ONE, MatRef::new(dz, rows, heads).t(), x, false, Threads::All);
                        let dense = dense.chunks_exact(columns.len().max(1));
                        for (dw, dense) in dw.chunks_exact_mut(total).zip(dense) {
                            add_to(dense, &mut dw[columns.clone()]);
                        }
                    }
                }
                if let Some(db) = db {
                    let db = db.cleared();
                    dz.chunks_exact(heads).for_each(|row| add_to(row, db));
                }
                continue;
            }
            sums.par_chunks_mut(each).enumerate().for_each(|(tile, sums)| {
                let (dw, db) = sums.split_at_mut(heads * total);
                let (first, last) = (tile * TILE, rows.min((tile + 1) * TILE));
                let dz = &dz[first * heads..last * heads];
                vectorize!(|| {
                    dw.fill(T::ZERO);
                    db.fill(T::ZERO);
                    for (x, columns) in inputs.iter().flatten().zip(&columns) {
                        let width = columns.len();
                        let x = &x[first * width..last * width];
                        for o in 0..heads {
                            let dw = &mut dw[o * total + columns.start..][..width];
                            add_combination(dw, |row| dz[row * heads + o], x, width, last - first);
                        }
                    }
                    dz.chunks_exact(heads).for_each(|row| add_to(row, db));
                });
            });
            if let Some(dw) = dw {
                let dw = dw.cleared();
                sums.chunks_exact(each).for_each(|tile| add_to(&tile[..heads * total], dw));
            }
            if let Some(db) = db {
                let db = db.cleared();
                sums.chunks_exact(each).for_each(|tile| add_to(&tile[heads * total..], db));
            }
        }
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots { inputs: (1 << (self.parts + 4)) - 1, outputs: 0 }
    }

    /// Several parts are not one matrix of rows.
    #[cfg(feature = "cuda")]
    fn multiplies(&self) -> bool {
        self.parts == 1
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let (rows, heads) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        if self.parts == 1 {
            let maps = [0, 1].map(|gate| Map {
                weight: io.input(self.weight(gate)),
                bias: io.inputs[self.bias(gate)],
                y: io.outputs[gate],
                outer: heads,
                full: true,
                cap: self.cap,
            });
            if io.queue.few_rows(io.next, io.input(0), [rows, io.shapes.input(0).last()], &maps)? {
                return Ok(());
            }
        }
        let (w, total, padded) = self.both_weights(&io.inputs, io.shapes, io.queue)?;
        let z = io.queue.scratch(rows * padded)?;
        let mut accumulate = false;
        for (part, columns) in self.columns(io.shapes).into_iter().enumerate() {
            let (width, w) = (columns.len(), w + (columns.start * io.queue.precision().bytes()) as u64);
            if width == 0 {
                continue;
            }
            io.queue.product(&Product {
                size: [rows, padded, width],
                a: Operand::new(io.input(part), width),
                b: Operand::new(w, total).t(),
                c: Operand::new(z, padded).full(),
                batch: 1,
                accumulate,
            })?;
            accumulate = true;
        }
        if !accumulate {
            io.queue.zero(z, rows * padded)?;
        }
        let [b0, b1] = [0, 1].map(|gate| io.inputs[self.bias(gate)]);
        let [y0, y1, ..] = io.outputs;
        let arguments = arguments![z, b0, b1, y0, y1, rows, heads, padded, self.cap.unwrap_or(0.0)];
        io.queue.launch_each(&SOURCE, "gates_values", 2 * rows * heads, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        self.backward_with(io, [None; MAX_PARTS])
    }
}

#[cfg(feature = "cuda")]
impl Gates {
    /// [`Kernel::backward_cuda`], where the gradient of a part that has an addend is written whole, with that
    /// added.
    pub(super) fn backward_with(
        &self,
        io: &mut CudaBackward<'_>,
        addends: [Option<u64>; MAX_PARTS],
    ) -> Result<()> {
        let (rows, heads) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        let (w, total, padded) = self.both_weights(&io.inputs, io.shapes, io.queue)?;
        let bytes = io.queue.precision().bytes();
        let dz = io.queue.scratch((rows * padded * bytes).div_ceil(4))?;
        let ([y0, y1, ..], [dy0, dy1, ..]) = (io.outputs, io.output_gradients);
        // The bias's gradient is a sum of many that cancel: of numbers that are not rounded.
        let full = io.queue.scratch(rows * padded)?;
        let arguments = arguments![y0, y1, dy0, dy1, dz, full, rows, heads, padded, self.cap.unwrap_or(0.0)];
        io.queue.launch_each(&SOURCE, "gates_slopes", rows * padded, arguments)?;
        let [dw, db] = [padded * total, padded].map(|n| io.queue.scratch(n));
        let (dw, db) = (dw?, db?);
        for (part, columns) in self.columns(io.shapes).into_iter().enumerate() {
            let (width, first) = (columns.len(), columns.start);
            if width == 0 {
                continue;
            }
            if let Some(dx) = io.input_gradients[part] {
                let product = Product {
                    size: [rows, width, padded],
                    a: Operand::new(dz, padded),
                    b: Operand::new(w + (first * bytes) as u64, total),
                    c: Operand::new(dx, width),
                    batch: 1,
                    accumulate: addends[part].is_some() || !io.is_fresh(part),
                };
                match addends[part] {
                    Some(addend) => {
                        io.queue.combine(&product, Combination { alpha: 1.0, beta: 1.0, addend })?;
                    }
                    None => io.queue.product(&product)?,
                }
            }
            io.queue.product(&Product {
                size: [padded, width, rows],
                a: Operand::new(dz, padded).t(),
                b: Operand::new(io.input(part), width),
                c: Operand::new(dw + 4 * first as u64, total).full(),
                batch: 1,
                accumulate: false,
            })?;
        }
        io.queue.give_rows(full, true, [rows, padded], (db, true))?;
        let slots = [self.weight(0), self.weight(1), self.bias(0), self.bias(1)];
        let [dw0, dw1, db0, db1] = slots.map(|slot| io.input_gradients[slot]);
        let fresh: u32 = (0..).zip(slots).map(|(bit, slot)| u32::from(io.is_fresh(slot)) << bit).sum();
        let arguments = arguments![dw, db, dw0, dw1, db0, db1, heads, total, fresh];
        io.queue.launch_each(&SOURCE, "gates_gradients", 2 * heads * (total + 1), arguments)
    }

    /// The weights of both gates below each other in work space, its columns and its rows.
    fn both_weights(
        &self,
        inputs: &[Option<u64>; MAX_SLOTS],
        shapes: &NodeShapes,
        queue: &mut Queue,
    ) -> Result<(u64, usize, usize)> {
        let shape = shapes.input(self.weight(0));
        let (heads, total) = (shape.rows(), shape.last());
        // Rows of 16 bytes in dz, what products are fast with.
        let padded = (2 * heads).next_multiple_of(8);
        let w = queue.scratch((padded * total * queue.precision().bytes()).div_ceil(4))?;
        let [w0, w1] = [0, 1].map(|gate| inputs[self.weight(gate)]);
        let arguments = arguments![w0, w1, w, heads, padded, total];
        queue.launch_each(&SOURCE, "gates_weights", padded * total, arguments)?;
        Ok((w, total, padded))
    }
}

impl Gates {
    /// dz = the gradient of a gate before the cap, from that after it and the gate.
    fn slopes<T: Scalar>(&self, (dy, y): (Option<&[T]>, Option<&[T]>), dz: &mut [T]) {
        match dy {
            Some(dy) => dz.copy_from_slice(dy),
            None => dz.fill(T::ZERO),
        }
        let (Some(cap), Some(y)) = (self.cap, y) else { return };
        let inverse = T::from_f64(1.0 / cap);
        vectorize!(|| {
            for (dz, y) in dz.iter_mut().zip(y) {
                let t = *y * inverse;
                *dz *= T::ONE - t * t;
            }
        });
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
    use crate::ops::check::{Check, noise};

    #[test]
    fn gradients() {
        for (heads, cap) in [(1, None), (4, Some(1.5)), (7, None), (9, Some(0.7))] {
            let wide = |seed: u64, n: usize| noise(seed, n).iter().map(|x| 2.0 * x).collect();
            Check::new()
                .input_of([2, 35, 34], wide(7, 2 * 35 * 34))
                .input([heads, 34])
                .input([heads])
                .input([heads, 34])
                .input([heads])
                .run(|tape, v, _| {
                    Ok(gates(tape, v[0], [(v[1], Some(v[2])), (v[3], Some(v[4]))], cap)?.to_vec())
                });
        }
        Check::new().input([3, 6]).input([4, 6]).input([4, 6]).run(|tape, v, _| {
            let [_, forget] = gates(tape, v[0], [(v[1], None), (v[2], None)], Some(15.0))?;
            Ok(vec![forget])
        });
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let mut tape = Tape::new(Mode::Train);
        let (x, w, other) = (tape.input([2, 7]), tape.input([4, 6]), tape.input([4, 6]));
        let message = gates(&mut tape, x, [(w, None), (other, None)], None).unwrap_err().to_string();
        assert!(message.contains("[4, 6]") && message.contains("7 columns"), "{message}");
        let (x, few) = (tape.input([2, 6]), tape.input([3, 6]));
        assert!(gates(&mut tape, x, [(w, None), (few, None)], None).is_err(), "other heads");
    }
}
