//! Causal attention with a window: y_t = Σ_u softmax_u(q_t · k_u / √N) v_u over the tokens u
//! from first_t to t, in every head of size N.
//!
//! Tokens before this piece come from a cache, a ring of C rows ([`window`](super::window)); they are
//! numbered below 0 (see [`positions`](super::positions)): with p tokens of the document before the piece,
//! token u < 0 has row (p + u) mod C. Rows are worked through in tiles with a running maximum
//! and a running sum (online softmax: Milakov and Gimelshein 2018, Dao et al. 2022), so that
//! memory is linear in length: what is saved for backward is log Σ_u exp of each row, from
//! which a tile's weights are worked out again. With P the weights and dP = dy v^T,
//! ```text
//! dS = P ∘ (dP - rowsum(dy ∘ y)) / √N
//! dq = dS k          dk = dS^T q          dv = P^T dy
//! ```

use std::ops::Range;

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward};
use crate::engine::matrix::{MatMut, MatRef, Threads, product};
use crate::engine::operation::{Backward, Forward, Kernel, NodeShapes, Slots};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::{dot, sum, vectorize};
use crate::engine::{Gradient, Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::positions::{Places, whole};

/// q, k, v (B, S, NH N), optional keys and values of the cache (B, C, NH N), first, position (B, S) ->
/// y (B, S, NH N); saved: log Σ exp of each row (B, NH, S).
#[derive(Debug)]
struct Attention {
    heads: usize,
}

/// The inputs after q, k and v.
const CACHE: usize = 3;
const FIRST: usize = 5;
const POSITION: usize = 6;

/// Records attention of `heads` heads over q, k, v (B, S, D) and, where given, the keys and
/// values (B, C, D) of the tokens before, at places that were recorded with a window of C.
/// A pad, which is no token, gives 0.
///
/// # Errors
/// When shapes do not fit.
pub fn attention(
    tape: &mut Tape,
    heads: usize,
    [q, k, v]: [Var; 3],
    cache: Option<[Var; 2]>,
    places: Places,
) -> Result<Var> {
    let [ck, cv] = [0, 1].map(|i| cache.map(|cache| cache[i]));
    let inputs = [Some(q), Some(k), Some(v), ck, cv, Some(places.first), Some(places.position)];
    Ok(tape.record(Attention { heads }, &inputs, &[])?[0])
}

/// Queries and keys of a tile.
const ROWS: usize = 64;

/// The scores of a tile.
type Scores<T> = [T; ROWS * ROWS];

#[derive(Clone, Copy)]
struct Sizes {
    length: usize,
    /// Rows of the cache; 0 without one.
    cached: usize,
    heads: usize,
    size: usize,
}

impl Sizes {
    fn new(shapes: &NodeShapes, heads: usize) -> Sizes {
        let x = shapes.input(0);
        let cached = shapes.inputs[CACHE].map_or(0, |cache| cache.dims()[1]);
        Sizes { length: x.dims()[1], cached, heads, size: x.last() / heads }
    }

    fn width(self) -> usize {
        self.heads * self.size
    }

    /// What the scores are multiplied by.
    fn scale<T: Scalar>(self) -> T {
        T::from_f64((self.size as f64).powf(-0.5))
    }

    /// The rows of one head of one sequence in (B, rows, D) data.
    fn head<T: Scalar>(self, x: &[T], rows: usize, task: usize) -> MatRef<'_, T> {
        let (b, head) = (task / self.heads, task % self.heads);
        MatRef::strided(&x[b * rows * self.width() + head * self.size..], rows, self.size, self.width())
    }
}

/// Where the tokens before a piece are in one sequence's cache.
#[derive(Clone, Copy)]
struct Ring {
    /// Rows of the cache.
    rows: usize,
    /// The row of the token that comes next, the one numbered 0.
    next: usize,
}

