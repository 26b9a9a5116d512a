//! y = the mean over the tokens of every sequence, those before this batch included.
//!
//! ```text
//! sum' = sum + Σ x_t,  count' = count + Σ 1   over tokens that are no pads; a reset clears both
//! y = sum' / count', or 0 where there is no token
//! ```

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Ids, Tape, Var};
use crate::engine::vector::{add_to, vectorize};
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::marks::{PAD, RESET};

/// x (batch, length, features), optional sum (batch, features) and count (batch, 1) before it,
/// optional marks (batch length) -> y (batch, 1, features), and sum and count after it.
#[derive(Debug)]
struct MeanTokens {
    marked: bool,
}

/// What [`mean_tokens`] gives.
#[derive(Clone, Copy, Debug)]
pub struct Mean {
    /// y (batch, 1, features).
    pub mean: Var,
    /// Sum (batch, features) and count (batch, 1) after the tokens.
    pub state: [Var; 2],
}

/// Records the mean over all tokens since the last reset; `state` is their sum and count before x,
/// none where nothing is before it.
///
/// # Errors
/// When shapes do not fit together, or x has no token.
pub fn mean_tokens(tape: &mut Tape, x: Var, state: Option<[Var; 2]>, marks: Option<Ids>) -> Result<Mean> {
    let operation = MeanTokens { marked: marks.is_some() };
    let ids: Vec<Ids> = marks.into_iter().collect();
    let inputs = [Some(x), state.map(|[sum, _]| sum), state.map(|[_, count]| count)];
    let outputs = tape.record(operation, &inputs, &ids)?;
    Ok(Mean { mean: outputs[0], state: [outputs[1], outputs[2]] })
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("mean_tokens", include_str!("mean_tokens.cu"));

impl MeanTokens {
    /// From where on the tokens of a sequence count, and whether what was before it counts too.
    fn start(marks: &[u32]) -> (usize, bool) {
        let begins = |mark: &u32| mark & PAD == 0 && mark & RESET != 0;
        marks.iter().rposition(begins).map_or((0, true), |t| (t, false))
    }

    /// The marks of sequence b, if there are any.
    fn marks<'a>(&self, ids: &[&'a [u32]; 3], b: usize, length: usize) -> &'a [u32] {
        if self.marked { &ids[0][b * length..][..length] } else { &[] }
    }
}

/// The rows of a sequence that count, by their places.
fn counting(marks: &[u32], first: usize, length: usize) -> impl Iterator<Item = usize> {
    (first..length).filter(|&t| marks.get(t).is_none_or(|mark| mark & PAD == 0))
}

