//! Causal depthwise convolution with its window as state, resets, pads and optional SiLU.
//!
//! u_t = b + Σ_j w_j ∘ x_{t-K+1+j} over the taps j = 0..K, y_t = SiLU(u_t) or u_t. The last
//! tap multiplies the token itself; the K-1 tokens before the first come from the window.
//! A token marked RESET sees nothing before it. A token marked PAD is skipped as if it were
//! not there (so a reset on it counts for nothing): y is 0 at it, and no later tap or
//! window holds it.
//!
//! Backward works u out again: that takes K multiplications of rows which the gradients of
//! x and w need in the cache anyway, where saving u would cost a write, a read and memory
//! as large as x.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward};
use crate::engine::matrix::MatMut;
use crate::engine::operation::{Backward, Forward, Kernel, NodeShapes, Slots, scratch};
use crate::engine::tape::{Ids, Tape, Var};
use crate::engine::vector::{add_to, vectorize};
use crate::engine::{Gradient, Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::activation::Activation::Swish;
use crate::ops::embedding::column_block;
use crate::ops::{PAD, RESET, TILE};

/// x (B, S, E), w (E, 1, K), optional b (E), optional window (B, K-1, E), optional marks
/// (B·S) -> y (B, S, E), window after the last token (B, K-1, E).
#[derive(Debug)]
struct CausalConv {
    silu: bool,
    marked: bool,
}

/// Records the convolution of every feature of x over time.
///
/// The window holds the last K-1 tokens before x, oldest first; without one they are zeros.
/// `marks` are bit sets of [`RESET`] and [`PAD`], one a token. Returns y and the window
/// after the last token.
///
/// # Errors
/// When the shapes do not fit together.
pub fn causal_conv(
    tape: &mut Tape,
    x: Var,
    weight: Var,
    bias: Option<Var>,
    window: Option<Var>,
    marks: Option<Ids>,
    silu: bool,
) -> Result<(Var, Var)> {
    let operation = CausalConv { silu, marked: marks.is_some() };
    let ids: Vec<Ids> = marks.into_iter().collect();
    let outputs = tape.record(operation, &[Some(x), Some(weight), bias, window], &ids)?;
    Ok((outputs[0], outputs[1]))
}

/// Where a tap finds its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// This token of x.
    Token(usize),
    /// This row of the incoming window.
    Window(usize),
}

/// The real tokens before a position, newest first, up to a reset: what the taps from the
/// second-last on see. Ends early where nothing is seen.
struct History<'a> {
    marks: Option<&'a [u32]>,
    /// Tokens of x not yet passed.
    tokens: usize,
    /// Rows of the window not yet passed.
    window: usize,
}

impl Iterator for History<'_> {
    type Item = Source;

    #[inline]
    fn next(&mut self) -> Option<Source> {
        while self.tokens > 0 {
            self.tokens -= 1;
            let token = self.tokens;
            let mark = self.marks.map_or(0, |marks| marks[token]);
            if mark & PAD != 0 {
                continue;
            }
            if mark & RESET != 0 {
                (self.tokens, self.window) = (0, 0);
            }
            return Some(Source::Token(token));
        }
        self.window = self.window.checked_sub(1)?;
        Some(Source::Window(self.window))
    }
}

/// One sequence: its rows of x and of the window, and its marks.
#[derive(Clone, Copy)]
struct Sequence<'a, T> {
    x: &'a [T],
    window: &'a [T],
    marks: Option<&'a [u32]>,
    /// E.
    width: usize,
    /// K.
    taps: usize,
}

impl<'a, T: Scalar> Sequence<'a, T> {
    /// Sequence `b` of the inputs.
    fn new(
        shapes: &NodeShapes,
        x: &'a [T],
        window: Option<&'a [T]>,
        marks: Option<&'a [u32]>,
        b: usize,
    ) -> Self {
        let (length, width, taps) = sizes(shapes);
        let part = |n: usize| b * n..(b + 1) * n;
        Sequence {
            x: &x[part(length * width)],
            window: window.map_or(&[], |w| &w[part((taps - 1) * width)]),
            marks: marks.map(|m| &m[part(length)]),
            width,
            taps,
        }
    }

