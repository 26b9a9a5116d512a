//! y = x W^T + b, over all rows of x; for one pair of W and b, or for several of the same x.

use rayon::prelude::*;

use crate::engine::bf16_products::product_in;
#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, blas::Operand, blas::Product, few_rows::Map};
use crate::engine::matrix::{MatMut, MatRef};
use crate::engine::operation::{Backward, Forward, Gradient, Kernel, MAX_SLOTS, Slots, scratch};
use crate::engine::projection::{Projection, project};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::{add_to, vectorize};
use crate::engine::{Scalar, Shape, Storable};
use crate::error::{Error, Result};
use crate::ops::TILE;

/// x (…, in), then W_i (out_i, in) and optional b_i (out_i) for each i -> y_i (…, out_i).
#[derive(Debug)]
struct Linear {
    maps: usize,
}

/// The most maps of one input.
const MAX_MAPS: usize = (MAX_SLOTS - 1) / 2;

/// Records y = x W^T + b.
///
/// # Errors
/// When the inner dimensions differ.
pub fn linear(tape: &mut Tape, x: Var, weight: Var, bias: Option<Var>) -> Result<Var> {
    linears(tape, x, [(weight, bias)]).map(|[y]| y)
}

/// Records y_i = x W_i^T + b_i for several maps of one input: for one token they are one pass over
/// all weights, and the gradient of x is written once.
///
/// # Errors
/// When the inner dimensions differ, or there are more maps than an operation takes.
pub fn linears<const N: usize>(tape: &mut Tape, x: Var, maps: [(Var, Option<Var>); N]) -> Result<[Var; N]> {
    const { assert!(0 < N && N <= MAX_MAPS) };
    let parameters = maps.iter().flat_map(|&(weight, bias)| [Some(weight), bias]);
    let inputs: Vec<Option<Var>> = [Some(x)].into_iter().chain(parameters).collect();
    let outputs = tape.record(Linear { maps: N }, &inputs, &[])?;
    Ok(std::array::from_fn(|i| outputs[i]))
}

/// Rows from which it is worth while on a GPU to queue products on two streams.
#[cfg(feature = "cuda")]
const APART: usize = 1024;

/// Where input W_i is.
const fn weight_of(map: usize) -> usize {
    1 + 2 * map
}

/// Where input b_i is.
const fn bias_of(map: usize) -> usize {
    2 + 2 * map
}

impl Linear {
    /// The inputs that are weights.
    fn weight_slots(&self) -> u32 {
        (0..self.maps).fold(0, |set, map| set | 1 << weight_of(map))
    }
}

