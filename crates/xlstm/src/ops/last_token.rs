//! y = the last token of every sequence: all that a prompt's logits need.

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::add_to;
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};

/// x (batch, length, features) -> y (batch, 1, features).
#[derive(Debug)]
struct LastToken;

/// Records the last token of every sequence of x.
///
/// # Errors
/// When x is not (batch, length, features) or has no token.
pub fn last_token(tape: &mut Tape, x: Var) -> Result<Var> {
    Ok(tape.record(LastToken, &[Some(x)], &[])?[0])
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("last_token", include_str!("last_token.cu"));

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
        let (width, sequence) = (x.last(), x.dims()[1] * x.last());
        let y = io.output(0).chunks_exact_mut(width);
        for (y, x) in y.zip(io.input(0).chunks_exact(sequence)) {
            y.copy_from_slice(&x[sequence - width..]);
        }
    }

    /// The last dx += dy.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let x = io.shapes.input(0);
        let (width, sequence) = (x.last(), x.dims()[1] * x.last());
        let Some(dx) = io.input_gradient(0) else { return };
        let dx = dx.cleared();
        for (dx, dy) in dx.chunks_exact_mut(sequence).zip(io.gradient().chunks_exact(width)) {
            add_to(dy, &mut dx[sequence - width..]);
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let (n, x) = (io.shapes.outputs[0].len(), io.shapes.input(0));
        let arguments = arguments![io.input(0), io.outputs[0], n as u64, x.dims()[1], x.last()];
        io.queue.launch_each(&SOURCE, "last_token_forward", n, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let Some(dx) = io.input_gradients[0] else { return Ok(()) };
        let (n, x) = (io.shapes.outputs[0].len(), io.shapes.input(0));
        let arguments = arguments![io.gradient(), dx, n as u64, x.dims()[1], x.last()];
        io.queue.launch_each(&SOURCE, "last_token_backward", n, arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::Check;

    #[test]
    fn gradients() {
        Check::new().input([3, 4, 5]).run(|tape, v, _| Ok(vec![last_token(tape, v[0])?]));
        Check::new().input([2, 1, 3]).run(|tape, v, _| Ok(vec![last_token(tape, v[0])?]));
    }
}
