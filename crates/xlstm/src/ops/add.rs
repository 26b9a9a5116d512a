//! y = a + b: the residual connection.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::{add_to, vectorize};
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::TILE;

/// a (…), b (…) -> y (…), all of one shape.
#[derive(Debug)]
struct Add;

/// Records a + b, two different values of one shape.
///
/// # Errors
/// When the shapes differ.
pub fn add(tape: &mut Tape, a: Var, b: Var) -> Result<Var> {
    Ok(tape.record(Add, &[Some(a), Some(b)], &[])?[0])
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("add", include_str!("add.cu"));

impl Kernel for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        match (inputs[0], inputs[1]) {
            (Some(a), Some(b)) if a == b => Ok(vec![a]),
            (a, b) => Err(Error::shape(format!("a {a:?} and b {b:?} are not of one shape"))),
        }
    }

    fn reads(&self) -> Slots {
        Slots::of(&[], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let tile = (TILE * io.shapes.outputs[0].last()).max(1);
        let y = io.output(0);
        let (a, b) = (io.input(0).par_chunks(tile), io.input(1).par_chunks(tile));
        y.par_chunks_mut(tile).zip(a.zip(b)).for_each(|(y, (a, b))| {
            vectorize!(|| {
                for (y, (a, b)) in y.iter_mut().zip(a.iter().zip(b)) {
                    *y = *a + *b;
                }
            });
        });
    }

    /// da += dy, db += dy.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let tile = (TILE * io.shapes.outputs[0].last()).max(1);
        let dy = io.gradient();
        for input in 0..2 {
            let Some(dx) = io.input_gradient(input) else { continue };
            dx.tiles(tile).zip(dy.par_chunks(tile)).for_each(|(dx, dy)| {
                vectorize!(|| add_to(dy, dx));
            });
        }
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::of(&[0, 1], &[])
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let n = io.shapes.outputs[0].len();
        let arguments = arguments![io.input(0), io.input(1), io.outputs[0], n as u64];
        io.queue.launch_wide(&SOURCE, "add_forward", n, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let n = io.shapes.outputs[0].len();
        for input in 0..2 {
            let Some(dx) = io.input_gradients[input] else { continue };
            let arguments = arguments![io.gradient(), dx, n as u64, u32::from(io.is_fresh(input))];
            io.queue.launch_wide(&SOURCE, "add_backward", n, arguments)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Mode;
    use crate::ops::check::Check;

    #[test]
    fn gradients() {
        Check::new().input([3, 37, 5]).input([3, 37, 5]).run(|tape, v, _| Ok(vec![add(tape, v[0], v[1])?]));
    }

    #[test]
    fn shapes_that_differ_are_named() {
        let mut tape = Tape::new(Mode::Train);
        let (a, b) = (tape.input([2, 3]), tape.input([3, 2]));
        let message = add(&mut tape, a, b).unwrap_err().to_string();
        assert!(message.contains("[2, 3]") && message.contains("[3, 2]"), "{message}");
    }
}