impl Ring {
    /// Of sequence `b`. `position` is of all.
    fn new<T: Scalar>(sizes: Sizes, position: &[T], b: usize) -> Ring {
        let before = whole(position[b * sizes.length]).unsigned_abs();
        Ring { rows: sizes.cached, next: before.checked_rem(sizes.cached).unwrap_or(0) }
    }

    /// The row of token u < 0, no further back than there are rows.
    fn row(self, u: isize) -> usize {
        (self.next + self.rows - u.unsigned_abs()) % self.rows
    }
}

/// Keys or values of one head of one sequence.
#[derive(Clone, Copy)]
struct Seen<'a, T> {
    tokens: MatRef<'a, T>,
    cache: Option<MatRef<'a, T>>,
    ring: Ring,
}

impl<'a, T: Scalar> Seen<'a, T> {
    fn new(sizes: Sizes, tokens: &'a [T], (cache, ring): (Option<&'a [T]>, Ring), task: usize) -> Self {
        let cache = cache.map(|cache| sizes.head(cache, sizes.cached, task));
        Seen { tokens: sizes.head(tokens, sizes.length, task), cache, ring }
    }

    /// The rows of a tile, which reaches neither over 0 nor over the end of the ring.
    fn rows(&self, tile: &Range<isize>) -> MatRef<'a, T> {
        let count = (tile.end - tile.start) as usize;
        match self.cache {
            Some(cache) if tile.start < 0 => cache.rows_at(self.ring.row(tile.start), count),
            _ => self.tokens.rows_at(tile.start.unsigned_abs(), count),
        }
    }
}

/// Tiles of keys that some query of `queries` may see, in order: those of the cache first.
/// `first` is of the whole sequence.
fn key_tiles<T: Scalar>(
    first: &[T],
    queries: &Range<usize>,
    ring: Ring,
) -> impl Iterator<Item = Range<isize>> + use<T> {
    let is_token = |t: &usize| whole(first[*t]) <= *t as isize;
    let lowest = queries.clone().find(is_token).map(|t| whole(first[t]).max(-(ring.rows as isize)));
    let end = queries.clone().rev().find(is_token).map_or(0, |t| t as isize + 1);
    let tile = ROWS as isize;
    let start = lowest.map_or(end, |lowest| lowest.div_euclid(tile) * tile);
    (start..end)
        .step_by(ROWS)
        .flat_map(move |at| {
            // The end of the ring is between two tiles.
            let (from, to) = (at.max(lowest.unwrap_or(end)), (at + tile).min(end));
            let cut = if from < 0 { (-(ring.next as isize)).clamp(from, to.max(from)) } else { from };
            [from..cut, cut..to]
        })
        .filter(|keys| !keys.is_empty())
}

/// Sets what the queries do not see in the scores (queries, keys) to minus infinity.
fn mask<T: Scalar>(scores: &mut [T], first: &[T], queries: &Range<usize>, keys: &Range<isize>) {
    let width = (keys.end - keys.start) as usize;
    let is_pad = |u: isize| u >= 0 && whole(first[u.unsigned_abs()]) > u;
    let padded = keys.clone().any(is_pad);
    for (row, t) in scores.chunks_exact_mut(width).zip(queries.clone()) {
        let from = (whole(first[t]) - keys.start).clamp(0, width as isize) as usize;
        let to = (t as isize + 1 - keys.start).clamp(0, width as isize) as usize;
        row[..from.min(to)].fill(T::NEG_INFINITY);
        row[to..].fill(T::NEG_INFINITY);
        // A pad sees nothing, and its first lies behind it.
        if from > to {
            row.fill(T::NEG_INFINITY);
        }
        if padded {
            for (score, u) in row.iter_mut().zip(keys.clone()) {
                if is_pad(u) {
                    *score = T::NEG_INFINITY;
                }
            }
        }
    }
}