impl Kernel for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        (0..self.maps)
            .map(|map| {
                let (Some(x), Some(w)) = (inputs[0], inputs[weight_of(map)]) else {
                    return Err(Error::shape("x and W are needed"));
                };
                if x.last() != w.last() {
                    let what = format!("x {x:?} and W {w:?} differ in their last dimension");
                    return Err(Error::shape(what));
                }
                Ok(x.with_last(w.rows()))
            })
            .collect()
    }

    fn reads(&self) -> Slots {
        Slots { inputs: 1 | self.weight_slots(), outputs: 0 }
    }

    fn full_precision(&self) -> Slots {
        Slots { inputs: self.weight_slots() << 1, outputs: 0 }
    }

    fn weights(&self) -> u32 {
        self.weight_slots()
    }

    fn storable(&self, slot: usize) -> Storable {
        if slot % 2 == 1 { Storable::Quantized } else { Storable::Wide }
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (rows, inner) = (io.shapes.input(0).rows(), io.shapes.input(0).last());
        let mut maps = Vec::with_capacity(self.maps);
        for map in 0..self.maps {
            let (y, outer) = (io.output(map), io.shapes.outputs[map].last());
            let bias = io.inputs[bias_of(map)];
            if let Some(bias) = bias {
                y.par_chunks_mut(outer * TILE).for_each(|tile| {
                    tile.chunks_mut(outer).for_each(|row| row.copy_from_slice(bias));
                });
            }
            maps.push(Projection { y, w: io.weight(weight_of(map)), outer, accumulate: bias.is_some() });
        }
        project(&mut maps, io.input(0), [rows, inner], [0, inner], io.precision, io.scratch);
    }

    /// dx += Σ_i dy_i W_i, dW_i += dy_i^T x, db_i += sum over rows of dy_i.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let (rows, inner) = (io.shapes.input(0).rows(), io.shapes.input(0).last());
        let mut dx = io.input_gradient(0).map(Gradient::into_parts);
        for map in 0..self.maps {
            let Some(gradient) = io.output_gradients[map] else { continue };
            let outer = io.shapes.outputs[map].last();
            let dy = MatRef::new(gradient, rows, outer);
            if let Some((dx, accumulate)) = &mut dx {
                let w = MatRef::new(io.input(weight_of(map)), outer, inner);
                product_in(io.precision, MatMut::new(dx, rows, inner), dy, w, *accumulate);
                *accumulate = true;
            }
            if let Some(dw) = io.input_gradient(weight_of(map)) {
                let x = MatRef::new(io.input(0), rows, inner);
                let (dw, accumulate) = dw.into_parts();
                product_in(io.precision, MatMut::new(dw, outer, inner), dy.t(), x, accumulate);
            }
            if let Some(db) = io.input_gradient(bias_of(map)) {
                sum_rows(gradient, outer, db.cleared(), io.scratch);
            }
        }
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots { inputs: (1 << weight_of(self.maps)) - 1, outputs: 0 }
    }

    #[cfg(feature = "cuda")]
    fn multiplies(&self) -> bool {
        true
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let (rows, inner) = (io.shapes.input(0).rows(), io.shapes.input(0).last());
        let maps: Vec<Map> = (0..self.maps)
            .map(|map| Map {
                weight: io.input(weight_of(map)),
                bias: io.inputs[bias_of(map)],
                y: io.outputs[map],
                outer: io.shapes.outputs[map].last(),
                full: false,
                cap: None,
            })
            .collect();
        if io.queue.few_rows(io.next, io.input(0), [rows, inner], &maps)? {
            return Ok(());
        }
        for map in 0..self.maps {
            let (y, outer) = (io.outputs[map], io.shapes.outputs[map].last());
            let bias = io.inputs[bias_of(map)];
            if let Some(bias) = bias {
                io.queue.fill_rows(bias, y, false, rows, outer)?;
            }
            io.queue.product(&Product {
                size: [rows, outer, inner],
                a: Operand::new(io.input(0), inner),
                b: Operand::new(io.input(weight_of(map)), inner).t(),
                c: Operand::new(y, outer),
                batch: 1,
                accumulate: bias.is_some(),
            })?;
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let (rows, inner) = (io.shapes.input(0).rows(), io.shapes.input(0).last());
        // The products for dW beside those for dx: neither leaves the GPU full to its end.
        let apart = rows >= APART && io.input_gradients[0].is_some();
        if apart {
            io.queue.fork()?;
        }
        for map in 0..self.maps {
            let outer = io.shapes.outputs[map].last();
            let Some(gradient) = io.output_gradients[map] else {
                self.clear_fresh(io, map, [outer, inner])?;
                continue;
            };
            let dy = Operand::new(gradient, outer);
            let first = io.output_gradients[..map].iter().all(Option::is_none);
            if let Some(dx) = io.input_gradients[0] {
                io.queue.product(&Product {
                    size: [rows, inner, outer],
                    a: dy,
                    b: Operand::new(io.input(weight_of(map)), inner),
                    c: Operand::new(dx, inner),
                    batch: 1,
                    accumulate: !(first && io.is_fresh(0)),
                })?;
            }
            if let Some(dw) = io.input_gradients[weight_of(map)] {
                let product = Product {
                    size: [outer, inner, rows],
                    a: dy.t(),
                    b: Operand::new(io.input(0), inner),
                    c: Operand::new(dw, inner).full(),
                    batch: 1,
                    accumulate: !io.is_fresh(weight_of(map)),
                };
                if apart {
                    io.queue.product_aside(&product)?;
                } else {
                    io.queue.product(&product)?;
                }
            }
            if let Some(db) = io.input_gradients[bias_of(map)] {
                let fresh = io.is_fresh(bias_of(map));
                io.queue.give_rows(gradient, false, [rows, outer], (db, fresh))?;
            }
        }
        if apart { io.queue.join() } else { Ok(()) }
    }
}

