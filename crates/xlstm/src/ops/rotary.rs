//! Rotary positions (Su et al. 2021): each head's features as pairs, turned by an angle that
//! grows with the position, so that q · k depends on the distance alone.
//!
//! Pair i of a head of size N holds features i and N/2 + i; its angle at position p is
//! p · base^(-2i/N). Sines and cosines are worked out once for all layers.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::vectorize;
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::TILE;
use crate::ops::positions::whole;

/// position (B, S) -> cosines, then sines, of the pairs' angles (B, S, N).
#[derive(Debug)]
struct Angles {
    size: usize,
    base: f64,
}

/// Records cosines and sines (B, S, N) for heads of `size` N at positions (B, S).
///
/// # Errors
/// When the size is odd, or the base not positive.
pub fn angles(tape: &mut Tape, position: Var, size: usize, base: f64) -> Result<Var> {
    Ok(tape.record(Angles { size, base }, &[Some(position)], &[])?[0])
}

/// x (B, S, NH N), angles (B, S, N) -> y (B, S, NH N).
#[derive(Debug)]
struct Rotary;

/// Records the turning of x (B, S, NH N) by [`angles`] (B, S, N).
///
/// # Errors
/// When shapes do not fit.
pub fn rotary(tape: &mut Tape, x: Var, angles: Var) -> Result<Var> {
    Ok(tape.record(Rotary, &[Some(x), Some(angles)], &[])?[0])
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("rotary", include_str!("rotary.cu"));

impl Kernel for Angles {
    fn name(&self) -> &'static str {
        "angles"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let Some(position) = inputs[0].filter(|p| p.dims().len() == 2) else {
            return Err(Error::shape("positions are (batch, length)"));
        };
        if self.size == 0 || !self.size.is_multiple_of(2) {
            return Err(Error::shape(format!(
                "rotary positions turn pairs, of which a head of {} features does not consist",
                self.size
            )));
        }
        if self.base.is_nan() || self.base <= 0.0 {
            return Err(Error::shape(format!("the base of rotary positions is {}, not positive", self.base)));
        }
        Ok(vec![[position.dims()[0], position.dims()[1], self.size].into()])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[], &[])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[0], &[0])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (y, position) = (io.output(0), io.input(0));
        let half = self.size / 2;
        let step = -2.0 * self.base.ln() / self.size as f64;
        y.par_chunks_mut(self.size * TILE).zip(position.par_chunks(TILE)).for_each(|(y, position)| {
            for (y, position) in y.chunks_exact_mut(self.size).zip(position) {
                let (cosines, sines) = y.split_at_mut(half);
                for (i, (cosine, sine)) in cosines.iter_mut().zip(sines).enumerate() {
                    let (s, c) = (whole(*position) as f64 * (step * i as f64).exp()).sin_cos();
                    (*cosine, *sine) = (T::from_f64(c), T::from_f64(s));
                }
            }
        });
    }

    /// Positions are whole numbers and have no gradient.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        if let Some(position) = io.input_gradient(0) {
            position.cleared();
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let n = io.shapes.outputs[0].len() / 2;
        let arguments = arguments![io.input(0), io.outputs[0], n as u64, self.size / 2, self.base.ln()];
        io.queue.launch_each(&SOURCE, "rotary_angles", n, arguments)
    }

    /// Positions are whole numbers and have no gradient.
    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, _: &mut CudaBackward<'_>) -> Result<()> {
        Ok(())
    }
}

/// The two halves of a head turned by the angles, forwards or, with `back`, backwards; handed
/// with their place to `put`.
#[inline(always)]
fn turn<T: Scalar>(x: &[T], angles: &[T], back: bool, to: &mut [T], put: impl Fn(&mut T, T)) {
    let half = x.len() / 2;
    let (low, high) = x.split_at(half);
    let (cosines, sines) = angles.split_at(half);
    let (to_low, to_high) = to.split_at_mut(half);
    let parts = low.iter().zip(high).zip(cosines.iter().zip(sines));
    for ((to_low, to_high), ((low, high), (cosine, sine))) in to_low.iter_mut().zip(to_high).zip(parts) {
        let sine = if back { -*sine } else { *sine };
        put(to_low, *low * *cosine - *high * sine);
        put(to_high, *high * *cosine + *low * sine);
    }
}

