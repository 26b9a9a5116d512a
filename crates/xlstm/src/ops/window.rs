//! The last C tokens that a next token could see, as a cache of fixed size: attention's state.
//!
//! Rows are in order, the newest last; where the document has fewer tokens, the first rows are
//! zero. Pads are left out, and a reset empties the cache before its token.

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
/// places that were recorded with a window of `size`.
///
/// # Errors
/// When shapes do not fit.
pub fn window(tape: &mut Tape, size: usize, x: Var, cache: Option<Var>, places: Places) -> Result<Var> {
    let inputs = [Some(x), cache, Some(places.position), Some(places.first)];
    Ok(tape.record(Window { size }, &inputs, &[])?[0])
}

impl Window {
    /// Calls `each`(row of the new cache, where it comes from) for every row of sequence `b`
    /// that is not zero: a token of x, or, below 0, a row of the old cache.
    fn sources<T: Scalar>(
        &self,
        length: usize,
        (position, first): (&[T], &[T]),
        mut each: impl FnMut(usize, isize),
    ) {
        let is_pad = |t: usize| whole(first[t]) > t as isize;
        let last = (0..length).rev().find(|&t| !is_pad(t));
        // Without a token in x, the whole cache stays.
        let lowest = last.map_or(-(self.size as isize), |t| whole(first[t]));
        let mut row = self.size;
        for t in (0..last.map_or(0, |t| t + 1)).rev() {
            if row > 0 && t as isize >= lowest && !is_pad(t) {
                row -= 1;
                each(row, t as isize);
            }
        }
        // How many tokens of the document the old cache can hold.
        let held = if lowest < 0 { whole(position[0]).min(self.size as isize) } else { 0 };
        for source in (-held..0).rev() {
            if row > 0 {
                row -= 1;
                each(row, source);
            }
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

/// Rows that a thread goes over on a GPU: ROWS of window.cu.
#[cfg(feature = "cuda")]
const CUDA_ROWS: usize = 4;

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
        Slots::of(&[1, 2, 3], &[0])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (length, width) = sizes(io.shapes);
        let (x, cache, after) = (io.input(0), io.inputs[1], io.output(0));
        let (position, first) = (io.input(2), io.input(3));
        let part = self.size * width;
        after.fill(T::ZERO);
        for (b, after) in after.chunks_exact_mut(part).enumerate() {
            let places = (&position[b * length..][..length], &first[b * length..][..length]);
            self.sources(length, places, |row, source| {
                let to = &mut after[row * width..][..width];
                match (usize::try_from(source), cache) {
                    (Ok(t), _) => to.copy_from_slice(&x[(b * length + t) * width..][..width]),
                    (Err(_), Some(cache)) => {
                        let at = self.size - source.unsigned_abs();
                        to.copy_from_slice(&cache[b * part + at * width..][..width]);
                    }
                    (Err(_), None) => {}
                }
            });
        }
    }

    /// Every row hands its gradient to where it came from.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let (length, width) = sizes(io.shapes);
        let (position, first, dafter) = (io.input(2), io.input(3), io.gradient());
        let part = self.size * width;
        let mut dx = io.input_gradient(0).map(|dx| dx.cleared());
        let mut dcache = io.input_gradient(1).map(|dcache| dcache.cleared());
        for (b, dafter) in dafter.chunks_exact(part).enumerate() {
            let places = (&position[b * length..][..length], &first[b * length..][..length]);
            self.sources(length, places, |row, source| {
                let from = &dafter[row * width..][..width];
                let to = match usize::try_from(source) {
                    Ok(t) => dx.as_mut().map(|dx| &mut dx[(b * length + t) * width..][..width]),
                    Err(_) => {
                        let at = b * part + (self.size - source.unsigned_abs()) * width;
                        dcache.as_mut().map(|dcache| &mut dcache[at..][..width])
                    }
                };
                if let Some(to) = to {
                    add_to(from, to);
                }
            });
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
        let rows = io.queue.scratch(batch * self.size)?;
        let arguments = arguments![io.input(2), io.input(3), rows, length, self.size];
        io.queue.launch(&SOURCE, "window_sources", [batch, 1, 1], 32, arguments)?;
        let n = batch * self.size;
        let arguments =
            arguments![rows, io.input(0), io.inputs[1], io.outputs[0], n, length, self.size, width];
        io.queue.launch_columns(&SOURCE, "window_forward", [n, width], CUDA_ROWS, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let ((length, width), batch) = (sizes(io.shapes), io.shapes.input(0).dims()[0]);
        let rows = io.queue.scratch(batch * self.size)?;
        let arguments = arguments![io.input(2), io.input(3), rows, length, self.size];
        io.queue.launch(&SOURCE, "window_sources", [batch, 1, 1], 32, arguments)?;
        let n = batch * self.size * width;
        let [dx, dcache, ..] = io.input_gradients;
        let arguments = arguments![rows, io.gradient(), dx, dcache, n as u64, length, self.size, width];
        io.queue.launch_each(&SOURCE, "window_backward", n, arguments)
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

    /// The cache after one sequence, and the tokens of the document.
    fn run(size: usize, x: &[f64], cache: &[f64], before: f64, marks: &[u32]) -> (Vec<f64>, f64) {
        let mut tape = Tape::new(Mode::Evaluate);
        let length = marks.len();
        let (x_in, cache_in) = (tape.input([1, length, WIDTH]), tape.input([1, size, WIDTH]));
        let (start, ids) = (tape.input([1]), tape.ids(length));
        let places = positions(&mut tape, [1, length], size, Some(start), Some(ids)).unwrap();
        let after = window(&mut tape, size, x_in, Some(cache_in), places).unwrap();
        tape.keep(after);
        tape.keep(places.after);
        let mut executor = Executor::<f64>::new(tape);
        executor.input_mut(x_in).copy_from_slice(x);
        executor.input_mut(cache_in).copy_from_slice(cache);
        executor.input_mut(start)[0] = before;
        executor.ids_mut(ids).copy_from_slice(marks);
        executor.poison();
        executor.forward(&[]);
        (executor.value(after).to_vec(), executor.value(places.after)[0])
    }

    /// Token by token over a growing list: the slow twin.
    fn slow(size: usize, x: &[f64], cache: &[f64], before: f64, marks: &[u32]) -> Vec<f64> {
        let held = (before as usize).min(size);
        let mut rows: Vec<&[f64]> = cache.chunks(WIDTH).skip(size - held).collect();
        for (x, mark) in x.chunks(WIDTH).zip(marks) {
            if mark & PAD != 0 {
                continue;
            }
            if mark & RESET != 0 {
                rows.clear();
            }
            rows.push(x);
        }
        let kept = rows.len().min(size);
        let mut after = vec![0.0; (size - kept) * WIDTH];
        after.extend(rows[rows.len() - kept..].concat());
        after
    }

    #[test]
    fn agrees_with_the_slow_twin_and_may_be_cut_anywhere() {
        for size in [1, 2, 5, 30] {
            for before in [0usize, 1, 3, 40] {
                for (length, seed) in [(1, 0), (4, 1), (11, 2), (11, 3), (11, 4), (1, 6)] {
                    let x = noise(seed, length * WIDTH);
                    let mut cache = noise(seed + 1, size * WIDTH);
                    cache[..(size - before.min(size)) * WIDTH].fill(0.0);
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
