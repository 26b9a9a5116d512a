//! y = x with the tokens of every document in reverse: what a pass from right to left reads, and,
//! since reversing twice changes nothing, how what it wrote is put back in order.
//!
//! A document runs from a reset to the next, or to the end of its row. Its tokens change places
//! among themselves, so that marks mean the same before and after; pads stay where they are.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments, launch::Queue};
#[cfg(feature = "cuda")]
use crate::engine::operation::NodeShapes;
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Ids, Tape, Var};
use crate::engine::vector::add_to;
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::{PAD, RESET};

/// x (batch, length, features) -> y, of the same shape.
#[derive(Debug)]
struct Reverse {
    marked: bool,
}

/// Records x (B, S, F) with the tokens of every document, as the marks (B S) have them, in
/// reverse; without marks a row is one document.
///
/// # Errors
/// When x is not (batch, length, features).
pub fn reverse(tape: &mut Tape, x: Var, marks: Option<Ids>) -> Result<Var> {
    Ok(tape.record(Reverse { marked: marks.is_some() }, &[Some(x)], marks.as_slice())?[0])
}

/// Where each token of a row of these marks goes.
fn places(marks: &[u32]) -> Vec<usize> {
    let mut places: Vec<usize> = (0..marks.len()).collect();
    let tokens: Vec<usize> = (0..marks.len()).filter(|&t| marks[t] & PAD == 0).collect();
    for document in tokens.chunk_by(|_, &next| marks[next] & RESET == 0) {
        for (&from, &to) in document.iter().zip(document.iter().rev()) {
            places[from] = to;
        }
    }
    places
}

impl Reverse {
    /// Calls `each` with every row of the batch in `to` and `from`, and where its tokens go.
    fn rows<T: Scalar>(
        &self,
        (shape, marks): (Shape, &[u32]),
        to: &mut [T],
        from: &[T],
        each: impl Fn(&[usize], &mut [T], &[T]) + Sync,
    ) {
        let (length, width) = (shape.dims()[1], shape.last());
        let row = (length * width).max(1);
        to.par_chunks_mut(row).zip(from.par_chunks(row)).enumerate().for_each(|(b, (to, from))| {
            let places = match self.marked {
                true => places(&marks[b * length..][..length]),
                false => (0..length).rev().collect(),
            };
            each(&places, to, from);
        });
    }
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("reverse", include_str!("reverse.cu"));

impl Kernel for Reverse {
    fn name(&self) -> &'static str {
        "reverse"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        match inputs[0] {
            Some(x) if x.dims().len() == 3 => Ok(vec![x]),
            x => Err(Error::shape(format!("x is (batch, length, features), not {x:?}"))),
        }
    }

    fn reads(&self) -> Slots {
        Slots::of(&[], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (shape, marks, y) = (io.shapes.input(0), io.ids[0], io.output(0));
        let width = shape.last();
        self.rows((shape, marks), y, io.input(0), |places, y, x| {
            for (x, &place) in x.chunks_exact(width).zip(places) {
                y[place * width..][..width].copy_from_slice(x);
            }
        });
    }

    /// dx at a token += dy where it went.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let Some(dx) = io.input_gradient(0) else { return };
        let (shape, marks) = (io.shapes.input(0), io.ids[0]);
        let width = shape.last();
        self.rows((shape, marks), dx.cleared(), io.gradient(), |places, dx, dy| {
            for (dx, &place) in dx.chunks_exact_mut(width).zip(places) {
                add_to(&dy[place * width..][..width], dx);
            }
        });
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let (x, y) = (io.input(0), io.outputs[0]);
        self.launch("reverse_forward", (x, y), io.ids[0], io.shapes, io.queue)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let Some(dx) = io.input_gradients[0] else { return Ok(()) };
        self.launch("reverse_backward", (io.gradient(), dx), io.ids[0], io.shapes, io.queue)
    }
}

#[cfg(feature = "cuda")]
impl Reverse {
    /// Where tokens go, a warp a row, and then the tokens themselves.
    fn launch(
        &self,
        name: &'static str,
        (from, to): (u64, u64),
        marks: u64,
        shapes: &NodeShapes,
        queue: &mut Queue,
    ) -> Result<()> {
        let shape = shapes.input(0);
        let &[batch, length, width] = shape.dims() else { return Ok(()) };
        let places = if self.marked {
            let (tokens, places) = (queue.scratch(batch * length)?, queue.scratch(batch * length)?);
            let arguments = arguments![marks, tokens, places, length];
            queue.launch(&SOURCE, "reverse_places", [batch, 1, 1], 32, arguments)?;
            Some(places)
        } else {
            None
        };
        let arguments = arguments![from, to, places, shape.len() as u64, length, width];
        queue.launch_each(&SOURCE, name, shape.len(), arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Mode;
    use crate::ops::check::Check;

    #[test]
    fn documents_turn_around_and_pads_stay() {
        let (r, p) = (RESET, PAD);
        assert_eq!(places(&[0, 0, 0, 0]), [3, 2, 1, 0]);
        // Pads before, within and after a document, one of them with a reset that counts for nothing.
        assert_eq!(places(&[p, 0, p | r, 0, 0, p]), [0, 4, 2, 3, 1, 5]);
        assert_eq!(places(&[r, 0, 0, r, r, 0]), [2, 1, 0, 3, 5, 4]);
        assert_eq!(places(&[0, p, r, 0, p, 0]), [0, 1, 5, 3, 4, 2]);
        assert_eq!(places(&[p, p]), [0, 1]);
    }

    #[test]
    fn gradients() {
        Check::new().input([3, 7, 5]).run(|tape, v, _| Ok(vec![reverse(tape, v[0], None)?]));
        let marks = [0, 0, PAD, RESET, 0, 0, 0, PAD, RESET, 0, 0, PAD | RESET, 0, PAD];
        Check::new()
            .input([2, 7, 5])
            .ids(&marks)
            .run(|tape, v, ids| Ok(vec![reverse(tape, v[0], Some(ids[0]))?]));
    }

    #[test]
    fn twice_is_nothing() {
        let marks: Vec<u32> = (0..40).map(|i| [0, RESET, 0, PAD, 0, 0, PAD | RESET][i * 5 % 7]).collect();
        let places = places(&marks);
        assert!((0..40).all(|t| places[places[t]] == t && (marks[t] & PAD == 0 || places[t] == t)));
    }

    #[test]
    fn other_shapes_are_refused() {
        let mut tape = Tape::new(Mode::Train);
        let x = tape.input([2, 3]);
        let message = reverse(&mut tape, x, None).unwrap_err().to_string();
        assert!(message.contains("[2, 3]"), "{message}");
    }
}
