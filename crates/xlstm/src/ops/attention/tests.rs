//! Attention against all pairs written out, and against central differences.

use proptest::prelude::*;

use super::*;
use crate::engine::operation::Element;
use crate::engine::{Executor, Mode};
use crate::ops::check::{Check, noise};
use crate::ops::positions::{positions, tests::marks};
use crate::ops::window::window;

/// A batch with a cache of which `before` rows are tokens.
struct Problem {
    batch: usize,
    length: usize,
    window: usize,
    heads: usize,
    size: usize,
    before: usize,
    marks: Vec<u32>,
    /// What queries, keys and values are multiplied by.
    spread: f64,
    /// q, k, v, keys and values of the cache.
    inputs: [Vec<f64>; 5],
}

impl Problem {
    fn new(shape: [usize; 5], before: usize, marked: bool, spread: f64, seed: u64) -> Problem {
        let [batch, length, window, heads, size] = shape;
        let width = heads * size;
        let token = |i: u64| noise(seed * 7 + i, batch * length * width).iter().map(|x| x * spread).collect();
        let cached = |i: u64| {
            let mut rows = noise(seed * 7 + i, batch * window * width);
            for rows in rows.chunks_exact_mut(window * width) {
                rows[before.min(window) * width..].fill(0.0);
            }
            rows
        };
        let inputs = [token(1), token(2), token(3), cached(4), cached(5)];
        let marks = if marked { marks(seed, batch * length) } else { vec![0; batch * length] };
        Problem { batch, length, window, heads, size, before, marks, spread, inputs }
    }

    fn width(&self) -> usize {
        self.heads * self.size
    }

    /// y, both caches after, then the gradients of the inputs for random weights of all three.
    fn run<T: Element>(&self) -> Vec<Vec<f64>> {
        let mut tape = Tape::new(Mode::Train);
        let shape = [self.batch, self.length];
        let [token, cached] = [self.length, self.window].map(|rows| [self.batch, rows, self.width()]);
        let vars = [token, token, token, cached, cached].map(|shape| tape.input_with_gradient(shape));
        let (before, ids) = (tape.input([self.batch]), tape.ids(self.marks.len()));
        let places = positions(&mut tape, shape, self.window, Some(before), Some(ids)).unwrap();
        let [q, k, v, ck, cv] = vars;
        let y = attention(&mut tape, self.heads, [q, k, v], Some([ck, cv]), places).unwrap();
        let keys = window(&mut tape, self.window, k, Some(ck), places).unwrap();
        let values = window(&mut tape, self.window, v, Some(cv), places).unwrap();
        let outputs = [y, keys, values];
        for y in outputs {
            tape.keep(y);
            tape.seed_gradient(y);
        }
        let mut executor = Executor::<T>::new(tape);
        for (&var, values) in vars.iter().zip(&self.inputs) {
            for (to, from) in executor.input_mut(var).iter_mut().zip(values) {
                *to = T::from_f64(*from);
            }
        }
        executor.input_mut(before).fill(T::from_f64(self.before as f64));
        executor.ids_mut(ids).copy_from_slice(&self.marks);
        executor.poison();
        executor.forward(&[]);
        for (i, y) in outputs.into_iter().enumerate() {
            let weights = self.weights(i);
            for (to, from) in executor.seed_mut(y).iter_mut().zip(weights) {
                *to = T::from_f64(from);
            }
        }
        executor.backward(&[], &mut []);
        let wide = |x: &[T]| x.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
        let values = outputs.iter().map(|&y| wide(executor.value(y)));
        values.chain(vars.iter().map(|&x| wide(executor.gradient(x)))).collect()
    }

    fn weights(&self, output: usize) -> Vec<f64> {
        let rows = if output == 0 { self.length } else { self.window };
        noise(300 + output as u64, self.batch * rows * self.width())
    }

