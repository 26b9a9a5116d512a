//! The last C tokens that a next token could see, as a cache of fixed size: attention's state.
//!
//! It is a ring: the document's token number p, counted from 0, has row p mod C, so that a token costs its
//! own row and no other. Rows that the document has no token for are zero. Pads are left out, and a
//! reset empties the cache before its token.

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::operation::{Backward, Forward, Kernel, NodeShapes, Slots};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::add_to;
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::positions::{Places, whole};

/// x (B, S, D), optional cache (B, C, D), position (B, S), first (B, S) -> cache (B, C, D).
#[derive(Debug)]
struct Window {
    size: usize,
}

/// Records the cache of `size` rows after x (B, S, D), from the `cache` before it and the
/// places that were recorded with a window of `size`. Where the caller feeds it back
/// ([`Tape::keep_as`]) and attention has read the cache by then, it is updated in place.
///
/// # Errors
/// When shapes do not fit.
pub fn window(tape: &mut Tape, size: usize, x: Var, cache: Option<Var>, places: Places) -> Result<Var> {
    let inputs = [Some(x), cache, Some(places.position), Some(places.first)];
    Ok(tape.record(Window { size }, &inputs, &[])?[0])
}

/// What a piece makes of one sequence's cache.
struct Turn<'a, T> {
    size: usize,
    position: &'a [T],
    first: &'a [T],
    /// The lowest number of a token that stays: below 0 the document goes on, and so does the cache.
    lowest: isize,
    /// Tokens of the document before the piece, and after it.
    before: isize,
    after: isize,
}

/// What a row of the cache holds after a piece.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    Nothing,
    /// What it held before.
    Same,
    /// A token of the piece.
    Token,
}

impl<'a, T: Scalar> Turn<'a, T> {
    /// Of sequence `b`, of so many tokens.
    fn new(size: usize, length: usize, (position, first): (&'a [T], &'a [T]), b: usize) -> Turn<'a, T> {
        let [position, first] = [position, first].map(|all| &all[b * length..][..length]);
        let last = (0..length).rev().find(|&t| whole(first[t]) <= t as isize);
        let before = whole(position[0]);
        Turn {
            size,
            position,
            first,
            // Without a token in the piece, the whole cache stays.
            lowest: last.map_or(-(size as isize), |t| whole(first[t])),
            before,
            after: last.map_or(before, |t| whole(position[t]) + 1),
        }
    }

    /// The tokens that stay, and their rows.
    fn tokens(&self) -> impl Iterator<Item = (usize, usize)> {
        let stays = |&t: &usize| {
            let t = t as isize;
            t >= self.lowest && whole(self.first[t.unsigned_abs()]) <= t
        };
        (0..self.first.len()).filter(stays).map(|t| (t, whole(self.position[t]) as usize % self.size))
    }

    /// Whether some row loses what it held, and is not written by a token: a document has begun.
    fn empties(&self) -> bool {
        self.lowest >= 0 && self.after < self.size as isize
    }

    fn holds(&self, row: usize) -> Holds {
        let size = self.size as isize;
        // The newest token of the document with this row.
        let newest = self.after - 1 - (self.after - 1 - row as isize).rem_euclid(size);
        match newest {
            ..0 => Holds::Nothing,
            newest if self.lowest < 0 && newest < self.before => Holds::Same,
            _ => Holds::Token,
        }
    }
}