impl Kernel for Rotary {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let (Some(x), Some(angles)) = (inputs[0], inputs[1]) else {
            return Err(Error::shape("x and angles are needed"));
        };
        let fits = x.dims().len() == 3
            && angles.dims().len() == 3
            && x.dims()[..2] == angles.dims()[..2]
            && angles.last() > 0
            && x.last().is_multiple_of(angles.last());
        if !fits {
            return Err(Error::shape(format!("x {x:?} and angles {angles:?} do not fit together")));
        }
        Ok(vec![x])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[1], &[])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[1], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (y, x, angles) = (io.output(0), io.input(0), io.input(1));
        let (width, size) = (io.shapes.input(0).last(), io.shapes.input(1).last());
        let given = x.par_chunks(width * TILE).zip(angles.par_chunks(size * TILE));
        y.par_chunks_mut(width * TILE).zip(given).for_each(|(y, (x, angles))| {
            vectorize!(|| {
                let rows = y.chunks_exact_mut(width).zip(x.chunks_exact(width));
                for ((y, x), angles) in rows.zip(angles.chunks_exact(size)) {
                    for (y, x) in y.chunks_exact_mut(size).zip(x.chunks_exact(size)) {
                        turn(x, angles, false, y, |to, value| *to = value);
                    }
                }
            });
        });
    }

    /// dx += dy turned back.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        if let Some(angles) = io.input_gradient(1) {
            angles.cleared();
        }
        let Some(dx) = io.input_gradient(0) else { return };
        let (dy, angles) = (io.gradient(), io.input(1));
        let (width, size) = (io.shapes.input(0).last(), io.shapes.input(1).last());
        let given = dy.par_chunks(width * TILE).zip(angles.par_chunks(size * TILE));
        dx.tiles(width * TILE).zip(given).for_each(|(dx, (dy, angles))| {
            vectorize!(|| {
                let rows = dx.chunks_exact_mut(width).zip(dy.chunks_exact(width));
                for ((dx, dy), angles) in rows.zip(angles.chunks_exact(size)) {
                    for (dx, dy) in dx.chunks_exact_mut(size).zip(dy.chunks_exact(size)) {
                        turn(dy, angles, true, dx, |to, value| *to += value);
                    }
                }
            });
        });
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let n = io.shapes.outputs[0].len() / 2;
        let (width, size) = (io.shapes.input(0).last(), io.shapes.input(1).last());
        let arguments = arguments![io.input(0), io.input(1), io.outputs[0], n as u64, width, size];
        io.queue.launch_each(&SOURCE, "rotary_forward", n, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let Some(dx) = io.input_gradients[0] else { return Ok(()) };
        let n = io.shapes.outputs[0].len() / 2;
        let (width, size) = (io.shapes.input(0).last(), io.shapes.input(1).last());
        let arguments = arguments![io.gradient(), io.input(1), dx, n as u64, width, size];
        io.queue.launch_each(&SOURCE, "rotary_backward", n, arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Executor, Mode};
    use crate::ops::check::{Check, noise};

    #[test]
    fn gradients() {
        for (heads, size) in [(1, 2), (3, 6), (2, 32)] {
            let positions = (0..70).map(|i| f64::from(i % 35)).collect();
            let check = Check::new().input([2, 35, heads * size]).input_of([2, 35], positions);
            check.run(|tape, v, _| {
                let table = angles(tape, v[1], size, 100.0)?;
                Ok(vec![rotary(tape, v[0], table)?])
            });
        }
    }

    /// q at p and k at p' give what they give at p + 1000 and p' + 1000; and angles are those of
    /// the formula.
    #[test]
    fn only_distances_count() {
        const SIZE: usize = 8;
        let turned = |seed: u64, p: f64| -> Vec<f64> {
            let mut tape = Tape::new(Mode::Evaluate);
            let (x, position) = (tape.input([1, 1, SIZE]), tape.input([1, 1]));
            let table = angles(&mut tape, position, SIZE, 10_000.0).unwrap();
            let y = rotary(&mut tape, x, table).unwrap();
            tape.keep(y);
            let mut executor = Executor::<f64>::new(tape);
            executor.input_mut(x).copy_from_slice(&noise(seed, SIZE));
            executor.input_mut(position)[0] = p;
            executor.forward(&[]);
            executor.value(y).to_vec()
        };
        let score =
            |p: f64, q: f64| -> f64 { turned(1, p).iter().zip(turned(2, q)).map(|(a, b)| a * b).sum() };
        assert!((score(5.0, 2.0) - score(1005.0, 1002.0)).abs() < 1e-9);
        assert!((score(5.0, 2.0) - score(5.0, 3.0)).abs() > 1e-3);
        let (x, y) = (noise(1, SIZE), turned(1, 3.0));
        for i in 0..SIZE / 2 {
            let angle = 3.0 / 10_000f64.powf(2.0 * i as f64 / SIZE as f64);
            let want = x[i] * angle.cos() - x[SIZE / 2 + i] * angle.sin();
            assert!((y[i] - want).abs() < 1e-12);
            let want = x[SIZE / 2 + i] * angle.cos() + x[i] * angle.sin();
            assert!((y[SIZE / 2 + i] - want).abs() < 1e-12);
        }
    }

    #[test]
    fn odd_heads_are_refused() {
        let mut tape = Tape::new(Mode::Train);
        let position = tape.input([2, 3]);
        let message = angles(&mut tape, position, 5, 10_000.0).unwrap_err().to_string();
        assert!(message.contains("a head of 5 features"), "{message}");
    }
}
