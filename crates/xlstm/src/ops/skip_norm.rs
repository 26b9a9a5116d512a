//! y = (norm(h) + s ∘ x) ∘ SiLU(z): the norm of each head, the learnable skip and the output gate of the mLSTM block,
//! in one pass over its tensors.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments, launch::ROWS};
use crate::engine::operation::{Backward, Forward, Kernel, Slots, scratch};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::{add_to, vectorize};
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::activation::Activation::Swish;
use crate::ops::norm::{Norm, NormKind, gradient_sums, statistics};
use crate::ops::{TILE, gradient_tiles};

/// h (…, E), w (E), s (E), x (…, E), z (…, E) -> y (…, E); saved: mean and 1/std of each group (…, 2 groups).
#[derive(Debug)]
struct SkipNorm(Norm);

/// Records (norm(h) + skip ∘ x) ∘ SiLU(z), with the weight of the norm; h, x and z are three different values.
///
/// # Errors
/// When h, x and z differ in shape, the weight or the skip is not as long as a row, or the norm's groups do not
/// divide it.
pub fn skip_norm(
    tape: &mut Tape,
    h: Var,
    weight: Var,
    skip: Var,
    [x, z]: [Var; 2],
    norm: Norm,
) -> Result<Var> {
    Ok(tape.record(SkipNorm(norm), &[h, weight, skip, x, z].map(Some), &[])?[0])
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("skip_norm", include_str!("skip_norm.cu"));

impl Kernel for SkipNorm {
    fn name(&self) -> &'static str {
        "skip_norm"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let [Some(h), Some(weight), Some(skip), Some(x), Some(z)] = *inputs else {
            return Err(Error::shape("h, the norm's weight, skip, x and z are needed"));
        };
        if h != x || h != z || weight.len() != h.last() || skip.len() != h.last() {
            let given = format!("h {h:?}, weight {weight:?}, skip {skip:?}, x {x:?} and z {z:?}");
            return Err(Error::shape(given + " do not fit"));
        }
        let groups = self.0.groups;
        if groups == 0 || !h.last().is_multiple_of(groups) {
            return Err(Error::shape(format!("{groups} groups do not divide the rows of h {h:?}")));
        }
        Ok(vec![h, h.with_last(2 * groups)])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[0, 1, 2, 3, 4], &[1])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[1, 2], &[1])
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::of(&[0, 1, 2, 3, 4], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (y, saved) = (io.output(0), io.output(1));
        let [h, w, skip, x, z] = [0, 1, 2, 3, 4].map(|slot| io.input(slot));
        let (groups, offset) = (self.0.groups, self.0.offset::<T>());
        let (size, tile) = (w.len() / groups, w.len() * TILE);
        let tiles = y.par_chunks_mut(tile).zip(saved.par_chunks_mut(2 * groups * TILE));
        let given = h.par_chunks(tile).zip(x.par_chunks(tile)).zip(z.par_chunks(tile));
        tiles.zip(given).for_each(|((y, saved), ((h, x), z))| {
            vectorize!(|| {
                let heads = h.chunks_exact(size).zip(x.chunks_exact(size)).zip(z.chunks_exact(size));
                let results = y.chunks_exact_mut(size).zip(saved.chunks_exact_mut(2));
                for (i, ((y, saved), ((h, x), z))) in results.zip(heads).enumerate() {
                    let at = i % groups * size..(i % groups + 1) * size;
                    let [mean, inverse] = statistics(h, &self.0);
                    let columns = w[at.clone()].iter().zip(&skip[at]);
                    let row = h.iter().zip(x).zip(z).zip(columns);
                    for (y, (((h, x), z), (w, s))) in y.iter_mut().zip(row) {
                        let normed = (*h - mean) * inverse * (*w + offset);
                        *y = s.mul_add(*x, normed) * Swish.value(*z);
                    }
                    saved.copy_from_slice(&[mean, inverse]);
                }
            });
        });
    }

    /// With a = dy ∘ SiLU(z), n = (h - mean) / std and g = a ∘ scale:
    /// dh += (g - mean(g) - n mean(g ∘ n)) / std, without mean(g) for RMSNorm; dx += a ∘ s;
    /// dz += dy ∘ (n ∘ scale + s ∘ x) ∘ SiLU'(z); dw += sum over rows of a ∘ n; ds += sum over rows of a ∘ x.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let [h, w, skip, x, z] = [0, 1, 2, 3, 4].map(|slot| io.input(slot));
        let (dy, saved) = (io.gradient(), io.output(1));
        let (groups, offset) = (self.0.groups, self.0.offset::<T>());
        let (width, size, tile) = (w.len(), w.len() / groups, w.len() * TILE);
        let share = T::from_f64(1.0 / size as f64);
        let count = dy.len().div_ceil(tile);
        let dh = gradient_tiles(io.input_gradient(0), tile, count);
        let dx = gradient_tiles(io.input_gradient(3), tile, count);
        let dz = gradient_tiles(io.input_gradient(4), tile, count);
        let (dw, dskip) = (io.input_gradient(1), io.input_gradient(2));
        // A tile's sums for dw and ds, and a head of a and of dy ∘ SiLU'(z).
        let space = 2 * (width + size);
        let work = scratch(io.scratch, count * space);
        let tiles = work.par_chunks_mut(space).zip(dh).zip(dx).zip(dz);
        tiles.enumerate().for_each(|(i, (((work, mut dh), mut dx), mut dz))| {
            let (dw, work) = work.split_at_mut(width);
            let (dskip, work) = work.split_at_mut(width);
            let (a, b) = work.split_at_mut(size);
            vectorize!(|| {
                dw.fill(T::ZERO);
                dskip.fill(T::ZERO);
                for head in 0..(dy.len() - i * tile).min(tile) / size {
                    let place = head * size..(head + 1) * size;
                    let here = i * tile + place.start..i * tile + place.end;
                    let at = head % groups * size..(head % groups + 1) * size;
                    let (dy, h) = (&dy[here.clone()], &h[here.clone()]);
                    let (x, z) = (&x[here.clone()], &z[here.clone()]);
                    let (w, s) = (&w[at.clone()], &skip[at.clone()]);
                    let (mean, inverse) = (saved[here.start / size * 2], saved[here.start / size * 2 + 1]);
                    for ((a, b), (dy, z)) in a.iter_mut().zip(&mut *b).zip(dy.iter().zip(z)) {
                        let (value, slope) = Swish.value_and_derivative(*z);
                        (*a, *b) = (*dy * value, *dy * slope);
                    }
                    if let Some(dz) = &mut dz {
                        let row = b.iter().zip(h).zip(x).zip(w.iter().zip(s));
                        for (dz, (((b, h), x), (w, s))) in dz[place.clone()].iter_mut().zip(row) {
                            let normed = (*h - mean) * inverse * (*w + offset);
                            *dz = b.mul_add(s.mul_add(*x, normed), *dz);
                        }
                    }
                    if let Some(dx) = &mut dx {
                        for (dx, (a, s)) in dx[place.clone()].iter_mut().zip(a.iter().zip(s)) {
                            *dx = a.mul_add(*s, *dx);
                        }
                    }
                    let sums = dw[at.clone()].iter_mut().zip(&mut dskip[at]);
                    for ((dw, dskip), (a, (h, x))) in sums.zip(a.iter().zip(h.iter().zip(x))) {
                        *dw = a.mul_add((*h - mean) * inverse, *dw);
                        *dskip = a.mul_add(*x, *dskip);
                    }
                    if let Some(dh) = &mut dh {
                        let [g_sum, gn_sum] = gradient_sums(a, h, w, mean, inverse, offset);
                        let g_mean = match self.0.kind {
                            NormKind::Layer => share * g_sum,
                            NormKind::RootMeanSquare => T::ZERO,
                        };
                        let gn_mean = share * gn_sum;
                        let row = a.iter().zip(h).zip(w);
                        for (dh, ((a, h), w)) in dh[place].iter_mut().zip(row) {
                            let n = (*h - mean) * inverse;
                            *dh += inverse * (*a * (*w + offset) - g_mean - n * gn_mean);
                        }
                    }
                }
            });
        });
        let tiles = || work.chunks_exact(space);
        if let Some(dw) = dw {
            let dw = dw.cleared();
            tiles().for_each(|tile| add_to(&tile[..width], dw));
        }
        if let Some(dskip) = dskip {
            let dskip = dskip.cleared();
            tiles().for_each(|tile| add_to(&tile[width..2 * width], dskip));
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let (rows, width) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        let (groups, layer) = (self.0.groups, u32::from(self.0.kind == NormKind::Layer));
        let [h, w, skip, x, z, ..] = io.inputs;
        let [y, saved, ..] = io.outputs;
        let (offset, eps) = (self.0.offset::<f64>(), self.0.eps);
        let Some(Lanes { chunks, bits }) = lanes(width / groups) else {
            let arguments = arguments![h, w, skip, x, z, y, saved, rows, width, groups, layer, offset, eps];
            let grid = [(rows * groups).div_ceil(8), 1, 1];
            return io.queue.launch(&SOURCE, "skip_norm_forward", grid, 256, arguments);
        };
        let arguments = arguments![h, w, skip, x, z, y, saved, rows, width, groups, layer, offset, eps, bits];
        let grid = [groups * rows.div_ceil(256 >> bits), 1, 1];
        io.queue.launch(&SOURCE, FORWARD[chunks - 2], grid, 256, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let (rows, width) = (io.shapes.outputs[0].rows(), io.shapes.outputs[0].last());
        let (groups, layer) = (self.0.groups, u32::from(self.0.kind == NormKind::Layer));
        let (dy, [h, w, skip, x, z, ..]) = (io.gradient(), io.inputs);
        let ([dh, dw, dskip, dx, dz, ..], saved) = (io.input_gradients, io.outputs[1]);
        let (offset, lanes) = (self.0.offset::<f64>(), lanes(width / groups));
        let fresh = [0, 3, 4].iter().fold(0, |bits, &slot| bits | u32::from(io.is_fresh(slot)) << slot);
        let tiles = match &lanes {
            Some(Lanes { bits, .. }) => rows.div_ceil(THREADS >> bits).min((BLOCKS / groups).max(1)),
            None => rows.div_ceil(ROWS),
        };
        let w_parts = dw.map(|_| io.queue.scratch(tiles * width)).transpose()?;
        let skip_parts = dskip.map(|_| io.queue.scratch(tiles * width)).transpose()?;
        let bits = lanes.as_ref().map_or(0, |lanes| lanes.bits);
        let arguments = arguments![
            dy, h, w, skip, x, z, saved, dh, dx, dz, w_parts, skip_parts, rows, width, groups, layer, offset,
            fresh, bits
        ];
        match lanes {
            Some(Lanes { chunks, .. }) => {
                let grid = [groups * tiles, 1, 1];
                io.queue.launch(&SOURCE, BACKWARD[chunks - 2], grid, THREADS, arguments)?;
            }
            None => {
                let grid = [(rows * groups).div_ceil(8), 1, 1];
                io.queue.launch(
                    &SOURCE,
                    "skip_norm_backward",
                    grid,
                    256,
                    &arguments[..arguments.len() - 1],
                )?;
                let arguments = arguments![dy, h, x, z, saved, w_parts, skip_parts, rows, width, groups];
                let grid = [width.div_ceil(128), tiles, 1];
                io.queue.launch(&SOURCE, "skip_norm_parts", grid, 128, arguments)?;
            }
        }
        for (parts, sums, slot) in [(w_parts, dw, 1), (skip_parts, dskip, 2)] {
            if let (Some(parts), Some(sums)) = (parts, sums) {
                io.queue.give_parts(parts, tiles, width, (sums, io.is_fresh(slot)))?;
            }
        }
        Ok(())
    }
}

