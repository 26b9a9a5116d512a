//! Layer norm and root-mean-square norm over the whole of a row, or over each head of it.
//!
//! LayerNorm(x) = (x - mean) / sqrt(var + eps) ∘ scale, RMSNorm(x) = x / sqrt(mean of
//! squares + eps) ∘ scale, with scale = w or 1 + w; then a bias may be added. The variance is the mean square of
//! x - mean, in a second pass over a row that is still in the cache: the one-pass formula
//! cancels where the mean is large.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments, launch::ROWS};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::{add_to, sum, vectorize};
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::TILE;
use crate::ops::linear::{reduce_tiles, sum_rows};

/// What is divided out of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Mean and standard deviation.
    Layer,
    /// The root of the mean square.
    RootMeanSquare,
}

/// x (…, D), w (D), b (D, may be absent) -> y (…, D); saved: mean and 1/std of each group
/// (…, 2 groups).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// What is divided out.
    pub kind: NormKind,
    /// Equal pieces of the last dimension, each normalised by itself: 1 for a block's
    /// norm, the number of heads for the multi-head norm.
    pub groups: usize,
    /// Added to the variance or mean square.
    pub eps: f64,
    /// Scale by 1 + w, so that weight decay pulls the scale to 1.
    pub unit_offset: bool,
}

/// Records the norm of every row of x.
///
/// # Errors
/// When w or b is not as long as a row, or the groups do not divide it.
pub fn norm(tape: &mut Tape, x: Var, weight: Var, bias: Option<Var>, norm: Norm) -> Result<Var> {
    Ok(tape.record(norm, &[Some(x), Some(weight), bias], &[])?[0])
}

