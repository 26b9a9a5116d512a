//! y = the last token of every sequence: all that a prompt's logits need, and one way to pool.
//!
//! With marks it is the last that is not a pad, and zero where all are.

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Ids, Tape, Var};
use crate::engine::vector::add_to;
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::marks::PAD;

/// x (batch, length, features), optional marks (batch length) -> y (batch, 1, features).
#[derive(Debug)]
struct LastToken {
    marked: bool,
}

/// Records the last token of every sequence of x that its `marks` do not call a pad.
///
/// # Errors
/// When x is not (batch, length, features) or has no token.
pub fn last_token(tape: &mut Tape, x: Var, marks: Option<Ids>) -> Result<Var> {
    let operation = LastToken { marked: marks.is_some() };
    let ids: Vec<Ids> = marks.into_iter().collect();
    Ok(tape.record(operation, &[Some(x)], &ids)?[0])
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("last_token", include_str!("last_token.cu"));

impl LastToken {
    /// Where in sequence `b` its last token is, if it has one.
    fn place(&self, marks: &[u32], b: usize, length: usize) -> Option<usize> {
        match self.marked {
            true => marks[b * length..][..length].iter().rposition(|mark| mark & PAD == 0),
            false => Some(length - 1),
        }
    }
}

impl Kernel for LastToken {
    fn name(&self) -> &'static str {
        "last_token"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        match inputs[0].as_ref().map(Shape::dims) {
            Some(&[batch, length, features]) if length > 0 => Ok(vec![[batch, 1, features].into()]),
            x => Err(Error::shape(format!("x is (batch, at least one token, features), not {x:?}"))),
        }
    }

    fn reads(&self) -> Slots {
        Slots::of(&[], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let x = io.shapes.input(0);
        let (width, length) = (x.last(), x.dims()[1]);
        let y = io.output(0).chunks_exact_mut(width);
        for (b, (y, x)) in y.zip(io.input(0).chunks_exact(length * width)).enumerate() {
            match self.place(io.ids[0], b, length) {
                Some(t) => y.copy_from_slice(&x[t * width..][..width]),
                None => y.fill(T::ZERO),
            }
        }
    }

    /// The last dx += dy.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let x = io.shapes.input(0);
        let (width, length) = (x.last(), x.dims()[1]);
        let Some(dx) = io.input_gradient(0) else { return };
        let dx = dx.cleared().chunks_exact_mut(length * width);
        for (b, (dx, dy)) in dx.zip(io.gradient().chunks_exact(width)).enumerate() {
            if let Some(t) = self.place(io.ids[0], b, length) {
                add_to(dy, &mut dx[t * width..][..width]);
            }
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let (n, x) = (io.shapes.outputs[0].len(), io.shapes.input(0));
        let marks = self.marked.then_some(io.ids[0]);
        let arguments = arguments![io.input(0), marks, io.outputs[0], n as u64, x.dims()[1], x.last()];
        io.queue.launch_each(&SOURCE, "last_token_forward", n, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let Some(dx) = io.input_gradients[0] else { return Ok(()) };
        let (n, x) = (io.shapes.outputs[0].len(), io.shapes.input(0));
        let marks = self.marked.then_some(io.ids[0]);
        let arguments = arguments![io.gradient(), marks, dx, n as u64, x.dims()[1], x.last()];
        io.queue.launch_each(&SOURCE, "last_token_backward", n, arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Executor, Mode};
    use crate::marks::RESET;
    use crate::ops::check::Check;

    #[test]
    fn gradients() {
        Check::new().input([3, 4, 5]).run(|tape, v, _| Ok(vec![last_token(tape, v[0], None)?]));
        Check::new().input([2, 1, 3]).run(|tape, v, _| Ok(vec![last_token(tape, v[0], None)?]));
        Check::new()
            .input([4, 3, 5])
            .ids(&[0, 0, PAD, PAD, RESET, PAD | RESET, PAD, PAD, PAD, 0, PAD, 0])
            .run(|tape, v, ids| Ok(vec![last_token(tape, v[0], Some(ids[0]))?]));
    }

    #[test]
    fn pads_are_passed_over() {
        let mut tape = Tape::new(Mode::Evaluate);
        let (x, marks) = (tape.input([3, 3, 1]), tape.ids(9));
        let y = last_token(&mut tape, x, Some(marks)).unwrap();
        tape.keep(y);
        let mut executor = Executor::<f32>::new(tape);
        executor.input_mut(x).copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
        executor.ids_mut(marks).copy_from_slice(&[0, RESET, PAD, PAD, PAD, PAD, PAD, PAD, 0]);
        executor.forward(&[]);
        assert_eq!(executor.value(y), [2.0, 0.0, 9.0]);
    }
}