/// S and D.
fn sizes(shapes: &NodeShapes) -> (usize, usize) {
    let x = shapes.input(0);
    (x.dims()[1], x.last())
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("window", include_str!("window.cu"));

/// Blocks of a sequence on a GPU, which take its rows in turn.
#[cfg(feature = "cuda")]
const FEWEST_BLOCKS: usize = 16;
#[cfg(feature = "cuda")]
const MOST_BLOCKS: usize = 1024;

impl Kernel for Window {
    fn name(&self) -> &'static str {
        "window"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let Some(x) = inputs[0].filter(|x| x.dims().len() == 3) else {
            return Err(Error::shape("x is (batch, length, features)"));
        };
        let (batch, length, width) = (x.dims()[0], x.dims()[1], x.last());
        let cache = Shape::from([batch, self.size, width]);
        let places = Shape::from([batch, length]);
        for (i, want) in [(1, cache), (2, places), (3, places)] {
            if inputs[i].is_some_and(|found| found != want) {
                return Err(Error::shape(format!(
                    "input {i} beside x {x:?} is {:?}, not {want:?}",
                    inputs[i]
                )));
            }
        }
        Ok(vec![cache])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[2, 3], &[])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[2, 3], &[])
    }

    fn updates(&self) -> Option<[usize; 2]> {
        Some([1, 0])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (length, width) = sizes(io.shapes);
        let (x, cache, in_place, after) = (io.input(0), io.inputs[1], io.updates(1), io.output(0));
        let places = (io.input(2), io.input(3));
        for (b, after) in after.chunks_exact_mut(self.size * width).enumerate() {
            let turn = Turn::new(self.size, length, places, b);
            if !in_place || turn.empties() {
                for (row, to) in after.chunks_exact_mut(width).enumerate() {
                    match (turn.holds(row), cache) {
                        (Holds::Same, Some(cache)) => {
                            to.copy_from_slice(&cache[(b * self.size + row) * width..][..width]);
                        }
                        (Holds::Same, None) if in_place => {}
                        (Holds::Same, None) | (Holds::Nothing, _) => to.fill(T::ZERO),
                        (Holds::Token, _) => {}
                    }
                }
            }
            for (t, row) in turn.tokens() {
                after[row * width..][..width].copy_from_slice(&x[(b * length + t) * width..][..width]);
            }
        }
    }

    /// Every row hands its gradient to where it came from.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let (length, width) = sizes(io.shapes);
        let (places, dafter) = ((io.input(2), io.input(3)), io.gradient());
        let part = self.size * width;
        let mut dx = io.input_gradient(0).map(|dx| dx.cleared());
        let mut dcache = io.input_gradient(1).map(|dcache| dcache.cleared());
        for (b, dafter) in dafter.chunks_exact(part).enumerate() {
            let turn = Turn::new(self.size, length, places, b);
            if let Some(dx) = &mut dx {
                for (t, row) in turn.tokens() {
                    add_to(&dafter[row * width..][..width], &mut dx[(b * length + t) * width..][..width]);
                }
            }
            if let Some(dcache) = &mut dcache {
                let rows = dcache[b * part..][..part].chunks_exact_mut(width).zip(dafter.chunks_exact(width));
                for (row, (to, from)) in rows.enumerate() {
                    if turn.holds(row) == Holds::Same {
                        add_to(from, to);
                    }
                }
            }
        }
        for i in [2, 3] {
            if let Some(unused) = io.input_gradient(i) {
                unused.cleared();
            }
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let ((length, width), batch) = (sizes(io.shapes), io.shapes.input(0).dims()[0]);
        let (cache, after) = (io.inputs[1], io.outputs[0]);
        let in_place = cache == Some(after);
        // In place there are tokens to write, and seldom anything else.
        let blocks = if in_place { length.max(FEWEST_BLOCKS) } else { length + self.size }.min(MOST_BLOCKS);
        let arguments = arguments![
            io.input(2),
            io.input(3),
            io.input(0),
            cache,
            after,
            u32::from(in_place),
            length,
            self.size,
            width
        ];
        io.queue.launch_early(&SOURCE, "window_forward", [blocks, batch, 1], 64, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let ((length, width), batch) = (sizes(io.shapes), io.shapes.input(0).dims()[0]);
        let [dx, dcache, ..] = io.input_gradients;
        let blocks = (length + self.size).min(MOST_BLOCKS);
        let arguments =
            arguments![io.input(2), io.input(3), io.gradient(), dx, dcache, length, self.size, width];
        io.queue.launch(&SOURCE, "window_backward", [blocks, batch, 1], 64, arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Executor, Mode};
    use crate::ops::check::{Check, noise};
    use crate::ops::positions::{positions, tests::marks};
    use crate::ops::{PAD, RESET};

    const WIDTH: usize = 3;

    /// The cache after one sequence, and the tokens of the document. In place it is the same.
    fn run(size: usize, x: &[f64], cache: &[f64], before: f64, marks: &[u32]) -> (Vec<f64>, f64) {
        let apart = run_as(false, size, x, cache, before, marks);
        assert_eq!(
            run_as(true, size, x, cache, before, marks),
            apart,
            "size {size}, {before} before, {marks:?}"
        );
        apart
    }

    fn run_as(
        in_place: bool,
        size: usize,
        x: &[f64],
        cache: &[f64],
        before: f64,
        marks: &[u32],
    ) -> (Vec<f64>, f64) {
        let mut tape = Tape::new(Mode::Evaluate);
        let length = marks.len();
        let (x_in, cache_in) = (tape.input([1, length, WIDTH]), tape.input([1, size, WIDTH]));
        let (start, ids) = (tape.input([1]), tape.ids(length));
        let places = positions(&mut tape, [1, length], size, Some(start), Some(ids)).unwrap();
        let after = window(&mut tape, size, x_in, Some(cache_in), places).unwrap();
        tape.keep(places.after);
        if in_place {
            tape.keep_as(after, cache_in);
        } else {
            tape.keep(after);
        }
        let mut executor = Executor::<f64>::new(tape);
        executor.input_mut(x_in).copy_from_slice(x);
        executor.input_mut(cache_in).copy_from_slice(cache);
        executor.input_mut(start)[0] = before;
        executor.ids_mut(ids).copy_from_slice(marks);
        executor.poison();
        executor.forward(&[]);
        assert_eq!(executor.value(cache_in) == cache, !in_place || executor.value(after) == cache);
        (executor.value(after).to_vec(), executor.value(places.after)[0])
    }

    /// Token by token over a growing list: the slow twin.
    fn slow(size: usize, x: &[f64], cache: &[f64], before: f64, marks: &[u32]) -> Vec<f64> {
        let number = before as usize;
        let held = number.saturating_sub(size)..number;
        // Each row with the number of its token.
        let mut rows: Vec<(usize, &[f64])> = held.map(|p| (p, &cache[p % size * WIDTH..][..WIDTH])).collect();
        let mut next = number;
        for (x, mark) in x.chunks(WIDTH).zip(marks) {
            if mark & PAD != 0 {
                continue;
            }
            if mark & RESET != 0 {
                rows.clear();
                next = 0;
            }
            rows.push((next, x));
            next += 1;
        }
        let mut after = vec![0.0; size * WIDTH];
        for (p, x) in &rows[rows.len().saturating_sub(size)..] {
            after[p % size * WIDTH..][..WIDTH].copy_from_slice(x);
        }
        after
    }

    #[test]
    fn agrees_with_the_slow_twin_and_may_be_cut_anywhere() {
        for size in [1, 2, 5, 30] {
            for before in [0usize, 1, 3, 40] {
                for (length, seed) in [(1, 0), (4, 1), (11, 2), (11, 3), (11, 4), (1, 6)] {
                    let x = noise(seed, length * WIDTH);
                    let mut cache = noise(seed + 1, size * WIDTH);
                    cache[before.min(size) * WIDTH..].fill(0.0);
                    let marks = if seed == 2 { vec![0; length] } else { marks(seed, length) };
                    let want = slow(size, &x, &cache, before as f64, &marks);
                    let (got, count) = run(size, &x, &cache, before as f64, &marks);
                    assert_eq!(got, want, "size {size}, {before} before, {marks:?}");
                    for cut in 1..length {
                        let (head, tail) = x.split_at(cut * WIDTH);
                        let (middle, seen) = run(size, head, &cache, before as f64, &marks[..cut]);
                        let (after, total) = run(size, tail, &middle, seen, &marks[cut..]);
                        assert_eq!((after, total), (want.clone(), count));
                    }
                }
            }
        }
    }

    #[test]
    fn gradients() {
        for (size, length) in [(4, 9), (9, 4), (1, 1)] {
            for seed in 0..3 {
                let check = Check::new().input([2, length, WIDTH]).input([2, size, WIDTH]);
                let check = check.input_of([2], vec![2.0, 20.0]).ids(&marks(seed, 2 * length));
                check.run(|tape, v, ids| {
                    let shape = [2, length];
                    let places = positions(tape, shape, size, Some(v[2]), Some(ids[0]))?;
                    let begun = positions(tape, shape, size, Some(v[2]), None)?;
                    let fresh = positions(tape, shape, size, None, None)?;
                    Ok(vec![
                        window(tape, size, v[0], Some(v[1]), places)?,
                        window(tape, size, v[0], Some(v[1]), begun)?,
                        window(tape, size, v[0], None, fresh)?,
                    ])
                });
            }
        }
    }
}