impl Kernel for MeanTokens {
    fn name(&self) -> &'static str {
        "mean_tokens"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let x = inputs[0].as_ref().map(Shape::dims);
        let Some(&[batch, length, features]) = x.filter(|x| x.len() == 3 && x[1] > 0) else {
            return Err(Error::shape(format!("x is (batch, at least one token, features), not {x:?}")));
        };
        let state = [Shape::from([batch, features]), Shape::from([batch, 1])];
        if inputs[1..].iter().zip(&state).any(|(given, shape)| given.is_some_and(|given| given != *shape)) {
            return Err(Error::shape(format!(
                "sum and count before x [{batch}, {length}, {features}] are {state:?}, not {:?}",
                &inputs[1..]
            )));
        }
        Ok(vec![[batch, 1, features].into(), state[0], state[1]])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[], &[1, 2])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[1, 2], &[1, 2])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (y, sum, count) = (io.output(0), io.output(1), io.output(2));
        let shape = io.shapes.input(0);
        let (length, width) = (shape.dims()[1], shape.last());
        let (x, before, ids) = (io.input(0), [io.inputs[1], io.inputs[2]], io.ids);
        let outputs = y.par_chunks_mut(width).zip(sum.par_chunks_mut(width)).zip(count);
        outputs.enumerate().for_each(|(b, ((y, sum), count))| {
            let marks = self.marks(&ids, b, length);
            let (first, goes_on) = Self::start(marks);
            let [before, tokens] = before.map(|before| before.filter(|_| goes_on));
            match before {
                Some(before) => sum.copy_from_slice(&before[b * width..][..width]),
                None => sum.fill(T::ZERO),
            }
            *count = tokens.map_or(T::ZERO, |tokens| tokens[b]);
            for t in counting(marks, first, length) {
                vectorize!(|| add_to(&x[(b * length + t) * width..][..width], sum));
                *count += T::ONE;
            }
            let share = share(*count);
            y.iter_mut().zip(sum.iter()).for_each(|(y, sum)| *y = *sum * share);
        });
    }

    /// With g = dsum' + dy / count': dx_t += g, dsum += g, dcount += dcount' - Σ dy sum' / count'².
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let shape = io.shapes.input(0);
        let (length, width) = (shape.dims()[1], shape.last());
        let (sum, count, ids) = (io.output(1), io.output(2), io.ids);
        let [dy, dsum, dcount, ..] = io.output_gradients;
        let gradient = |b: usize, i: usize| {
            let of_sum = dsum.map_or(T::ZERO, |dsum| dsum[b * width + i]);
            of_sum + dy.map_or(T::ZERO, |dy| dy[b * width + i]) * share(count[b])
        };
        if let Some(dx) = io.input_gradient(0) {
            dx.tiles(length * width).enumerate().for_each(|(b, dx)| {
                let marks = self.marks(&ids, b, length);
                let (first, _) = Self::start(marks);
                for t in counting(marks, first, length) {
                    dx[t * width..][..width].iter_mut().enumerate().for_each(|(i, dx)| *dx += gradient(b, i));
                }
            });
        }
        let goes_on = |b: usize| Self::start(self.marks(&ids, b, length)).1;
        if let Some(to) = io.input_gradient(1) {
            to.tiles(width).enumerate().filter(|(b, _)| goes_on(*b)).for_each(|(b, to)| {
                to.iter_mut().enumerate().for_each(|(i, to)| *to += gradient(b, i));
            });
        }
        if let Some(to) = io.input_gradient(2) {
            for (b, to) in to.cleared().iter_mut().enumerate().filter(|(b, _)| goes_on(*b)) {
                let row = b * width..(b + 1) * width;
                let product = dy.map_or(T::ZERO, |dy| {
                    dy[row.clone()].iter().zip(&sum[row]).fold(T::ZERO, |total, (dy, x)| total + *dy * *x)
                });
                *to += dcount.map_or(T::ZERO, |d| d[b]) - product * share(count[b]) * share(count[b]);
            }
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let [batch, length, width] = *io.shapes.input(0).dims() else { return Ok(()) };
        let [y, sum, count, ..] = io.outputs;
        let marks = self.marked.then_some(io.ids[0]);
        let arguments =
            arguments![io.input(0), io.inputs[1], io.inputs[2], marks, y, sum, count, length, width];
        io.queue.launch(&SOURCE, "mean_tokens_forward", [width.div_ceil(128), batch, 1], 128, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let [batch, length, width] = *io.shapes.input(0).dims() else { return Ok(()) };
        let ([_, sum, count, ..], [dy, dsum, dcount, ..]) = (io.outputs, io.output_gradients);
        let marks = self.marked.then_some(io.ids[0]);
        let [dx, to_sum, to_count, ..] = io.input_gradients;
        if dx.is_some() || to_sum.is_some() {
            let arguments = arguments![dy, dsum, count, marks, dx, to_sum, length, width];
            let grid = [width.div_ceil(128), batch, 1];
            io.queue.launch(&SOURCE, "mean_tokens_backward", grid, 128, arguments)?;
        }
        let Some(to_count) = to_count else { return Ok(()) };
        let arguments = arguments![dy, dcount, sum, count, marks, to_count, length, width];
        io.queue.launch(&SOURCE, "mean_tokens_count", [batch, 1, 1], 32, arguments)
    }
}

/// 1 / count, or 0 where nothing is counted.
fn share<T: Scalar>(count: T) -> T {
    if count > T::ZERO { T::ONE / count } else { T::ZERO }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Executor, Mode};
    use crate::ops::check::Check;

    #[test]
    fn gradients() {
        Check::new().input([3, 4, 5]).run(|tape, v, _| Ok(vec![mean_tokens(tape, v[0], None, None)?.mean]));
        Check::new()
            .input([3, 3, 5])
            .input([3, 5])
            .input_of([3, 1], vec![2.0, 7.0, 1.5])
            .ids(&[0, RESET, PAD | RESET, PAD, 0, PAD, PAD, PAD, PAD])
            .run(|tape, v, ids| {
                let Mean { mean, state } = mean_tokens(tape, v[0], Some([v[1], v[2]]), Some(ids[0]))?;
                Ok(vec![mean, state[0], state[1]])
            });
    }

    /// A reset forgets, a pad is not there, and what was before counts.
    #[test]
    fn what_counts() {
        let mut tape = Tape::new(Mode::Evaluate);
        let (x, marks) = (tape.input([4, 3, 1]), tape.ids(12));
        let state = [tape.input([4, 1]), tape.input([4, 1])];
        let y = mean_tokens(&mut tape, x, Some(state), Some(marks)).unwrap().mean;
        tape.keep(y);
        let mut executor = Executor::<f64>::new(tape);
        executor.input_mut(x).copy_from_slice(&[1.0, 2.0, 4.0].repeat(4));
        executor.input_mut(state[0]).copy_from_slice(&[3.0, 3.0, 3.0, 0.0]);
        executor.input_mut(state[1]).copy_from_slice(&[1.0, 1.0, 1.0, 0.0]);
        let marks_of = [[0, 0, 0], [0, RESET, 0], [PAD, PAD | RESET, 0], [PAD, PAD, PAD]].concat();
        executor.ids_mut(marks).copy_from_slice(&marks_of);
        executor.forward(&[]);
        assert_eq!(executor.value(y), [2.5, 3.0, 3.5, 0.0]);
    }
}