#[cfg(feature = "cuda")]
impl Linear {
    /// The parameters' gradients of a map that nobody reads.
    fn clear_fresh(&self, io: &CudaBackward<'_>, map: usize, [outer, inner]: [usize; 2]) -> Result<()> {
        for (slot, n) in [(weight_of(map), outer * inner), (bias_of(map), outer)] {
            if let Some(gradient) = io.input_gradients[slot].filter(|_| io.is_fresh(slot)) {
                io.queue.zero(gradient, n)?;
            }
        }
        Ok(())
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
    use crate::engine::{Executor, Mode};
    use crate::ops::check::Check;

    #[test]
    fn gradients() {
        Check::new()
            .input([3, 7, 5])
            .input([4, 5])
            .input([4])
            .run(|tape, v, _| Ok(vec![linear(tape, v[0], v[1], Some(v[2]))?]));
        Check::new().input([2, 6]).input([3, 6]).run(|tape, v, _| Ok(vec![linear(tape, v[0], v[1], None)?]));
        Check::new().input([3, 4, 6]).input([5, 6]).input([2, 6]).input([2]).input([1, 6]).run(
            |tape, v, _| Ok(linears(tape, v[0], [(v[1], None), (v[2], Some(v[3])), (v[4], None)])?.to_vec()),
        );
    }

    /// Rows of one parameter, in any order, get the gradients that they get as parameters.
    #[test]
    fn rows_of_one_parameter_are_different_inputs() {
        let number = |i: usize| (i * 7 % 11) as f64 - 5.0;
        let run = |values: &[Vec<f64>], places: [(usize, usize); 2]| {
            let mut tape = Tape::new(Mode::Train);
            let x = tape.input([4, 3]);
            let maps = places.map(|(index, row)| (tape.parameter(index, row * 3, [2, 3].into()), None));
            let outputs = linears(&mut tape, x, maps).unwrap();
            for y in outputs {
                tape.keep(y);
                tape.seed_gradient(y);
            }
            let mut executor = Executor::<f64>::new(tape);
            executor.input_mut(x).iter_mut().enumerate().for_each(|(i, x)| *x = number(i));
            for (n, y) in outputs.into_iter().enumerate() {
                executor.seed_mut(y).iter_mut().enumerate().for_each(|(i, dy)| *dy = number(i + 3 * n));
            }
            let mut gradients: Vec<Vec<f64>> = values.iter().map(|v| vec![0.5; v.len()]).collect();
            executor.forward(values);
            executor.backward(values, &mut gradients);
            (outputs.map(|y| executor.value(y).to_vec()), gradients)
        };
        let rows: Vec<f64> = (0..15).map(|i| number(i + 2)).collect();
        let alone = [rows[9..].to_vec(), rows[..6].to_vec()];
        let (outputs, gradients) = run(&[rows], [(0, 3), (0, 0)]);
        let (expected, apart) = run(&alone, [(0, 0), (1, 0)]);
        assert_eq!(outputs, expected);
        assert_eq!((&gradients[0][9..], &gradients[0][..6]), (&apart[0][..], &apart[1][..]));
        // What lies between belongs to nobody.
        assert_eq!(gradients[0][6..9], [0.5; 3]);

        let mut tape = Tape::new(Mode::Train);
        let x = tape.input([4, 3]);
        let maps = [0, 1].map(|row| (tape.parameter(0, row * 3, [2, 3].into()), None));
        assert!(linears(&mut tape, x, maps).is_err(), "they overlap");
    }
}