/// The largest of `x`; minus infinity of none. NaN is passed over: exp of it comes later.
#[inline(always)]
fn largest<T: Scalar>(x: &[T]) -> T {
    const LANES: usize = 16;
    let mut lanes = [T::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for lane in 0..LANES {
            lanes[lane] = if x[lane] > lanes[lane] { x[lane] } else { lanes[lane] };
        }
    }
    lanes.iter().chain(rest).fold(T::NEG_INFINITY, |m, x| if *x > m { *x } else { m })
}

/// One tile of queries: y (queries, N) and log Σ exp of each row.
fn forward_tile<T: Scalar>(
    sizes: Sizes,
    q: MatRef<'_, T>,
    (k, v): (Seen<'_, T>, Seen<'_, T>),
    first: &[T],
    queries: &Range<usize>,
    (mut y, logs): (MatMut<'_, T>, &mut [T]),
) {
    let mut space: Scores<T> = [T::ZERO; ROWS * ROWS];
    let (mut highest, mut sums) = ([T::NEG_INFINITY; ROWS], [T::ZERO; ROWS]);
    let count = queries.len();
    y.fill(T::ZERO);
    for keys in key_tiles(first, queries, k.ring) {
        let width = (keys.end - keys.start) as usize;
        let scores = &mut space[..count * width];
        let all = MatMut::new(&mut *scores, count, width);
        product(all, sizes.scale(), q, k.rows(&keys).t(), false, Threads::One);
        mask(scores, first, queries, &keys);
        vectorize!(|| {
            for (i, row) in scores.chunks_exact_mut(width).enumerate() {
                let (before, now) = (highest[i], largest(row));
                let high = if now > before { now } else { before };
                if high == T::NEG_INFINITY {
                    // Nothing is seen yet; NaN stays NaN.
                    for score in row.iter_mut() {
                        *score = if *score == T::NEG_INFINITY { T::ZERO } else { *score };
                    }
                    sums[i] += sum(row);
                    continue;
                }
                for score in row.iter_mut() {
                    *score = (*score - high).exp();
                }
                let shrink = (before - high).exp();
                sums[i] = sums[i] * shrink + sum(row);
                if high != before {
                    for y in y.row(i) {
                        *y *= shrink;
                    }
                }
                highest[i] = high;
            }
        });
        let weights = MatRef::new(&*scores, count, width);
        product(y.rows_at(0, count), T::ONE, weights, v.rows(&keys), true, Threads::One);
    }
    for (i, (log, t)) in logs.iter_mut().zip(queries.clone()).enumerate() {
        if whole(first[t]) > t as isize {
            // No token.
            *log = T::ZERO;
            continue;
        }
        *log = highest[i] + sums[i].ln();
        for y in y.row(i) {
            *y /= sums[i];
        }
    }
}

/// Gradients of one head of one sequence; None where nobody asks.
struct HeadGradients<'a, T> {
    dq: Option<MatMut<'a, T>>,
    /// Of keys, then of values; of tokens, then of the cache.
    seen: [[Option<MatMut<'a, T>>; 2]; 2],
}

impl<T: Scalar> HeadGradients<'_, T> {
    /// The rows of a tile of keys or values.
    fn rows(&mut self, which: usize, keys: &Range<isize>, ring: Ring) -> Option<MatMut<'_, T>> {
        let count = (keys.end - keys.start) as usize;
        let [tokens, cache] = &mut self.seen[which];
        if keys.start < 0 {
            cache.as_mut().map(|cache| cache.rows_at(ring.row(keys.start), count))
        } else {
            tokens.as_mut().map(|tokens| tokens.rows_at(keys.start.unsigned_abs(), count))
        }
    }
}

/// What backward reads of one head of one sequence.
struct HeadSaved<'a, T> {
    q: MatRef<'a, T>,
    k: Seen<'a, T>,
    v: Seen<'a, T>,
    y: MatRef<'a, T>,
    dy: MatRef<'a, T>,
    first: &'a [T],
    logs: &'a [T],
}

