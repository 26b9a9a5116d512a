//! Where each token stands in its document, and the first token that it may look at.
//!
//! What attention needs to know of marks, worked out once for all layers. A document may have
//! begun before this piece; of its tokens the last `window` are at hand, in a cache whose rows
//! are numbered -window..0, newest last. Tokens of the piece are numbered 0..S, pads included.
//!
//! Numbers are whole and stored as elements: exact up to 2^24 in f32.

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Ids, Tape, Var};
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::{PAD, RESET};

/// before (B), optional marks (B S) -> position (B, S), first (B, S), after (B).
#[derive(Debug)]
struct Positions {
    shape: [usize; 2],
    window: usize,
    marked: bool,
}

/// What [`positions`] finds out about a batch.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// (B, S): tokens of the document before each token. A pad has that of the next token.
    pub position: Var,
    /// (B, S): the number of the first token that each token sees, itself included among at
    /// most `window`; below 0 in the cache. A pad t has t + 1: it sees nothing.
    pub first: Var,
    /// (B): tokens of the document so far, after the last token.
    pub after: Var,
}

/// Records the places of a batch of `shape` = [B, S]. `before` (B) counts the tokens of the
/// document before the first token, none where absent; `marks` are bit sets of [`RESET`] and
/// [`PAD`].
///
/// # Errors
/// When there is no token or no window, or `before` is not one number a sequence.
pub fn positions(
    tape: &mut Tape,
    shape: [usize; 2],
    window: usize,
    before: Option<Var>,
    marks: Option<Ids>,
) -> Result<Places> {
    let operation = Positions { shape, window, marked: marks.is_some() };
    let out = tape.record(operation, &[before], marks.as_slice())?;
    Ok(Places { position: out[0], first: out[1], after: out[2] })
}