    /// The same as [`run`](Self::run), all pairs one by one.
    fn slow(&self) -> Vec<Vec<f64>> {
        let width = self.width();
        let [q, k, v, ck, cv] = &self.inputs;
        let mut y = vec![0.0; q.len()];
        let mut after = [vec![0.0; ck.len()], vec![0.0; cv.len()]];
        let mut gradients = self.inputs.clone().map(|x| vec![0.0; x.len()]);
        let dy = self.weights(0);
        for b in 0..self.batch {
            // The document: tokens by where their rows lie (in the cache or not, offset).
            let held = self.before.saturating_sub(self.window)..self.before;
            let row_of = |number: usize| (b * self.window + number % self.window) * width;
            let mut document: Vec<(bool, usize)> = held.map(|number| (true, row_of(number))).collect();
            let mut count = self.before;
            for t in 0..self.length {
                let at = (b * self.length + t) * width;
                let mark = self.marks[b * self.length + t];
                if mark & crate::ops::PAD != 0 {
                    continue;
                }
                if mark & crate::ops::RESET != 0 {
                    document.clear();
                    count = 0;
                }
                document.push((false, at));
                count += 1;
                let seen = &document[document.len().saturating_sub(self.window)..];
                for column in (0..width).step_by(self.size) {
                    let row = |tokens: &[f64], cache: &[f64], from: &(bool, usize)| -> Vec<f64> {
                        let data = if from.0 { cache } else { tokens };
                        data[from.1 + column..][..self.size].to_vec()
                    };
                    let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                    let (own, slope) = (&q[at + column..][..self.size], &dy[at + column..][..self.size]);
                    let scale = 1.0 / (self.size as f64).sqrt();
                    let scores: Vec<f64> = seen.iter().map(|u| scale * inner(own, &row(k, ck, u))).collect();
                    let high = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|s| (s - high).exp()).sum();
                    let weights: Vec<f64> = scores.iter().map(|s| (s - high).exp() / sum).collect();
                    let dp: Vec<f64> = seen.iter().map(|u| inner(slope, &row(v, cv, u))).collect();
                    let mean = inner(&weights, &dp);
                    for (i, u) in seen.iter().enumerate() {
                        let ds = weights[i] * (dp[i] - mean) * scale;
                        let (keys, values) = (row(k, ck, u), row(v, cv, u));
                        for d in 0..self.size {
                            y[at + column + d] += weights[i] * values[d];
                            gradients[0][at + column + d] += ds * keys[d];
                            gradients[if u.0 { 3 } else { 1 }][u.1 + column + d] += ds * own[d];
                            gradients[if u.0 { 4 } else { 2 }][u.1 + column + d] += weights[i] * slope[d];
                        }
                    }
                }
            }
            let kept = document.len().min(self.window);
            for (number, from) in (count - kept..count).zip(&document[document.len() - kept..]) {
                for which in 0..2 {
                    let (tokens, cache) = if which == 0 { (k, ck) } else { (v, cv) };
                    let data = if from.0 { cache } else { tokens };
                    let to = row_of(number);
                    after[which][to..to + width].copy_from_slice(&data[from.1..from.1 + width]);
                    let weights = &self.weights(1 + which)[to..to + width];
                    let gradient = &mut gradients[which + if from.0 { 3 } else { 1 }];
                    gradient[from.1..from.1 + width].iter_mut().zip(weights).for_each(|(g, w)| *g += w);
                }
            }
        }
        let [keys, values] = after;
        [y, keys, values].into_iter().chain(gradients).collect()
    }

    /// Within `tolerance` of the largest of each tensor, or of what its terms may be where they
    /// cancel: a gradient of scores is a difference of products of two inputs.
    fn assert_close(&self, tolerance: f64, got: &[Vec<f64>], want: &[Vec<f64>]) {
        let Problem { batch, length, window, heads, size, before, .. } = *self;
        let what = format!("{batch} x {length}, {window}, {heads} x {size}, {before}, {:?}", self.marks);
        assert_eq!(got.len(), want.len());
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let scale = want.iter().fold(0.1 * self.spread * self.spread, |m: f64, x| m.max(x.abs()));
            assert_eq!(got.len(), want.len());
            for (j, (g, w)) in got.iter().zip(want).enumerate() {
                assert!((g - w).abs() <= tolerance * scale, "tensor {i}[{j}]: {g} and {w}, {what}");
            }
        }
    }
}

