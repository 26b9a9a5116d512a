//! Layer norm and root-mean-square norm over the whole of a row, or over each head of it, fused with
//! the sum before or the gate behind.
//!
//! LayerNorm(x) = (x - mean) / sqrt(var + eps) ∘ scale, RMSNorm(x) = x / sqrt(mean of
//! squares + eps) ∘ scale, with scale = w or 1 + w; then a bias may be added. The variance is the mean square of
//! x - mean, in a second pass over a row that is still in the cache: the one-pass formula
//! cancels where the mean is large.

use rayon::iter::Either;
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{
    CudaBackward, CudaForward, Next, Source, context::arguments, few_rows::Kind, few_rows::Preparation,
    launch::ROWS,
};
use crate::engine::operation::{Backward, Forward, Kernel, Slots, scratch};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::{add_to, sum, vectorize};
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::{TILE, gradient_tiles};

/// What is divided out of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Mean and standard deviation.
    Layer,
    /// The root of the mean square.
    RootMeanSquare,
}

/// How rows are normalised.
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

/// x (…, D), w (D), b (D, may be absent), added (…, D), gate (…, D), each of which may be absent
/// -> y (…, D) = sigmoid(gate) ∘ norm(s), s = x + added (…, D) where there is such; saved: mean and
/// 1/std of each group (…, 2 groups).
#[derive(Debug)]
struct Normed {
    norm: Norm,
    added: bool,
}

/// Inputs of [`Normed`].
const ADDED: usize = 3;
const GATE: usize = 4;

/// Records the norm of every row of x.
///
/// # Errors
/// When w or b is not as long as a row, or the groups do not divide it.
pub fn norm(tape: &mut Tape, x: Var, weight: Var, bias: Option<Var>, norm: Norm) -> Result<Var> {
    Ok(tape.record(Normed { norm, added: false }, &[Some(x), Some(weight), bias, None, None], &[])?[0])
}

/// Records s = x + added and the norm of every row of s, two different values of one shape; returns
/// s and the norm.
///
/// # Errors
/// As [`norm`], and when the shapes differ.
pub fn add_norm(
    tape: &mut Tape,
    [x, added]: [Var; 2],
    weight: Var,
    bias: Option<Var>,
    norm: Norm,
) -> Result<(Var, Var)> {
    let inputs = [Some(x), Some(weight), bias, Some(added), None];
    let outputs = tape.record(Normed { norm, added: true }, &inputs, &[])?;
    Ok((outputs[1], outputs[0]))
}

/// Records sigmoid(gate) ∘ the norm of every row of x, gate being of the shape of x.
///
/// # Errors
/// As [`norm`], and when the shapes differ.
pub fn gated_norm(
    tape: &mut Tape,
    x: Var,
    gate: Var,
    weight: Var,
    bias: Option<Var>,
    norm: Norm,
) -> Result<Var> {
    let inputs = [Some(x), Some(weight), bias, None, Some(gate)];
    Ok(tape.record(Normed { norm, added: false }, &inputs, &[])?[0])
}

impl Norm {
    /// What is added to the weight.
    pub(super) fn offset<T: Scalar>(&self) -> T {
        if self.unit_offset { T::ONE } else { T::ZERO }
    }
}

impl Normed {
    /// The output that holds the statistics.
    fn saved(&self) -> usize {
        if self.added { 2 } else { 1 }
    }
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("norm", include_str!("norm.cu"));

impl Kernel for Normed {
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
        if let Some(other) = [inputs[ADDED], inputs[GATE]].into_iter().flatten().find(|other| *other != x) {
            return Err(Error::shape(format!("x {x:?} and what is added or its gate {other:?} differ")));
        }
        let groups = self.norm.groups;
        if groups == 0 || !x.last().is_multiple_of(groups) {
            return Err(Error::shape(format!("{groups} groups do not divide the rows of x {x:?}")));
        }
        let statistics = x.with_last(2 * groups);
        Ok(if self.added { vec![x, x, statistics] } else { vec![x, statistics] })
    }