/// All tiles of one head of one sequence, whose keys' gradients are sums over its queries: cut
/// further, each tile would have to be worked out twice.
fn backward_head<T: Scalar>(sizes: Sizes, saved: &HeadSaved<'_, T>, gradients: &mut HeadGradients<'_, T>) {
    let (mut weights, mut slopes): (Scores<T>, Scores<T>) = ([T::ZERO; ROWS * ROWS], [T::ZERO; ROWS * ROWS]);
    for start in (0..sizes.length).step_by(ROWS) {
        let queries = start..(start + ROWS).min(sizes.length);
        let count = queries.len();
        let (q, dy) = (saved.q.rows_at(start, count), saved.dy.rows_at(start, count));
        let mut shares = [T::ZERO; ROWS];
        vectorize!(|| {
            for (share, t) in shares.iter_mut().zip(queries.clone()) {
                *share = dot(saved.dy.row(t), saved.y.row(t));
            }
        });
        for keys in key_tiles(saved.first, &queries, saved.k.ring) {
            let width = (keys.end - keys.start) as usize;
            let (p, ds) = (&mut weights[..count * width], &mut slopes[..count * width]);
            let (k, v) = (saved.k.rows(&keys), saved.v.rows(&keys));
            product(MatMut::new(&mut *p, count, width), sizes.scale(), q, k.t(), false, Threads::One);
            mask(p, saved.first, &queries, &keys);
            product(MatMut::new(&mut *ds, count, width), T::ONE, dy, v.t(), false, Threads::One);
            let scale = sizes.scale::<T>();
            vectorize!(|| {
                let rows = p.chunks_exact_mut(width).zip(ds.chunks_exact_mut(width));
                for ((p, ds), (log, share)) in rows.zip(saved.logs[start..].iter().zip(&shares)) {
                    for (p, ds) in p.iter_mut().zip(ds) {
                        *p = (*p - *log).exp();
                        *ds = *p * (*ds - *share) * scale;
                    }
                }
            });
            let (p, ds) = (MatRef::new(&*p, count, width), MatRef::new(&*ds, count, width));
            if let Some(dq) = &mut gradients.dq {
                product(dq.rows_at(start, count), T::ONE, ds, k, true, Threads::One);
            }
            if let Some(dk) = gradients.rows(0, &keys, saved.k.ring) {
                product(dk, T::ONE, ds.t(), q, true, Threads::One);
            }
            if let Some(dv) = gradients.rows(1, &keys, saved.v.ring) {
                product(dv, T::ONE, p.t(), dy, true, Threads::One);
            }
        }
    }
}

/// A gradient (B, rows, D) as blocks, one a sequence and head, cleared where it is the first;
/// `count` times None where nobody asks.
fn head_blocks<T: Scalar>(
    gradient: Option<Gradient<'_, T>>,
    sizes: Sizes,
    rows: usize,
    count: usize,
) -> Vec<Option<MatMut<'_, T>>> {
    match gradient {
        Some(gradient) if rows > 0 => {
            let data = gradient.cleared();
            let matrix = MatMut::new(data, count / sizes.heads * rows, sizes.width());
            matrix.blocks(rows, sizes.size).into_iter().map(Some).collect()
        }
        _ => (0..count).map(|_| None).collect(),
    }
}