    /// The real tokens before position `t`.
    fn before(&self, t: usize) -> History<'a> {
        History { marks: self.marks, tokens: t, window: self.window.len() / self.width }
    }

    /// The token is not there.
    #[inline]
    fn is_pad(&self, t: usize) -> bool {
        self.marks.is_some_and(|marks| marks[t] & PAD != 0)
    }

    /// What the taps of a real token see, the last tap first.
    #[inline]
    fn seen(&self, t: usize) -> std::iter::Take<History<'a>> {
        self.before(t + 1).take(self.taps)
    }

    /// `count` columns from `first` of a row.
    #[inline(always)]
    fn row(&self, source: Source, first: usize, count: usize) -> &'a [T] {
        match source {
            Source::Token(t) => &self.x[t * self.width + first..][..count],
            Source::Window(r) => &self.window[r * self.width + first..][..count],
        }
    }

    /// u_t for `n` columns from `first`, with w (K, E). Four taps at a time share one pass;
    /// the order of the additions is the same with fewer.
    #[inline(always)]
    fn convolve(&self, t: usize, first: usize, n: usize, w: &[T], bias: Option<&[T]>) -> [T; BLOCK] {
        let mut block = [T::ZERO; BLOCK];
        let u = &mut block[..n];
        if let Some(bias) = bias {
            u.copy_from_slice(&bias[first..][..n]);
        }
        let mut seen = self.seen(t);
        let mut tap = self.taps;
        loop {
            let group: [Option<Source>; 4] = [seen.next(), seen.next(), seen.next(), seen.next()];
            if let [Some(s0), Some(s1), Some(s2), Some(s3)] = group {
                let (x0, x1) = (self.row(s0, first, n), self.row(s1, first, n));
                let (x2, x3) = (self.row(s2, first, n), self.row(s3, first, n));
                tap -= 4;
                let (w0, w1) =
                    (&w[(tap + 3) * self.width + first..][..n], &w[(tap + 2) * self.width + first..][..n]);
                let (w2, w3) =
                    (&w[(tap + 1) * self.width + first..][..n], &w[tap * self.width + first..][..n]);
                for i in 0..n {
                    let sum = w1[i].mul_add(x1[i], w0[i].mul_add(x0[i], u[i]));
                    u[i] = w3[i].mul_add(x3[i], w2[i].mul_add(x2[i], sum));
                }
                continue;
            }
            for source in group.into_iter().flatten() {
                tap -= 1;
                add_product(&w[tap * self.width + first..][..n], self.row(source, first, n), u);
            }
            return block;
        }
    }
}

/// Columns whose u is worked out at a time, in an array of its own: a slice could overlap
/// the rows for all that the compiler knows.
const BLOCK: usize = 64;

/// u += w ∘ x.
#[inline(always)]
fn add_product<T: Scalar>(w: &[T], x: &[T], u: &mut [T]) {
    for (u, (w, x)) in u.iter_mut().zip(w.iter().zip(x)) {
        *u = w.mul_add(*x, *u);
    }
}

/// S, E and K.
fn sizes(shapes: &NodeShapes) -> (usize, usize, usize) {
    let (x, w) = (shapes.input(0), shapes.input(1));
    (x.dims()[1], x.dims()[2], w.dims()[2])
}

/// The weight (E, 1, K) as (K, E).
fn transpose<T: Scalar>(weight: &[T], taps: usize, to: &mut [T]) {
    let width = weight.len() / taps;
    for (e, weight) in weight.chunks_exact(taps).enumerate() {
        for (j, w) in weight.iter().enumerate() {
            to[j * width + e] = *w;
        }
    }
}