    fn reads(&self) -> Slots {
        // The bias where a gate's gradient needs the whole of y.
        if self.added { Slots::of(&[1], &[1, 2]) } else { Slots::of(&[0, 1, 2, GATE], &[1]) }
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[1, 2], &[self.saved()])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (y, saved) = (io.output(0), io.output(self.saved()));
        let sums = self.added.then(|| io.output(1));
        let (x, w, b) = (io.input(0), io.input(1), io.inputs[2]);
        let (added, gate) = (io.inputs[ADDED], io.inputs[GATE]);
        let (groups, offset) = (self.norm.groups, self.norm.offset::<T>());
        let (width, size) = (w.len(), w.len() / groups);
        let (tile, count) = (width * TILE, y.len().div_ceil(width * TILE));
        let sums = optional_tiles(sums, tile, count);
        let tiles = y.par_chunks_mut(tile).zip(saved.par_chunks_mut(2 * groups * TILE)).zip(sums);
        tiles.enumerate().for_each(|(i, ((y, saved), sums))| {
            let here = i * tile..i * tile + y.len();
            vectorize!(|| {
                let mut x = &x[here.clone()];
                if let (Some(sums), Some(added)) = (sums, added) {
                    for (s, (x, more)) in sums.iter_mut().zip(x.iter().zip(&added[here.clone()])) {
                        *s = *x + *more;
                    }
                    x = sums;
                }
                let rows = y.chunks_exact_mut(size).zip(x.chunks_exact(size));
                for (i, ((y, x), saved)) in rows.zip(saved.chunks_exact_mut(2)).enumerate() {
                    let w = &w[i % groups * size..][..size];
                    let [mean, inverse] = statistics(x, &self.norm);
                    for (y, (x, w)) in y.iter_mut().zip(x.iter().zip(w)) {
                        *y = (*x - mean) * inverse * (*w + offset);
                    }
                    if let Some(b) = b {
                        add_to(&b[i % groups * size..][..size], y);
                    }
                    saved.copy_from_slice(&[mean, inverse]);
                }
                if let Some(gate) = gate {
                    for (y, open) in y.iter_mut().zip(&gate[here.clone()]) {
                        *y *= open.sigmoid();
                    }
                }
            });
        });
    }

    /// With s = x + added, n = (s - mean) / std, d = dy ∘ sigmoid(gate) and g = d ∘ scale:
    /// t = ds + (g - mean(g) - n mean(g ∘ n)) / std, without mean(g) for RMSNorm; dx += t, dadded += t;
    /// dgate += d ∘ (n ∘ scale + b) ∘ (1 - sigmoid(gate)); dw += sum over rows of d ∘ n; db += sum over
    /// rows of d.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let Norm { kind, groups, .. } = self.norm;
        let (x, ds) = if self.added { (io.output(1), io.output_gradients[1]) } else { (io.input(0), None) };
        let (dy, w, saved) = (io.output_gradients[0], io.input(1), io.output(self.saved()));
        let (gate, b) = (io.inputs[GATE], io.inputs[2]);
        let (width, size, tile) = (w.len(), w.len() / groups, w.len() * TILE);
        let (offset, share) = (self.norm.offset::<T>(), T::from_f64(1.0 / size as f64));
        let count = x.len().div_ceil(tile);
        let dx = gradient_tiles(io.input_gradient(0), tile, count);
        let dadded = gradient_tiles(io.input_gradient(ADDED), tile, count);
        let dgate = gradient_tiles(io.input_gradient(GATE), tile, count);
        let (dw, db) = (io.input_gradient(1), io.input_gradient(2));
        // A tile's sums for dw and db, and a row of d and of t.
        let work = scratch(io.scratch, count * 4 * width);
        let tiles = work.par_chunks_mut(4 * width).zip(dx).zip(dadded).zip(dgate);
        tiles.enumerate().for_each(|(i, (((work, mut dx), mut dadded), mut dgate))| {
            let (dw, work) = work.split_at_mut(width);
            let (db, work) = work.split_at_mut(width);
            let (d, t) = work.split_at_mut(width);
            vectorize!(|| {
                dw.fill(T::ZERO);
                db.fill(T::ZERO);
                for row in 0..TILE.min((x.len() - i * tile) / width) {
                    let place = row * width..(row + 1) * width;
                    let here = i * tile + place.start..i * tile + place.end;
                    let (x, saved) = (&x[here.clone()], &saved[here.start / size * 2..][..2 * groups]);
                    match dy {
                        Some(dy) => d.copy_from_slice(&dy[here.clone()]),
                        None => d.fill(T::ZERO),
                    }
                    if let Some(gate) = gate {
                        let gate = &gate[here.clone()];
                        if let Some(dgate) = dgate.as_deref_mut() {
                            let parts = dgate[place.clone()].chunks_exact_mut(size).zip(d.chunks_exact(size));
                            for (group, (dgate, d)) in parts.enumerate() {
                                let (mean, inverse) = (saved[2 * group], saved[2 * group + 1]);
                                let at = group * size..(group + 1) * size;
                                let given = x[at.clone()].iter().zip(&w[at.clone()]).zip(&gate[at.clone()]);
                                for ((dgate, d), ((x, w), gate)) in dgate.iter_mut().zip(d).zip(given) {
                                    let open = gate.sigmoid();
                                    let normed = (*x - mean) * inverse * (*w + offset);
                                    *dgate += *d * normed * open * (T::ONE - open);
                                }
                                let Some(b) = b else { continue };
                                for ((dgate, d), (b, gate)) in
                                    dgate.iter_mut().zip(d).zip(b[at.clone()].iter().zip(&gate[at]))
                                {
                                    let open = gate.sigmoid();
                                    *dgate += *d * *b * open * (T::ONE - open);
                                }
                            }
                        }
                        for (d, gate) in d.iter_mut().zip(gate) {
                            *d *= gate.sigmoid();
                        }
                    }
                    add_to(d, db);
                    for group in 0..groups {
                        let at = group * size..(group + 1) * size;
                        let (mean, inverse) = (saved[2 * group], saved[2 * group + 1]);
                        let (d, x, w) = (&d[at.clone()], &x[at.clone()], &w[at.clone()]);
                        let [g_sum, gn_sum] = gradient_sums(d, x, w, mean, inverse, offset);
                        let g_mean = match kind {
                            NormKind::Layer => share * g_sum,
                            NormKind::RootMeanSquare => T::ZERO,
                        };
                        let gn_mean = share * gn_sum;
                        let results = t[at.clone()].iter_mut().zip(&mut dw[at]);
                        for ((t, dw), ((d, x), w)) in results.zip(d.iter().zip(x).zip(w)) {
                            let n = (*x - mean) * inverse;
                            *t = inverse * (*d * (*w + offset) - g_mean - n * gn_mean);
                            *dw = d.mul_add(n, *dw);
                        }
                    }
                    if let Some(ds) = ds {
                        add_to(&ds[here], t);
                    }
                    for to in [&mut dx, &mut dadded].into_iter().filter_map(|to| to.as_deref_mut()) {
                        add_to(t, &mut to[place.clone()]);
                    }
                }
            });
        });
        let tiles = || work.chunks_exact(4 * width);
        if let Some(dw) = dw {
            let dw = dw.cleared();
            tiles().for_each(|tile| add_to(&tile[..width], dw));
        }
        if let Some(db) = db {
            let db = db.cleared();
            tiles().for_each(|tile| add_to(&tile[width..2 * width], db));
        }
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::of(&[0, 1, 2, ADDED, GATE], &[])
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let shape = io.shapes.outputs[0];
        let Norm { kind, groups, eps, .. } = self.norm;
        let (rows, width) = (shape.rows(), shape.last());
        let left = io.next == Next::MultipliesOutput
            && io.queue.prepare(Preparation {
                kind: if kind == NormKind::Layer { Kind::Layer } else { Kind::MeanSquare },
                input: io.input(0),
                added: io.inputs[ADDED],
                gate: io.inputs[GATE],
                weight: io.inputs[1],
                bias: io.inputs[2],
                sum: self.added.then_some(io.outputs[1]),
                rows_out: Some(io.outputs[0]),
                groups,
                offset: self.norm.offset(),
                eps,
                size: [rows, width],
            });
        if left {
            return Ok(());
        }
        let arguments = arguments![
            io.input(0),
            io.inputs[ADDED],
            io.inputs[GATE],
            io.input(1),
            io.inputs[2],
            if self.added { io.outputs[1] } else { 0 },
            io.outputs[0],
            io.outputs[self.saved()],
            rows,
            width,
            groups,
            u32::from(kind == NormKind::Layer),
            self.norm.offset::<f64>(),
            eps
        ];
        let (name, count) = match chunks(width, groups) {
            Some(chunks) => (FORWARD[chunks - 1], rows),
            None => ("norm_forward", rows * groups),
        };
        io.queue.launch(&SOURCE, name, [count.div_ceil(8), 1, 1], 256, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let shape = io.shapes.outputs[0];
        let Norm { kind, groups, .. } = self.norm;
        let (rows, width) = (shape.rows(), shape.last());
        let chunks = chunks(width, groups);
        let tiles = match chunks {
            Some(_) => rows.div_ceil(WARPS).min(BLOCKS),
            None => rows.div_ceil(ROWS),
        };
        let (s, ds) = if self.added { (io.outputs[1], io.output_gradients[1]) } else { (io.input(0), None) };
        let dy = match io.output_gradients[0] {
            Some(dy) => dy,
            // The sum alone is read on: a gradient of zero.
            None => {
                let zeros = io.queue.scratch(shape.len())?;
                io.queue.zero(zeros, shape.len())?;
                zeros
            }
        };
        let (w, b, gate, saved) = (io.input(1), io.inputs[2], io.inputs[GATE], io.outputs[self.saved()]);
        let [dx, dadded, dgate] = [0, ADDED, GATE].map(|slot| io.input_gradients[slot]);
        let [dw, db] = [1, 2].map(|slot| io.input_gradients[slot]);
        let fresh = (0..).zip([0, ADDED, GATE]);
        let fresh: u32 = fresh.map(|(bit, slot)| u32::from(io.is_fresh(slot)) << bit).sum();
        let parts = io.queue.scratch(tiles * width)?;
        let bias_parts = db.map(|_| io.queue.scratch(tiles * width)).transpose()?;
        let arguments = arguments![
            dy,
            ds,
            s,
            gate,
            w,
            b,
            saved,
            dx,
            dadded,
            dgate,
            parts,
            bias_parts,
            rows,
            width,
            groups,
            u32::from(kind == NormKind::Layer),
            self.norm.offset::<f64>(),
            fresh
        ];
        match chunks {
            Some(chunks) => {
                let name = if db.is_some() { BACKWARD_BIAS[chunks - 1] } else { BACKWARD[chunks - 1] };
                io.queue.launch(&SOURCE, name, [tiles, 1, 1], 32 * WARPS, arguments)?;
            }
            None => {
                let grid = [(rows * groups).div_ceil(8), 1, 1];
                io.queue.launch(&SOURCE, "norm_backward", grid, 256, arguments)?;
                let grid = [width.div_ceil(128), tiles, 1];
                let arguments = arguments![dy, s, gate, saved, parts, rows, width, groups];
                io.queue.launch(&SOURCE, "norm_parts", grid, 128, arguments)?;
                if let Some(parts) = bias_parts {
                    let arguments = arguments![dy, gate, parts, rows, width];
                    io.queue.launch(&SOURCE, "norm_bias_parts", grid, 128, arguments)?;
                }
            }
        }
        for (parts, sums, slot) in [(Some(parts), dw, 1), (bias_parts, db, 2)] {
            if let (Some(parts), Some(sums)) = (parts, sums) {
                io.queue.give_parts(parts, tiles, width, (sums, io.is_fresh(slot)))?;
            }
        }
        Ok(())
    }
}

