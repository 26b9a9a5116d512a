//! y = (h + s ∘ x) ∘ SiLU(z): the learnable skip and the output gate of the mLSTM block.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::vectorize;
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::activation::Activation::Swish;
use crate::ops::linear::reduce_tiles;
use crate::ops::{TILE, gradient_tiles};

/// h (…, E), s (E), x (…, E), z (…, E) -> y (…, E).
#[derive(Debug)]
struct SkipGate;

/// Records (h + skip ∘ x) ∘ SiLU(z); h, x and z are three different values.
///
/// # Errors
/// When h, x and z differ in shape, or the skip is not as long as a row.
pub fn skip_gate(tape: &mut Tape, h: Var, skip: Var, x: Var, z: Var) -> Result<Var> {
    Ok(tape.record(SkipGate, &[Some(h), Some(skip), Some(x), Some(z)], &[])?[0])
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("skip_gate", include_str!("skip_gate.cu"));

/// Rows that a thread goes over on a GPU: ROWS of skip_gate.cu.
#[cfg(feature = "cuda")]
const CUDA_ROWS: usize = 32;

impl Kernel for SkipGate {
    fn name(&self) -> &'static str {
        "skip_gate"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let [Some(h), Some(skip), Some(x), Some(z)] = *inputs else {
            return Err(Error::shape("h, skip, x and z are needed"));
        };
        if h != x || h != z || skip.len() != h.last() {
            return Err(Error::shape(format!("h {h:?}, skip {skip:?}, x {x:?} and z {z:?} do not fit")));
        }
        Ok(vec![h])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[0, 1, 2, 3], &[])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[1], &[])
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::of(&[0, 1, 2, 3], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let y = io.output(0);
        let skip = io.input(1);
        let (width, tile) = (skip.len(), skip.len() * TILE);
        let inputs = io.input(0).par_chunks(tile).zip(io.input(2).par_chunks(tile));
        let inputs = inputs.zip(io.input(3).par_chunks(tile));
        y.par_chunks_mut(tile).zip(inputs).for_each(|(y, ((h, x), z))| {
            vectorize!(|| {
                let rows = h.chunks_exact(width).zip(x.chunks_exact(width)).zip(z.chunks_exact(width));
                for (y, ((h, x), z)) in y.chunks_exact_mut(width).zip(rows) {
                    let row = h.iter().zip(x).zip(skip).zip(z);
                    for (y, (((h, x), s), z)) in y.iter_mut().zip(row) {
                        *y = s.mul_add(*x, *h) * Swish.value(*z);
                    }
                }
            });
        });
    }

    /// With a = dy ∘ SiLU(z): dh += a, dx += a ∘ s, ds += sum over rows of a ∘ x, and
    /// dz += dy ∘ (h + s ∘ x) ∘ SiLU'(z).
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let (dy, h, skip, x, z) = (io.gradient(), io.input(0), io.input(1), io.input(2), io.input(3));
        let (width, tile) = (skip.len(), skip.len() * TILE);
        let count = dy.len().div_ceil(tile);
        let dh = gradient_tiles(io.input_gradient(0), tile, count);
        let dx = gradient_tiles(io.input_gradient(2), tile, count);
        let dz = gradient_tiles(io.input_gradient(3), tile, count);
        let given =
            dy.par_chunks(tile).zip(h.par_chunks(tile)).zip(x.par_chunks(tile).zip(z.par_chunks(tile)));
        dh.zip(dx).zip(dz).zip(given).for_each(|(((mut dh, mut dx), mut dz), ((dy, h), (x, z)))| {
            vectorize!(|| {
                for start in (0..dy.len()).step_by(width) {
                    for column in (0..width).step_by(BLOCK) {
                        let n = BLOCK.min(width - column);
                        let at = start + column..start + column + n;
                        let (dy, skip) = (&dy[at.clone()], &skip[column..][..n]);
                        let (mut a, mut b) = ([T::ZERO; BLOCK], [T::ZERO; BLOCK]);
                        for (((a, b), dy), z) in a.iter_mut().zip(&mut b).zip(dy).zip(&z[at.clone()]) {
                            let (value, slope) = Swish.value_and_derivative(*z);
                            (*a, *b) = (*dy * value, *dy * slope);
                        }
                        if let Some(dh) = &mut dh {
                            for (dh, a) in dh[at.clone()].iter_mut().zip(&a) {
                                *dh += *a;
                            }
                        }
                        if let Some(dx) = &mut dx {
                            for (dx, (a, s)) in dx[at.clone()].iter_mut().zip(a.iter().zip(skip)) {
                                *dx = a.mul_add(*s, *dx);
                            }
                        }
                        if let Some(dz) = &mut dz {
                            let row = b.iter().zip(skip).zip(h[at.clone()].iter().zip(&x[at.clone()]));
                            for (dz, ((b, s), (h, x))) in dz[at].iter_mut().zip(row) {
                                *dz = b.mul_add(s.mul_add(*x, *h), *dz);
                            }
                        }
                    }
                }
            });
        });
        if let Some(ds) = io.input_gradient(1) {
            reduce_tiles(
                dy.len() / width,
                width,
                ds.cleared(),
                io.scratch,
                #[inline(always)]
                |rows, partial| {
                    let at = rows.start * width..rows.end * width;
                    let rows = x[at.clone()].chunks_exact(width).zip(z[at.clone()].chunks_exact(width));
                    for (dy, (x, z)) in dy[at].chunks_exact(width).zip(rows) {
                        for (ds, (dy, (x, z))) in partial.iter_mut().zip(dy.iter().zip(x.iter().zip(z))) {
                            *ds = (*dy * *x).mul_add(Swish.value(*z), *ds);
                        }
                    }
                },
            );
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let (rows, width) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        let [h, skip, x, z, ..] = io.inputs;
        let arguments = arguments![h, skip, x, z, io.outputs[0], rows, width];
        io.queue.launch_columns(&SOURCE, "skip_gate_forward", [rows, width], CUDA_ROWS, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let (rows, width) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        let ([h, skip, x, z, ..], [dh, dskip, dx, dz, ..]) = (io.inputs, io.input_gradients);
        let fresh = [0, 2, 3].iter().fold(0, |bits, &slot| bits | u32::from(io.is_fresh(slot)) << slot);
        let tiles = rows.div_ceil(CUDA_ROWS);
        let parts = dskip.map(|_| io.queue.scratch(tiles * width)).transpose()?;
        let arguments = arguments![io.gradient(), h, skip, x, z, dh, dx, dz, parts, rows, width, fresh];
        io.queue.launch_columns(&SOURCE, "skip_gate_backward", [rows, width], CUDA_ROWS, arguments)?;
        match (dskip, parts) {
            (Some(dskip), Some(parts)) => io.queue.give_parts(parts, tiles, width, (dskip, io.is_fresh(1))),
            _ => Ok(()),
        }
    }
}

/// Columns for which dy ∘ SiLU(z) and dy ∘ SiLU'(z) are held while the gradients take
/// their shares.
const BLOCK: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::Check;

    #[test]
    fn gradients() {
        for width in [5, 70] {
            Check::new()
                .input([2, 35, width])
                .input([width])
                .input([2, 35, width])
                .input([2, 35, width])
                .run(|tape, v, _| Ok(vec![skip_gate(tape, v[0], v[1], v[2], v[3])?]));
        }
    }

    #[test]
    fn gradients_of_some_inputs() {
        Check::new().input([3, 5]).input([5]).run(|tape, v, _| {
            let (a, b) = (tape.input([3, 5]), tape.input([3, 5]));
            Ok(vec![
                skip_gate(tape, v[0], v[1], a, b)?,
                skip_gate(tape, a, v[1], v[0], b)?,
                skip_gate(tape, a, v[1], b, v[0])?,
            ])
        });
    }
}