impl Norm {
    fn offset<T: Scalar>(&self) -> T {
        if self.unit_offset { T::ONE } else { T::ZERO }
    }
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("norm", include_str!("norm.cu"));

impl Kernel for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let (Some(x), Some(w)) = (inputs[0], inputs[1]) else {
            return Err(Error::shape("x and w are needed"));
        };
        if x.last() != w.len() {
            return Err(Error::shape(format!("x {x:?} and w {w:?} differ in their last dimension")));
        }
        if let Some(b) = inputs[2].filter(|b| b.len() != w.len()) {
            return Err(Error::shape(format!("w {w:?} and b {b:?} differ in length")));
        }
        if self.groups == 0 || !x.last().is_multiple_of(self.groups) {
            return Err(Error::shape(format!("{} groups do not divide the rows of x {x:?}", self.groups)));
        }
        Ok(vec![x, x.with_last(2 * self.groups)])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[0, 1], &[1])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[1, 2], &[1])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (y, saved) = (io.output(0), io.output(1));
        let (x, w, b) = (io.input(0), io.input(1), io.inputs[2]);
        let (width, size) = (w.len(), w.len() / self.groups);
        let (offset, eps) = (self.offset::<T>(), T::from_f64(self.eps));
        let share = T::from_f64(1.0 / size as f64);
        let tiles = y.par_chunks_mut(width * TILE).zip(saved.par_chunks_mut(2 * self.groups * TILE));
        tiles.zip(x.par_chunks(width * TILE)).for_each(|((y, saved), x)| {
            vectorize!(|| {
                let groups = y.chunks_exact_mut(size).zip(x.chunks_exact(size));
                for (i, ((y, x), saved)) in groups.zip(saved.chunks_exact_mut(2)).enumerate() {
                    let w = &w[i % self.groups * size..][..size];
                    let mean = match self.kind {
                        NormKind::Layer => share * total(x),
                        NormKind::RootMeanSquare => T::ZERO,
                    };
                    let inverse = T::ONE / (share.mul_add(square_distance(x, mean), eps)).sqrt();
                    for (y, (x, w)) in y.iter_mut().zip(x.iter().zip(w)) {
                        *y = (*x - mean) * inverse * (*w + offset);
                    }
                    if let Some(b) = b {
                        add_to(&b[i % self.groups * size..][..size], y);
                    }
                    saved.copy_from_slice(&[mean, inverse]);
                }
            });
        });
    }

    /// With n = (x - mean) / std and g = dy ∘ scale: dx += (g - mean(g) - n mean(g ∘ n)) /
    /// std, without mean(g) for RMSNorm; dw += sum over rows of dy ∘ n;
    /// db += sum over rows of dy.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let (dy, x, w, saved) = (io.gradient(), io.input(0), io.input(1), io.output(1));
        let (width, size) = (w.len(), w.len() / self.groups);
        let offset = self.offset::<T>();
        let share = T::from_f64(1.0 / size as f64);
        if let Some(dx) = io.input_gradient(0) {
            let tiles = dx.tiles(width * TILE).zip(dy.par_chunks(width * TILE));
            let tiles = tiles.zip(x.par_chunks(width * TILE)).zip(saved.par_chunks(2 * self.groups * TILE));
            tiles.for_each(|(((dx, dy), x), saved)| {
                vectorize!(|| {
                    let groups = dx.chunks_exact_mut(size).zip(dy.chunks_exact(size));
                    let groups = groups.zip(x.chunks_exact(size)).zip(saved.chunks_exact(2));
                    for (i, (((dx, dy), x), saved)) in groups.enumerate() {
                        let w = &w[i % self.groups * size..][..size];
                        let (mean, inverse) = (saved[0], saved[1]);
                        let [g_sum, gn_sum] = gradient_sums(dy, x, w, mean, inverse, offset);
                        let g_mean = match self.kind {
                            NormKind::Layer => share * g_sum,
                            NormKind::RootMeanSquare => T::ZERO,
                        };
                        let gn_mean = share * gn_sum;
                        for (dx, ((dy, x), w)) in dx.iter_mut().zip(dy.iter().zip(x).zip(w)) {
                            let n = (*x - mean) * inverse;
                            let g = *dy * (*w + offset);
                            *dx = inverse.mul_add(g - g_mean - n * gn_mean, *dx);
                        }
                    }
                });
            });
        }
        if let Some(dw) = io.input_gradient(1) {
            reduce_tiles(
                x.len() / width,
                width,
                dw.cleared(),
                io.scratch,
                #[inline(always)]
                |rows, partial| {
                    for row in rows {
                        let at = row * width..(row + 1) * width;
                        let groups = partial.chunks_exact_mut(size).zip(dy[at.clone()].chunks_exact(size));
                        let saved = saved[row * 2 * self.groups..].chunks_exact(2);
                        for ((dw, dy), (x, saved)) in groups.zip(x[at].chunks_exact(size).zip(saved)) {
                            let (mean, inverse) = (saved[0], saved[1]);
                            for (dw, (dy, x)) in dw.iter_mut().zip(dy.iter().zip(x)) {
                                *dw = (*dy * inverse).mul_add(*x - mean, *dw);
                            }
                        }
                    }
                },
            );
        }
        if let Some(db) = io.input_gradient(2) {
            sum_rows(dy, width, db.cleared(), io.scratch);
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let shape = io.shapes.outputs[0];
        let (count, size) = (shape.rows() * self.groups, shape.last() / self.groups);
        let arguments = arguments![
            io.input(0),
            io.input(1),
            io.inputs[2],
            io.outputs[0],
            io.outputs[1],
            count as u64,
            self.groups,
            size,
            u32::from(self.kind == NormKind::Layer),
            self.offset::<f64>(),
            self.eps
        ];
        io.queue.launch(&SOURCE, "norm_forward", [count.div_ceil(8), 1, 1], 256, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let shape = io.shapes.outputs[0];
        let (rows, width) = (shape.rows(), shape.last());
        let (count, size) = (rows * self.groups, width / self.groups);
        let (dy, x, saved) = (io.gradient(), io.input(0), io.outputs[1]);
        if let Some(dx) = io.input_gradients[0] {
            let arguments = arguments![
                dy,
                x,
                io.input(1),
                saved,
                dx,
                count as u64,
                self.groups,
                size,
                u32::from(self.kind == NormKind::Layer),
                self.offset::<f64>()
            ];
            io.queue.launch(&SOURCE, "norm_backward", [count.div_ceil(8), 1, 1], 256, arguments)?;
        }
        if let Some(db) = io.input_gradients[2] {
            io.queue.add_rows(dy, false, rows, width, db)?;
        }
        let Some(dw) = io.input_gradients[1] else { return Ok(()) };
        let tiles = rows.div_ceil(ROWS);
        let parts = io.queue.scratch(tiles * width)?;
        let arguments = arguments![dy, x, saved, parts, rows, width, self.groups, size];
        io.queue.launch(&SOURCE, "norm_parts", [width.div_ceil(128), tiles, 1], 128, arguments)?;
        io.queue.add_parts(parts, tiles, width, dw)
    }
}