/// Warps of a block of their backward, WARPS of norm.cu, and the most blocks: three for each of an H100's
/// multiprocessors, as many as it holds. A number of its own on every card would be another sum on each.
#[cfg(feature = "cuda")]
const WARPS: usize = 4;
#[cfg(feature = "cuda")]
const BLOCKS: usize = 384;

/// Kernels for rows that a warp keeps in registers, by chunks of 256 columns.
#[cfg(feature = "cuda")]
const FORWARD: [&str; 4] =
    ["norm_row_forward_1", "norm_row_forward_2", "norm_row_forward_3", "norm_row_forward_4"];
#[cfg(feature = "cuda")]
const BACKWARD: [&str; 4] =
    ["norm_row_backward_1", "norm_row_backward_2", "norm_row_backward_3", "norm_row_backward_4"];
#[cfg(feature = "cuda")]
const BACKWARD_BIAS: [&str; 4] = [
    "norm_row_backward_bias_1",
    "norm_row_backward_bias_2",
    "norm_row_backward_bias_3",
    "norm_row_backward_bias_4",
];

/// The chunks of a row that those take: its groups are itself, whole chunks or a power of two of lanes.
#[cfg(feature = "cuda")]
fn chunks(width: usize, groups: usize) -> Option<usize> {
    let (chunks, size) = (width.div_ceil(256), width / groups);
    let whole =
        size.is_multiple_of(8) && (groups == 1 || size.is_multiple_of(256) || 256usize.is_multiple_of(size));
    (whole && chunks <= FORWARD.len()).then_some(chunks)
}