/// Tiles have 64 rows: lengths and windows around one and two of them.
#[test]
fn all_pairs_at_the_edges_of_tiles() {
    for length in [1, 63, 64, 65, 130] {
        for (window, before) in [(1, 5), (40, 17), (64, 200), (65, 64), (200, 3), (130, 0)] {
            for marked in [false, true] {
                let problem = Problem::new([2, length, window, 2, 3], before, marked, 2.0, 11);
                problem.assert_close(1e-12, &problem.run::<f64>(), &problem.slow());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn all_pairs(
        batch in 1usize..3, length in 1usize..150, window in 1usize..150, heads in 1usize..4, size in 1usize..9,
        before in 0usize..200, marked: bool, spread in prop::sample::select(vec![1.0, 30.0]), seed in 0u64..1000,
    ) {
        let problem = Problem::new([batch, length, window, heads, size], before, marked, spread, seed);
        let truth = problem.slow();
        problem.assert_close(1e-11, &problem.run::<f64>(), &truth);
        let single = problem.run::<f32>();
        prop_assert!(single.iter().flatten().all(|x| x.is_finite()));
        if spread < 2.0 {
            problem.assert_close(2e-5, &single, &truth);
        }
    }
}

#[test]
fn gradients() {
    for (length, size) in [(7, 70), (70, 30)] {
        let shape = [2, length, 6];
        let check = Check::new().input(shape).input(shape).input(shape);
        let check = check.input([2, size, 6]).input([2, size, 6]).input_of([2], vec![9.0, 100.0]);
        check.ids(&marks(3, 2 * length)).run(|tape, v, ids| {
            let places = positions(tape, [2, length], size, Some(v[5]), Some(ids[0]))?;
            let fresh = positions(tape, [2, length], size, None, None)?;
            let qkv = [v[0], v[1], v[2]];
            Ok(vec![
                attention(tape, 2, qkv, Some([v[3], v[4]]), places)?,
                attention(tape, 3, qkv, None, fresh)?,
            ])
        });
    }
}

/// Scores of thousands give the value of the largest.
#[test]
fn large_scores_stay_finite() {
    let mut problem = Problem::new([1, 80, 80, 1, 4], 0, false, 100.0, 5);
    problem.inputs[2] = noise(8, 80 * 4);
    let outputs = problem.run::<f32>();
    assert!(outputs.iter().flatten().all(|x| x.is_finite()));
    assert!(outputs[0].iter().all(|y| y.abs() <= 1.0 + 1e-6));
}

/// A NaN in a key reaches every row that sees it, so that a loss shows it.
#[test]
fn nan_is_not_hidden() {
    let mut problem = Problem::new([1, 70, 70, 1, 2], 0, false, 1.0, 5);
    problem.inputs[1][10] = f64::NAN;
    let y = &problem.run::<f64>()[0];
    assert!(y[..10].iter().all(|y| y.is_finite()) && y[10..].iter().all(|y| y.is_nan()));
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let mut tape = Tape::new(Mode::Train);
    let (q, k) = (tape.input([2, 3, 8]), tape.input([2, 4, 8]));
    let places = positions(&mut tape, [2, 3], 3, None, None).unwrap();
    let message = attention(&mut tape, 2, [q, k, k], None, places).unwrap_err().to_string();
    assert!(message.contains("[2, 3, 8]") && message.contains("[2, 4, 8]"), "{message}");
    let message = attention(&mut tape, 3, [q, q, q], None, places).unwrap_err().to_string();
    assert!(message.contains("3 heads"), "{message}");
}