/// A whole number that an element holds.
#[inline(always)]
pub(crate) fn whole<T: Scalar>(x: T) -> isize {
    x.to_f64().round() as isize
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("positions", include_str!("positions.cu"));

impl Kernel for Positions {
    fn name(&self) -> &'static str {
        "positions"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let [batch, length] = self.shape;
        if batch == 0 || length == 0 || self.window == 0 {
            return Err(Error::shape(format!(
                "positions of {batch} sequences of {length} tokens with a window of {}",
                self.window
            )));
        }
        if let Some(before) = inputs[0]
            && before.dims() != [batch]
        {
            return Err(Error::shape(format!("the positions before are {before:?}, not [{batch}]")));
        }
        Ok(vec![[batch, length].into(), [batch, length].into(), [batch].into()])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[], &[])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[0], &[0, 1, 2])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (before, marks) = (io.inputs[0], self.marked.then_some(io.ids[0]));
        let (position, first, after) = (io.output(0), io.output(1), io.output(2));
        let length = self.shape[1];
        let number = |x: isize| T::from_f64(x as f64);
        let rows = position.chunks_exact_mut(length).zip(first.chunks_exact_mut(length)).zip(after);
        for (b, ((position, first), after)) in rows.enumerate() {
            let mark = |t: usize| marks.map_or(0, |marks| marks[b * length + t]);
            let mut seen = before.map_or(0, |before| whole(before[b]));
            // The first token that the next one sees, and how many it sees before itself.
            let mut visible = seen.min(self.window as isize - 1);
            let mut lowest = -visible;
            for t in 0..length {
                position[t] = number(seen);
                if mark(t) & PAD != 0 {
                    first[t] = number(t as isize + 1);
                    continue;
                }
                if mark(t) & RESET != 0 {
                    (seen, visible, lowest) = (0, 0, t as isize);
                    position[t] = T::ZERO;
                }
                // With nothing before it, the first it sees is itself, wherever pads lie.
                if visible == 0 {
                    lowest = t as isize;
                }
                first[t] = number(lowest);
                (seen, visible) = (seen + 1, visible + 1);
                if visible == self.window as isize {
                    visible -= 1;
                    lowest += 1;
                    while lowest >= 0 && lowest <= t as isize && mark(lowest as usize) & PAD != 0 {
                        lowest += 1;
                    }
                }
            }
            *after = number(seen);
        }
    }

    /// Whole numbers have no gradient.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        if let Some(before) = io.input_gradient(0) {
            before.cleared();
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let [batch, length] = self.shape;
        let marks = self.marked.then_some(io.ids[0]);
        let tokens = io.queue.scratch(batch * length)?;
        let [position, first, after, ..] = io.outputs;
        let arguments = arguments![io.inputs[0], marks, position, first, after, tokens, length, self.window];
        io.queue.launch(&SOURCE, "positions", [batch, 1, 1], 32, arguments)
    }

    /// Whole numbers have no gradient.
    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, _: &mut CudaBackward<'_>) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::engine::{Executor, Mode};

    /// Position, first and after of one sequence.
    fn run(window: usize, before: usize, marks: &[u32]) -> (Vec<isize>, Vec<isize>, isize) {
        let mut tape = Tape::new(Mode::Evaluate);
        let (start, ids) = (tape.input([1]), tape.ids(marks.len()));
        let places = positions(&mut tape, [1, marks.len()], window, Some(start), Some(ids)).unwrap();
        for var in [places.position, places.first, places.after] {
            tape.keep(var);
        }
        let mut executor = Executor::<f32>::new(tape);
        executor.input_mut(start)[0] = before as f32;
        executor.ids_mut(ids).copy_from_slice(marks);
        executor.poison();
        executor.forward(&[]);
        let of = |var| executor.value(var).iter().map(|x| whole(*x)).collect::<Vec<isize>>();
        (of(places.position), of(places.first), of(places.after)[0])
    }

    /// The same from an explicit list of the document's tokens: the slow twin.
    fn slow(window: usize, before: usize, marks: &[u32]) -> (Vec<isize>, Vec<isize>, isize) {
        let mut document: Vec<isize> = (0..before as isize).map(|i| i - before as isize).collect();
        let (mut position, mut first) = (Vec::new(), Vec::new());
        for (t, mark) in (0..).zip(marks) {
            if mark & PAD != 0 {
                position.push(document.len() as isize);
                first.push(t + 1);
                continue;
            }
            if mark & RESET != 0 {
                document.clear();
            }
            position.push(document.len() as isize);
            document.push(t);
            first.push(document[document.len().saturating_sub(window)]);
        }
        (position, first, document.len() as isize)
    }

    /// Marks from noise: pads and resets in about a quarter and a tenth of the places.
    pub(crate) fn marks(seed: u64, n: usize) -> Vec<u32> {
        let noise = crate::ops::check::noise(seed + 900, n);
        let mark = |x: &f64| match x {
            x if *x < -0.5 => PAD,
            x if *x > 0.9 => PAD | RESET,
            x if *x > 0.7 => RESET,
            _ => 0,
        };
        noise.iter().map(mark).collect()
    }

    #[test]
    fn agrees_with_the_slow_twin() {
        for window in [1, 2, 3, 7, 100] {
            for before in [0, 1, 2, 6, 50] {
                for length in [1, 2, 9, 40] {
                    assert_eq!(run(window, before, &vec![0; length]), slow(window, before, &vec![0; length]));
                    for seed in 0..12 {
                        let marks = marks(seed, length);
                        assert_eq!(
                            run(window, before, &marks),
                            slow(window, before, &marks),
                            "window {window}, {before} before, {marks:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut tape = Tape::new(Mode::Train);
        let before = tape.input([3]);
        let message = positions(&mut tape, [2, 5], 4, Some(before), None).unwrap_err().to_string();
        assert!(message.contains("[3]") && message.contains("[2]"), "{message}");
        assert!(positions(&mut tape, [2, 5], 0, None, None).is_err());
    }
}