/// A gradient (batch, rows, width) cut into blocks of (rows, columns), sequences outermost;
/// None for each where nobody asks for it or it is empty.
fn gradient_blocks<T: Scalar>(
    gradient: Option<&mut [T]>,
    [batch, rows, width]: [usize; 3],
    columns: usize,
) -> Vec<Option<MatMut<'_, T>>> {
    match gradient {
        Some(gradient) if rows > 0 => {
            let matrix = MatMut::new(gradient, batch * rows, width);
            matrix.blocks(rows, columns).into_iter().map(Some).collect()
        }
        _ => (0..batch * (width / columns)).map(|_| None).collect(),
    }
}

impl Kernel for CausalConv {
    fn name(&self) -> &'static str {
        "causal_conv"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let (Some(x), Some(w)) = (inputs[0], inputs[1]) else {
            return Err(Error::shape("x and w are needed"));
        };
        let &[batch, _, width] = x.dims() else {
            return Err(Error::shape(format!("x is (batch, length, features), not {x:?}")));
        };
        let &[features, 1, taps] = w.dims() else {
            return Err(Error::shape(format!("w is (features, 1, taps), not {w:?}")));
        };
        if x.len() == 0 || features != width || taps == 0 {
            return Err(Error::shape(format!("x {x:?} and w {w:?} do not fit, or one is empty")));
        }
        if let Some(b) = inputs[2]
            && b.len() != width
        {
            return Err(Error::shape(format!("b {b:?} is not one number a feature of x {x:?}")));
        }
        let window = Shape::from([batch, taps - 1, width]);
        if let Some(given) = inputs[3]
            && given != window
        {
            return Err(Error::shape(format!(
                "the window is {given:?}; for x {x:?} and w {w:?} it is {window:?}"
            )));
        }
        Ok(vec![x, window])
    }

    fn reads(&self) -> Slots {
        Slots::of(if self.silu { &[0, 1, 2, 3] } else { &[0, 1, 3] }, &[])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[1, 2, 3], &[1])
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::of(&[0, 1, 2, 3], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (y, window) = (io.output(0), io.output(1));
        let (x, w, bias, shapes) = (io.input(0), io.input(1), io.inputs[2], io.shapes);
        let (length, width, taps) = sizes(shapes);
        let (before, marks) = (io.inputs[3], self.marked.then_some(io.ids[0]));
        let transposed = scratch(io.scratch, taps * width);
        transpose(w, taps, transposed);
        let w = &*transposed;
        y.par_chunks_mut(width * TILE).enumerate().for_each(|(i, y)| {
            vectorize!(|| {
                for (y, token) in y.chunks_exact_mut(width).zip(i * TILE..) {
                    let (b, t) = (token / length, token % length);
                    let sequence = Sequence::new(shapes, x, before, marks, b);
                    if sequence.is_pad(t) {
                        y.fill(T::ZERO);
                        continue;
                    }
                    for (y, first) in y.chunks_mut(BLOCK).zip((0..).step_by(BLOCK)) {
                        let u = sequence.convolve(t, first, y.len(), w, bias);
                        for (y, u) in y.iter_mut().zip(&u) {
                            *y = if self.silu { Swish.value(*u) } else { *u };
                        }
                    }
                }
            });
        });
        if taps == 1 {
            return;
        }
        for (b, window) in window.chunks_exact_mut((taps - 1) * width).enumerate() {
            let sequence = Sequence::new(shapes, x, before, marks, b);
            let mut sources = sequence.before(length);
            for row in window.chunks_exact_mut(width).rev() {
                match sources.next() {
                    Some(source) => row.copy_from_slice(sequence.row(source, 0, width)),
                    None => row.fill(T::ZERO),
                }
            }
        }
    }

    /// With du_t = dy_t SiLU'(u_t) or dy_t, each tap j of each token t adds du_t ∘ w_j to
    /// the gradient of the row x_{t-K+1+j} that it sees (of x or of the window) and
    /// du_t ∘ x_{t-K+1+j} to dw_j; db += Σ_t du_t. The outgoing window hands its gradient
    /// to the rows it holds. One task a sequence and block of columns goes over all tokens.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let (x, w, shapes) = (io.input(0), io.input(1), io.shapes);
        let (bias, before, marks) = (io.inputs[2], io.inputs[3], self.marked.then_some(io.ids[0]));
        let (dy, dafter) = (io.output_gradients[0], io.output_gradients[1]);
        let (length, width, taps) = sizes(shapes);
        let (batch, columns) = (x.len() / (length * width), column_block(width, 256));
        let blocks = width / columns;
        let dx =
            gradient_blocks(io.input_gradient(0).map(Gradient::cleared), [batch, length, width], columns);
        let dbefore =
            gradient_blocks(io.input_gradient(3).map(Gradient::cleared), [batch, taps - 1, width], columns);
        let (dweight, dbias) =
            (io.input_gradient(1).map(Gradient::cleared), io.input_gradient(2).map(Gradient::cleared));
        // Of each task: dw (K, columns), db (columns), du (columns).
        let share = (taps + 2) * columns;
        let space = scratch(io.scratch, taps * width + batch * blocks * share);
        let (transposed, partials) = space.split_at_mut(taps * width);
        transpose(w, taps, transposed);
        let w = &*transposed;
        let gradients = dx.into_par_iter().zip(dbefore).zip(partials.par_chunks_mut(share));
        gradients.enumerate().for_each(|(i, ((mut dx, mut dbefore), partial))| {
            let (b, first) = (i / blocks, i % blocks * columns);
            let sequence = Sequence::new(shapes, x, before, marks, b);
            partial.fill(T::ZERO);
            let (dw, rest) = partial.split_at_mut(taps * columns);
            let (db, du) = rest.split_at_mut(columns);
            vectorize!(|| {
                let dys = dy.map(|dy| &dy[b * length * width..(b + 1) * length * width]);
                for (t, dy) in dys.unwrap_or_default().chunks_exact(width).enumerate() {
                    if sequence.is_pad(t) {
                        continue;
                    }
                    let dy = &dy[first..][..columns];
                    if self.silu {
                        let parts = du.chunks_mut(BLOCK).zip(dy.chunks(BLOCK));
                        for ((du, dy), first) in parts.zip((first..).step_by(BLOCK)) {
                            let u = sequence.convolve(t, first, dy.len(), w, bias);
                            for (du, (dy, u)) in du.iter_mut().zip(dy.iter().zip(&u)) {
                                *du = *dy * Swish.value_and_derivative(*u).1;
                            }
                        }
                    } else {
                        du.copy_from_slice(dy);
                    }
                    add_to(du, db);
                    for (n, source) in sequence.seen(t).enumerate() {
                        let tap = taps - 1 - n;
                        let row = sequence.row(source, first, columns);
                        add_product(du, row, &mut dw[tap * columns..][..columns]);
                        let to = match source {
                            Source::Token(t) => dx.as_mut().map(|dx| dx.row(t)),
                            Source::Window(r) => dbefore.as_mut().map(|d| d.row(r)),
                        };
                        if let Some(to) = to {
                            add_product(du, &w[tap * width + first..][..columns], to);
                        }
                    }
                }
            });
            let Some(dafter) = dafter else { return };
            for (n, source) in sequence.before(length).take(taps - 1).enumerate() {
                let row = b * (taps - 1) + taps - 2 - n;
                let to = match source {
                    Source::Token(t) => dx.as_mut().map(|dx| dx.row(t)),
                    Source::Window(r) => dbefore.as_mut().map(|d| d.row(r)),
                };
                if let Some(to) = to {
                    add_to(&dafter[row * width + first..][..columns], to);
                }
            }
        });
        let partials = || partials.chunks_exact(share).enumerate().map(|(i, p)| (i % blocks * columns, p));
        if let Some(dw) = dweight {
            for (first, partial) in partials() {
                for (tap, partial) in partial.chunks_exact(columns).take(taps).enumerate() {
                    for (e, p) in partial.iter().enumerate() {
                        dw[(first + e) * taps + tap] += *p;
                    }
                }
            }
        }
        if let Some(db) = dbias {
            for (first, partial) in partials() {
                add_to(&partial[taps * columns..][..columns], &mut db[first..][..columns]);
            }
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        cuda::forward(self, io)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        cuda::backward(self, io)
    }
}