/// The tiles of an output that may be absent: then None, `count` times.
fn optional_tiles<T: Scalar>(
    output: Option<&mut [T]>,
    tile: usize,
    count: usize,
) -> impl IndexedParallelIterator<Item = Option<&mut [T]>> {
    match output {
        Some(output) => Either::Left(output.par_chunks_mut(tile).map(Some)),
        None => Either::Right((0..count).into_par_iter().map(|_| None)),
    }
}

/// Independent partial sums, as in [`dot`](crate::engine::vector::dot).
const LANES: usize = 16;

/// Mean, which is taken to be zero by the root-mean-square norm, and 1 / std of a group.
#[inline(always)]
pub(super) fn statistics<T: Scalar>(x: &[T], norm: &Norm) -> [T; 2] {
    let share = T::from_f64(1.0 / x.len() as f64);
    let mean = match norm.kind {
        NormKind::Layer => share * total(x),
        NormKind::RootMeanSquare => T::ZERO,
    };
    [mean, T::ONE / share.mul_add(square_distance(x, mean), T::from_f64(norm.eps)).sqrt()]
}

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
pub(super) fn gradient_sums<T: Scalar>(dy: &[T], x: &[T], w: &[T], mean: T, inverse: T, offset: T) -> [T; 2] {
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
    use crate::engine::{Executor, Mode};
    use crate::ops::activation::{Activation, gated};
    use crate::ops::add::add;
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

    /// With a sum before it, of which both are read on, the first or the last alone; with a gate behind.
    #[test]
    fn gradients_of_fused_norms() {
        for (kind, width, groups) in [
            (NormKind::Layer, 37, 1),
            (NormKind::RootMeanSquare, 12, 3),
            (NormKind::Layer, 64, 2),
            (NormKind::RootMeanSquare, 16, 1),
        ] {
            let options = settings(kind, groups, false);
            let case = Check::new().input([2, 35, width]).input([2, 35, width]).input([width]).input([width]);
            case.run(|tape, v, _| {
                let (s, y) = add_norm(tape, [v[0], v[1]], v[2], Some(v[3]), options)?;
                let (t, z) = add_norm(tape, [s, y], v[2], None, options)?;
                Ok(vec![s, t, z])
            });
            let plain = Check::new().input([2, 35, width]).input([2, 35, width]).input([width]);
            plain.run(|tape, v, _| Ok(vec![add_norm(tape, [v[0], v[1]], v[2], None, options)?.1]));
            plain.run(|tape, v, _| Ok(vec![add_norm(tape, [v[0], v[1]], v[2], None, options)?.0]));
            case.run(|tape, v, _| {
                let y = gated_norm(tape, v[0], v[1], v[2], Some(v[3]), options)?;
                Ok(vec![y, gated_norm(tape, v[1], v[0], v[3], None, options)?])
            });
        }
    }

    /// They are what the operations one after the other are.
    #[test]
    fn fused_norms_are_their_parts() -> Result<()> {
        let mut tape = Tape::new(Mode::Evaluate);
        let (x, other, w) = (tape.input([5, 24]), tape.input([5, 24]), tape.input([24]));
        let options = settings(NormKind::Layer, 3, true);
        let (s, y) = add_norm(&mut tape, [x, other], w, None, options)?;
        let sum = add(&mut tape, x, other)?;
        let normed = norm(&mut tape, sum, w, None, options)?;
        let h = gated_norm(&mut tape, x, other, w, None, options)?;
        let plain = norm(&mut tape, x, w, None, options)?;
        let product = gated(&mut tape, other, plain, Activation::Sigmoid)?;
        let pairs = [(s, sum), (y, normed), (h, product)];
        pairs.iter().for_each(|&(a, b)| [a, b].into_iter().for_each(|var| tape.keep(var)));
        let mut executor = Executor::<f64>::new(tape);
        for (seed, var) in (1..).zip([x, other, w]) {
            let values = noise(seed, executor.input_mut(var).len());
            executor.input_mut(var).copy_from_slice(&values);
        }
        executor.forward(&[]);
        for (a, b) in pairs {
            assert_eq!(executor.value(a), executor.value(b));
        }
        Ok(())
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
