//! y = x + the row of the weight that each token's position names.
//!
//! Positions are the tape's own numbers (see `positions`), not ids from outside.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments, launch::WIDE};
use crate::engine::matrix::MatMut;
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::{add_to, vectorize};
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::TILE;
use crate::ops::embedding::column_block;
use crate::ops::positions::whole;

/// x (B, S, D), weight (P, D), position (B, S) -> y (B, S, D).
#[derive(Debug)]
struct LearnedPositions;

/// Records x plus the row of the weight at each position.
///
/// Whoever runs the tape refuses documents of more than P tokens; a position beyond the last
/// row, which a pad after a document of P tokens has, reads the last row.
///
/// # Errors
/// When shapes do not fit.
pub fn learned_positions(tape: &mut Tape, x: Var, weight: Var, position: Var) -> Result<Var> {
    Ok(tape.record(LearnedPositions, &[Some(x), Some(weight), Some(position)], &[])?[0])
}

/// The row of a position.
#[inline(always)]
fn row_of<T: Scalar>(position: T, rows: usize) -> usize {
    whole(position).unsigned_abs().min(rows - 1)
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("learned_positions", include_str!("learned_positions.cu"));

/// Tokens that a thread goes over on a GPU: ROWS of learned_positions.cu.
#[cfg(feature = "cuda")]
const CUDA_ROWS: usize = 8;

impl Kernel for LearnedPositions {
    fn name(&self) -> &'static str {
        "learned_positions"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let (Some(x), Some(w), Some(position)) = (inputs[0], inputs[1], inputs[2]) else {
            return Err(Error::shape("x, w and positions are needed"));
        };
        let fits = x.dims().len() == 3
            && w.dims().len() == 2
            && w.last() == x.last()
            && w.len() > 0
            && position.dims() == &x.dims()[..2];
        if !fits {
            return Err(Error::shape(format!("x {x:?}, w {w:?} and positions {position:?} do not fit")));
        }
        Ok(vec![x])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[2], &[])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[1, 2], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (y, x, w, position) = (io.output(0), io.input(0), io.input(1), io.input(2));
        let (rows, width) = (io.shapes.input(1).rows(), io.shapes.input(1).last());
        let given = x.par_chunks(width * TILE).zip(position.par_chunks(TILE));
        y.par_chunks_mut(width * TILE).zip(given).for_each(|(y, (x, position))| {
            vectorize!(|| {
                let tokens = y.chunks_exact_mut(width).zip(x.chunks_exact(width));
                for ((y, x), position) in tokens.zip(position) {
                    let w = &w[row_of(*position, rows) * width..][..width];
                    for (y, (x, w)) in y.iter_mut().zip(x.iter().zip(w)) {
                        *y = *x + *w;
                    }
                }
            });
        });
    }

    /// dx += dy; dW[position] += dy, tokens in order, one task a block of columns.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let (dy, position) = (io.gradient(), io.input(2));
        let (rows, width) = (io.shapes.input(1).rows(), io.shapes.input(1).last());
        if let Some(dx) = io.input_gradient(0) {
            dx.tiles(width * TILE).zip(dy.par_chunks(width * TILE)).for_each(|(dx, dy)| {
                vectorize!(|| add_to(dy, dx));
            });
        }
        if let Some(dw) = io.input_gradient(1) {
            let block = column_block(width, 64);
            let blocks = MatMut::new(dw.cleared(), rows, width).blocks(rows, block);
            blocks.into_par_iter().enumerate().for_each(|(i, mut dw)| {
                vectorize!(|| {
                    for (dy, position) in dy.chunks_exact(width).zip(position) {
                        add_to(&dy[i * block..][..block], dw.row(row_of(*position, rows)));
                    }
                });
            });
        }
        if let Some(position) = io.input_gradient(2) {
            position.cleared();
        }
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::of(&[0, 1], &[])
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let tokens = io.shapes.input(0).rows();
        let (rows, width) = (io.shapes.input(1).rows(), io.shapes.input(1).last());
        let arguments = arguments![io.input(0), io.input(1), io.input(2), io.outputs[0], tokens, rows, width];
        let size = [tokens, width];
        io.queue.launch_columns(&SOURCE, "learned_positions_forward", size, CUDA_ROWS, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let (n, dy) = (io.shapes.outputs[0].len(), io.gradient());
        let (rows, width) = (io.shapes.input(1).rows(), io.shapes.input(1).last());
        let [dx_fresh, dw_fresh] = [0, 1].map(|slot| u32::from(io.is_fresh(slot)));
        if let Some(dx) = io.input_gradients[0] {
            let arguments = arguments![dy, dx, n as u64, dx_fresh];
            io.queue.launch_wide(&SOURCE, "learned_positions_dx", n, arguments)?;
        }
        let Some(dw) = io.input_gradients[1] else { return Ok(()) };
        let arguments = arguments![dy, io.input(2), dw, n / width, rows, width, dw_fresh];
        let grid = [rows, width.div_ceil(256 * WIDE), 1];
        io.queue.launch(&SOURCE, "learned_positions_dw", grid, 256, arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Mode;
    use crate::ops::check::Check;

    #[test]
    fn gradients() {
        for width in [3, 64] {
            Check::new()
                .input([2, 35, width])
                .input([9, width])
                .input_of([2, 35], (0..70).map(|i| f64::from(i * 7 % 10)).collect())
                .run(|tape, v, _| Ok(vec![learned_positions(tape, v[0], v[1], v[2])?]));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut tape = Tape::new(Mode::Train);
        let (x, w, position) = (tape.input([2, 3, 4]), tape.input([5, 3]), tape.input([2, 3]));
        let message = learned_positions(&mut tape, x, w, position).unwrap_err().to_string();
        assert!(message.contains("[2, 3, 4]") && message.contains("[5, 3]"), "{message}");
    }
}