#[cfg(feature = "cuda")]
mod cuda;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Executor, Mode};
    use crate::ops::check::{Check, noise};

    #[test]
    fn gradients() {
        for (width, taps) in [(3, 1), (5, 2), (32, 4), (3, 7)] {
            for silu in [false, true] {
                let check = Check::new().input([2, 37, width]).input([width, 1, taps]).input([width]);
                check.run(|tape, v, _| {
                    let (y, window) = causal_conv(tape, v[0], v[1], Some(v[2]), None, None, silu)?;
                    Ok(vec![y, window])
                });
                check.input([2, taps - 1, width]).run(|tape, v, _| {
                    let (y, _) = causal_conv(tape, v[0], v[1], None, Some(v[3]), None, silu)?;
                    let (_, window) = causal_conv(tape, v[0], v[1], Some(v[2]), Some(v[3]), None, silu)?;
                    Ok(vec![y, window])
                });
            }
        }
    }

    #[test]
    fn gradients_with_marks() {
        for (length, taps) in [(3, 4), (12, 4), (12, 1), (12, 6)] {
            for seed in 0..4 {
                let check = Check::new()
                    .input([2, length, 5])
                    .input([5, 1, taps])
                    .input([5])
                    .input([2, taps - 1, 5])
                    .ids(&marks(seed, 2 * length));
                check.run(|tape, v, ids| {
                    let (y, window) =
                        causal_conv(tape, v[0], v[1], Some(v[2]), Some(v[3]), Some(ids[0]), true)?;
                    Ok(vec![y, window])
                });
            }
        }
    }

    /// Pads and resets in about a quarter and a fifth of the places; runs of pads, too.
    fn marks(seed: u64, n: usize) -> Vec<u32> {
        let mark = |x: &f64| {
            if *x < -0.5 {
                PAD
            } else if *x > 0.6 {
                RESET
            } else {
                0
            }
        };
        noise(seed + 50, n).iter().map(mark).collect()
    }

    const WIDTH: usize = 19;

    /// y and the window after one sequence.
    fn run(x: &[f64], taps: usize, window: &[f64], marks: Option<&[u32]>) -> (Vec<f64>, Vec<f64>) {
        let (mut tape, length) = (Tape::new(Mode::Evaluate), x.len() / WIDTH);
        let inputs = [tape.input([1, length, WIDTH]), tape.input([1, taps - 1, WIDTH])];
        let (w, b) = (tape.parameter(0, 0, [WIDTH, 1, taps].into()), tape.parameter(1, 0, [WIDTH].into()));
        let ids = marks.map(|marks| tape.ids(marks.len()));
        let (y, after) = causal_conv(&mut tape, inputs[0], w, Some(b), Some(inputs[1]), ids, true).unwrap();
        tape.keep(y);
        tape.keep(after);
        let mut executor = Executor::<f64>::new(tape);
        executor.input_mut(inputs[0]).copy_from_slice(x);
        executor.input_mut(inputs[1]).copy_from_slice(window);
        if let (Some(ids), Some(marks)) = (ids, marks) {
            executor.ids_mut(ids).copy_from_slice(marks);
        }
        executor.forward(&[noise(1, WIDTH * taps), noise(2, WIDTH)]);
        (executor.value(y).to_vec(), executor.value(after).to_vec())
    }

    /// The same, token by token over an explicit list of rows: the slow twin.
    fn slow(x: &[f64], taps: usize, window: &[f64], marks: &[u32]) -> (Vec<f64>, Vec<f64>) {
        let (w, b) = (noise(1, WIDTH * taps), noise(2, WIDTH));
        let mut rows: Vec<&[f64]> = window.chunks(WIDTH).collect();
        let mut y = Vec::new();
        for (x, mark) in x.chunks(WIDTH).zip(marks) {
            if mark & PAD != 0 {
                y.extend([0.0; WIDTH]);
                continue;
            }
            if mark & RESET != 0 {
                rows.fill(&[0.0; WIDTH]);
            }
            rows.push(x);
            for e in 0..WIDTH {
                let u = (0..taps).fold(b[e], |u, j| w[e * taps + j].mul_add(rows[j][e], u));
                y.push(u / (1.0 + (-u).exp()));
            }
            rows.remove(0);
        }
        (y, rows.concat())
    }

    fn assert_close(a: &(Vec<f64>, Vec<f64>), b: &(Vec<f64>, Vec<f64>)) {
        assert_eq!((a.0.len(), a.1.len()), (b.0.len(), b.1.len()));
        assert!(a.0.iter().zip(&b.0).all(|(a, b)| (a - b).abs() < 1e-12));
        assert_eq!(a.1, b.1);
    }

    #[test]
    fn agrees_with_the_slow_twin() {
        for taps in [1, 2, 3, 4, 5, 9] {
            for length in [1, 2, 5, 40] {
                let (x, window) = (noise(3, length * WIDTH), noise(4, (taps - 1) * WIDTH));
                assert_close(&run(&x, taps, &window, None), &slow(&x, taps, &window, &vec![0; length]));
                for seed in 0..8 {
                    let marks = marks(seed, length);
                    assert_close(&run(&x, taps, &window, Some(&marks)), &slow(&x, taps, &window, &marks));
                }
            }
        }
    }

    #[test]
    fn a_sequence_cut_anywhere_equals_the_whole() {
        let length = 14;
        for taps in [1, 4, 6] {
            let (x, window) = (noise(3, length * WIDTH), noise(4, (taps - 1) * WIDTH));
            for seed in 0..4 {
                let marks = marks(seed, length);
                for marks in [None, Some(&marks[..])] {
                    let whole = run(&x, taps, &window, marks);
                    for cut in 1..length {
                        let (head, tail) = x.split_at(cut * WIDTH);
                        let (mut y, middle) = run(head, taps, &window, marks.map(|m| &m[..cut]));
                        let (rest, after) = run(tail, taps, &middle, marks.map(|m| &m[cut..]));
                        y.extend(rest);
                        // A zero in the window adds to u what a tap that sees nothing does not.
                        assert_close(&(y, after), &whole);
                    }
                }
            }
        }
    }

    #[test]
    fn pads_are_as_if_not_there() {
        let (length, taps) = (20, 4);
        let (x, window) = (noise(3, length * WIDTH), noise(4, (taps - 1) * WIDTH));
        for seed in 0..8 {
            let marks = marks(seed, length);
            let real = |t: &usize| marks[*t] & PAD == 0;
            let pick = |x: &[f64]| -> Vec<f64> {
                (0..length).filter(real).flat_map(|t| x[t * WIDTH..][..WIDTH].to_vec()).collect()
            };
            let (y, after) = run(&x, taps, &window, Some(&marks));
            let others: Vec<u32> = (0..length).filter(real).map(|t| marks[t]).collect();
            assert_eq!(run(&pick(&x), taps, &window, Some(&others)), (pick(&y), after));
        }
    }

    #[test]
    fn a_window_that_does_not_fit_is_refused() {
        let mut tape = Tape::new(Mode::Train);
        let (x, w, window) = (tape.input([2, 3, 8]), tape.input([8, 1, 4]), tape.input([2, 4, 8]));
        let message = causal_conv(&mut tape, x, w, None, Some(window), None, true).unwrap_err().to_string();
        assert!(message.contains("[2, 4, 8]") && message.contains("[2, 3, 8]"), "{message}");
    }
}