/// Independent partial sums, as in [`dot`](crate::engine::vector::dot).
const LANES: usize = 16;

/// Sum of x.
#[inline(always)]
fn total<T: Scalar>(x: &[T]) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = *x;
    }
    for x in chunks {
        for lane in 0..LANES {
            lanes[lane] += x[lane];
        }
    }
    sum(&lanes)
}

/// Sum of (x - mean)².
#[inline(always)]
fn square_distance<T: Scalar>(x: &[T], mean: T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let chunks = x.chunks_exact(LANES);
    for (lane, x) in chunks.remainder().iter().enumerate() {
        lanes[lane] = (*x - mean) * (*x - mean);
    }
    for x in chunks {
        for lane in 0..LANES {
            let d = x[lane] - mean;
            lanes[lane] = d.mul_add(d, lanes[lane]);
        }
    }
    sum(&lanes)
}

/// Sums of g and of g ∘ n, with n = (x - mean) / std and g = dy ∘ (w + offset).
#[inline(always)]
fn gradient_sums<T: Scalar>(dy: &[T], x: &[T], w: &[T], mean: T, inverse: T, offset: T) -> [T; 2] {
    let (mut g_lanes, mut gn_lanes) = ([T::ZERO; LANES], [T::ZERO; LANES]);
    let (dys, xs, ws) = (dy.chunks_exact(LANES), x.chunks_exact(LANES), w.chunks_exact(LANES));
    let rest = dys.remainder().iter().zip(xs.remainder()).zip(ws.remainder());
    for (lane, ((dy, x), w)) in rest.enumerate() {
        let g = *dy * (*w + offset);
        g_lanes[lane] = g;
        gn_lanes[lane] = g * (*x - mean);
    }
    for ((dy, x), w) in dys.zip(xs).zip(ws) {
        for lane in 0..LANES {
            let g = dy[lane] * (w[lane] + offset);
            g_lanes[lane] += g;
            gn_lanes[lane] = g.mul_add(x[lane] - mean, gn_lanes[lane]);
        }
    }
    [sum(&g_lanes), sum(&gn_lanes) * inverse]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Mode;
    use crate::ops::check::{Check, noise};

    fn settings(kind: NormKind, groups: usize, unit_offset: bool) -> Norm {
        Norm { kind, groups, eps: 1e-5, unit_offset }
    }

    #[test]
    fn gradients() {
        for kind in [NormKind::Layer, NormKind::RootMeanSquare] {
            for (width, groups) in [(37, 1), (12, 3), (64, 2)] {
                for unit_offset in [false, true] {
                    let options = settings(kind, groups, unit_offset);
                    Check::new()
                        .input([2, 35, width])
                        .input([width])
                        .run(|tape, v, _| Ok(vec![norm(tape, v[0], v[1], None, options)?]));
                    Check::new()
                        .input([2, 35, width])
                        .input([width])
                        .input([width])
                        .run(|tape, v, _| Ok(vec![norm(tape, v[0], v[1], Some(v[2]), options)?]));
                }
            }
        }
    }

    /// A mean a thousand times the spread costs no more digits than storing it does.
    #[test]
    fn a_large_mean_does_not_cancel() {
        let values = noise(1, 4 * 48).iter().map(|x| 1000.0 + x).collect();
        Check::new()
            .input_of([4, 48], values)
            .input([48])
            .tolerance_f32(1e-3)
            .run(|tape, v, _| Ok(vec![norm(tape, v[0], v[1], None, settings(NormKind::Layer, 1, false))?]));
    }

    #[test]
    fn groups_that_do_not_divide_are_refused() {
        let mut tape = Tape::new(Mode::Train);
        let (x, w) = (tape.input([2, 10]), tape.input([10]));
        let message =
            norm(&mut tape, x, w, None, settings(NormKind::Layer, 3, false)).unwrap_err().to_string();
        assert!(message.contains("3 groups") && message.contains("[2, 10]"), "{message}");
    }
}