/// Threads of a block of backward with heads in registers, THREADS of skip_norm.cu, and the most blocks: four for
/// each of an H100's multiprocessors, as many as it holds. A number of its own on every card would be another sum
/// on each.
#[cfg(feature = "cuda")]
const THREADS: usize = 128;
#[cfg(feature = "cuda")]
const BLOCKS: usize = 528;

/// Kernels for heads in registers, from two chunks on.
#[cfg(feature = "cuda")]
const FORWARD: [&str; 3] =
    ["skip_norm_head_forward_2", "skip_norm_head_forward_3", "skip_norm_head_forward_4"];
#[cfg(feature = "cuda")]
const BACKWARD: [&str; 3] =
    ["skip_norm_head_backward_2", "skip_norm_head_backward_3", "skip_norm_head_backward_4"];

/// How a head is kept in registers: 2^bits lanes of a warp have four columns of each of its chunks.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lanes {
    chunks: usize,
    bits: usize,
}

/// The fewest places for a head of this size, of few chunks rather than many; None for heads that are read several
/// times.
#[cfg(feature = "cuda")]
fn lanes(size: usize) -> Option<Lanes> {
    let lanes = |chunks: usize| (size / 4).div_ceil(chunks).next_power_of_two();
    let chunks =
        (2..=4).filter(|&chunks| lanes(chunks) <= 32).min_by_key(|&chunks| chunks * lanes(chunks))?;
    size.is_multiple_of(4).then(|| Lanes { chunks, bits: lanes(chunks).ilog2() as usize })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Executor, Mode};
    use crate::ops::check::{Check, noise};
    use crate::ops::norm::norm;

    const LAYER: Norm = Norm { kind: NormKind::Layer, groups: 1, eps: 1e-5, unit_offset: true };

    #[test]
    fn gradients() {
        for (width, groups) in [(5, 1), (12, 3), (70, 2), (128, 2)] {
            for options in [
                Norm { groups, ..LAYER },
                Norm { groups, kind: NormKind::RootMeanSquare, unit_offset: false, ..LAYER },
            ] {
                Check::new()
                    .input([2, 35, width])
                    .input([width])
                    .input([width])
                    .input([2, 35, width])
                    .input([2, 35, width])
                    .run(|tape, v, _| Ok(vec![skip_norm(tape, v[0], v[1], v[2], [v[3], v[4]], options)?]));
            }
        }
    }

    /// Each input takes the place of each of the others, so that gradients meet; and some are asked for alone.
    #[test]
    fn gradients_of_some_inputs() {
        let options = Norm { groups: 2, ..LAYER };
        let shape = [3, 35, 10];
        Check::new().input(shape).input(shape).input(shape).input([10]).input([10]).run(|tape, v, _| {
            let (w, s) = (v[3], v[4]);
            Ok(vec![
                skip_norm(tape, v[0], w, s, [v[1], v[2]], options)?,
                skip_norm(tape, v[1], s, w, [v[2], v[0]], options)?,
            ])
        });
        Check::new().input(shape).input([10]).run(|tape, v, _| {
            let (a, b, w) = (tape.input(shape), tape.input(shape), tape.input([10]));
            Ok(vec![
                skip_norm(tape, v[0], w, v[1], [a, b], options)?,
                skip_norm(tape, a, v[1], w, [v[0], b], options)?,
                skip_norm(tape, a, w, v[1], [b, v[0]], options)?,
            ])
        });
    }

    /// It is the plain formula on the norm by itself.
    #[test]
    fn it_is_its_parts() -> Result<()> {
        for (width, groups) in [(24, 3), (70, 1)] {
            let mut tape = Tape::new(Mode::Evaluate);
            let [h, x, z] = [[5, width]; 3].map(|shape| tape.input(shape));
            let [w, skip] = [[width]; 2].map(|shape| tape.input(shape));
            let options = Norm { groups, ..LAYER };
            let y = skip_norm(&mut tape, h, w, skip, [x, z], options)?;
            let normed = norm(&mut tape, h, w, None, options)?;
            [h, x, z, skip, y, normed].iter().for_each(|&var| tape.keep(var));
            let mut executor = Executor::<f64>::new(tape);
            for (seed, var) in (1..).zip([h, x, z, w, skip]) {
                let values = noise(seed, executor.input_mut(var).len());
                executor.input_mut(var).copy_from_slice(&values);
            }
            executor.forward(&[]);
            let [normed, x, z, skip] = [normed, x, z, skip].map(|var| executor.value(var));
            for (i, y) in executor.value(y).iter().enumerate() {
                let expected = (normed[i] + skip[i % width] * x[i]) * z[i] / (1.0 + (-z[i]).exp());
                assert!((y - expected).abs() < 1e-14, "{y}, expected {expected}");
            }
        }
        Ok(())
    }

    #[test]
    fn groups_that_do_not_divide_are_refused() {
        let mut tape = Tape::new(Mode::Train);
        let (h, x, z) = (tape.input([2, 10]), tape.input([2, 10]), tape.input([2, 10]));
        let (w, s) = (tape.input([10]), tape.input([10]));
        let options = Norm { groups: 3, ..LAYER };
        let message = skip_norm(&mut tape, h, w, s, [x, z], options).unwrap_err().to_string();
        assert!(message.contains("3 groups") && message.contains("[2, 10]"), "{message}");
        let short = tape.input([2, 8]);
        let message = skip_norm(&mut tape, h, w, s, [x, short], options).unwrap_err().to_string();
        assert!(message.contains("[2, 8]"), "{message}");
    }

    /// The heads of the small family's models fill their lanes; odd and very wide ones have none.
    #[cfg(feature = "cuda")]
    #[test]
    fn heads_and_lanes() {
        for (size, chunks, bits) in
            [(64, 2, 3), (128, 2, 4), (192, 3, 4), (256, 2, 5), (384, 3, 5), (512, 4, 5)]
        {
            assert_eq!(lanes(size), Some(Lanes { chunks, bits }));
            assert_eq!(4 * (chunks << bits), size);
        }
        assert_eq!(lanes(100), Some(Lanes { chunks: 2, bits: 4 }));
        assert_eq!((lanes(33), lanes(516)), (None, None));
    }
}