impl Kernel for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let Some(q) = inputs[0].filter(|q| q.dims().len() == 3 && q.len() > 0) else {
            return Err(Error::shape("q is (batch, length, features) with at least one token"));
        };
        let (batch, length, width) = (q.dims()[0], q.dims()[1], q.last());
        if self.heads == 0 || !width.is_multiple_of(self.heads) {
            return Err(Error::shape(format!("{} heads do not divide a width of {width}", self.heads)));
        }
        let cached = inputs[CACHE].map_or(0, |cache| cache.dims().get(1).copied().unwrap_or(0));
        let cache = Shape::from([batch, cached, width]);
        let places = Shape::from([batch, length]);
        let wanted =
            [(1, q), (2, q), (CACHE, cache), (CACHE + 1, cache), (FIRST, places), (POSITION, places)];
        for (i, want) in wanted {
            if inputs[i].is_some_and(|found| found != want) {
                return Err(Error::shape(format!(
                    "input {i} beside q {q:?} is {:?}, not {want:?}",
                    inputs[i]
                )));
            }
        }
        Ok(vec![q, [batch, self.heads, length].into()])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[0, 1, 2, CACHE, CACHE + 1, FIRST, POSITION], &[0, 1])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[FIRST, POSITION], &[1])
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::of(&[0, 1, 2, CACHE, CACHE + 1], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let sizes = Sizes::new(io.shapes, self.heads);
        let (y, logs) = (io.output(0), io.output(1));
        let (q, k, v, first) = (io.input(0), io.input(1), io.input(2), io.input(FIRST));
        let (position, [ck, cv]) = (io.input(POSITION), [io.inputs[CACHE], io.inputs[CACHE + 1]]);
        let length = sizes.length;
        let rows = y.len() / sizes.width();
        let tiles = MatMut::new(y, rows, sizes.width()).blocks(length, sizes.size);
        let tiles: Vec<_> = tiles
            .into_iter()
            .zip(logs.chunks_exact_mut(length))
            .enumerate()
            .flat_map(|(task, (y, logs))| {
                let parts = y.row_tiles(ROWS).into_iter().zip(logs.chunks_mut(ROWS));
                parts.enumerate().map(move |(tile, out)| (task, tile * ROWS, out))
            })
            .collect();
        tiles.into_par_iter().for_each(|(task, start, out)| {
            let queries = start..start + out.1.len();
            let own = sizes.head(q, length, task).rows_at(start, queries.len());
            let ring = Ring::new(sizes, position, task / sizes.heads);
            let seen = (Seen::new(sizes, k, (ck, ring), task), Seen::new(sizes, v, (cv, ring), task));
            let first = &first[task / sizes.heads * length..][..length];
            forward_tile(sizes, own, seen, first, &queries, out);
        });
    }

    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let sizes = Sizes::new(io.shapes, self.heads);
        let tasks = io.shapes.input(0).dims()[0] * sizes.heads;
        let (length, cached) = (sizes.length, sizes.cached);
        for places in [FIRST, POSITION].map(|i| io.input_gradient(i)).into_iter().flatten() {
            places.cleared();
        }
        let (q, k, v, first) = (io.input(0), io.input(1), io.input(2), io.input(FIRST));
        let (y, logs, dy) = (io.output(0), io.output(1), io.gradient());
        let (position, [ck, cv]) = (io.input(POSITION), [io.inputs[CACHE], io.inputs[CACHE + 1]]);
        let [dq, dk, dv] = [0, 1, 2].map(|i| head_blocks(io.input_gradient(i), sizes, length, tasks));
        let [dck, dcv] = [CACHE, CACHE + 1].map(|i| head_blocks(io.input_gradient(i), sizes, cached, tasks));
        let keys = dk.into_par_iter().zip(dck);
        let values = dv.into_par_iter().zip(dcv);
        dq.into_par_iter().zip(keys).zip(values).enumerate().for_each(|(task, ((dq, keys), values))| {
            let ring = Ring::new(sizes, position, task / sizes.heads);
            let saved = HeadSaved {
                q: sizes.head(q, length, task),
                k: Seen::new(sizes, k, (ck, ring), task),
                v: Seen::new(sizes, v, (cv, ring), task),
                y: sizes.head(y, length, task),
                dy: sizes.head(dy, length, task),
                first: &first[task / sizes.heads * length..][..length],
                logs: &logs[task * length..][..length],
            };
            let seen = [[keys.0, keys.1], [values.0, values.1]];
            backward_head(sizes, &saved, &mut HeadGradients { dq, seen });
        });
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        cuda::forward(Sizes::new(io.shapes, self.heads), io)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        cuda::backward(Sizes::new(io.shapes, self.heads), io)
    }
}

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;
