//! y_h = x_h W_h^T + b_h for every head h: a linear map with a block-diagonal weight.
//!
//! The mLSTM's q, k and v come from hundreds of blocks of 4 x 4; they run as SIMD code
//! over the columns of a row, many blocks abreast. Large blocks are one matrix
//! product a head. Several maps of one input are one operation.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward};
use crate::engine::matrix::{MatMut, MatRef, Threads, product};
use crate::engine::operation::{Backward, Forward, Gradient, Kernel, MAX_SLOTS, Slots, scratch};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::{axpy, dot, vectorize};
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::TILE;
use crate::ops::linear::{reduce_tiles, sum_rows};

/// x (…, NH·I), then W_i (NH, O, I) and optional b_i (NH·O) for each i -> y_i (…, NH·O).
#[derive(Debug)]
pub(super) struct Headwise {
    pub(super) maps: usize,
    /// y is f32 on a GPU whatever the precision.
    pub(super) full: bool,
}

/// Records the linear map of each head's features by that head's weight.
///
/// # Errors
/// When the heads' inner dimensions do not add up to the rows of x, or the bias does not
/// have one number an output.
pub fn headwise(tape: &mut Tape, x: Var, weight: Var, bias: Option<Var>) -> Result<Var> {
    headwises(tape, x, [(weight, bias)]).map(|[y]| y)
}

/// [`headwise`] for several maps of one input: the gradient of x is written once, and on a GPU x is read
/// once for two of them.
///
/// # Errors
/// As [`headwise`].
pub fn headwises<const N: usize>(tape: &mut Tape, x: Var, maps: [(Var, Option<Var>); N]) -> Result<[Var; N]> {
    const { assert!(0 < N && N <= MAX_MAPS) };
    let parameters = maps.iter().flat_map(|&(weight, bias)| [Some(weight), bias]);
    let inputs: Vec<Option<Var>> = [Some(x)].into_iter().chain(parameters).collect();
    let outputs = tape.record(Headwise { maps: N, full: false }, &inputs, &[])?;
    Ok(std::array::from_fn(|i| outputs[i]))
}

/// [`headwise`] with an output that is f32 on a GPU whatever its precision, such as gate
/// pre-activations.
///
/// # Errors
/// As [`headwise`].
pub fn headwise_full(tape: &mut Tape, x: Var, weight: Var, bias: Option<Var>) -> Result<Var> {
    Ok(tape.record(Headwise { maps: 1, full: true }, &[Some(x), Some(weight), bias], &[])?[0])
}

/// Both sides of a block at least this long: a matrix product a head.
const LARGE: usize = 16;

/// Side of the blocks that the mLSTM's projections are made of.
const SMALL: usize = 4;

/// Diagonals of such a block.
const DIAGONALS: usize = 2 * SMALL - 1;

/// Columns whose products with blocks of 4 x 4 are worked out at a time, in an array of its
/// own: a slice could overlap the others for all that the compiler knows.
const COLUMNS: usize = 64;
type Diagonals<T> = [[T; COLUMNS]; DIAGONALS];

/// NH, O and I of a weight.
fn sizes(weight: Shape) -> (usize, usize, usize) {
    let dims = weight.dims();
    (dims[0], dims[1], dims[2])
}

/// The most maps of one input.
const MAX_MAPS: usize = (MAX_SLOTS - 1) / 2;

/// Where input W_i is.
const fn weight_of(map: usize) -> usize {
    1 + 2 * map
}

/// Where input b_i is.
const fn bias_of(map: usize) -> usize {
    2 + 2 * map
}

impl Kernel for Headwise {
    fn name(&self) -> &'static str {
        "headwise"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let one = |map: usize| {
            let (Some(x), Some(w)) = (inputs[0], inputs[weight_of(map)]) else {
                return Err(Error::shape("x and W are needed"));
            };
            let &[heads, outer, inner] = w.dims() else {
                return Err(Error::shape(format!("W is (heads, out, in), not {w:?}")));
            };
            if w.len() == 0 || x.last() != heads * inner {
                return Err(Error::shape(format!("the rows of x {x:?} are not the heads of W {w:?}")));
            }
            if let Some(b) = inputs[bias_of(map)]
                && b.len() != heads * outer
            {
                return Err(Error::shape(format!("b {b:?} is not one number an output of W {w:?}")));
            }
            Ok(x.with_last(heads * outer))
        };
        (0..self.maps).map(one).collect()
    }

    fn reads(&self) -> Slots {
        Slots { inputs: 1 | self.weights(), outputs: 0 }
    }

    fn full_precision(&self) -> Slots {
        Slots { inputs: self.weights() << 1, outputs: u32::from(self.full) }
    }

    fn weights(&self) -> u32 {
        (0..self.maps).fold(0, |set, map| set | 1 << weight_of(map))
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots { inputs: (1 << weight_of(self.maps)) - 1, outputs: 0 }
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let rows = io.shapes.input(0).rows();
        for map in 0..self.maps {
            let (y, shape) = (io.output(map), sizes(io.shapes.input(weight_of(map))));
            let (x, w, bias) = (io.input(0), io.input(weight_of(map)), io.inputs[bias_of(map)]);
            forward_map(rows, shape, y, x, (w, bias), io.scratch);
        }
    }

    /// dx_h += Σ_i dy_ih W_ih, dW_ih += dy_ih^T x_h, db_i += sum over rows of dy_i.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let rows = io.shapes.input(0).rows();
        let mut dx = io.input_gradient(0).map(Gradient::into_parts);
        for map in 0..self.maps {
            let Some(dy) = io.output_gradients[map] else { continue };
            let (x, w) = (io.input(0), io.input(weight_of(map)));
            let shape = sizes(io.shapes.input(weight_of(map)));
            if let Some((dx, accumulate)) = &mut dx {
                input_gradient(rows, shape, (dx, *accumulate), dy, w, io.scratch);
                *accumulate = true;
            }
            if let Some(dw) = io.input_gradient(weight_of(map)) {
                weights_gradient(rows, shape, dw.cleared(), dy, x, io.scratch);
            }
            if let Some(db) = io.input_gradient(bias_of(map)) {
                sum_rows(dy, shape.0 * shape.1, db.cleared(), io.scratch);
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

/// y_h = x_h W_h^T + b_h.
fn forward_map<T: Scalar>(
    rows: usize,
    (heads, outer, inner): (usize, usize, usize),
    y: &mut [T],
    x: &[T],
    (w, bias): (&[T], Option<&[T]>),
    space: &mut Vec<T>,
) {
    if outer >= LARGE && inner >= LARGE {
        if let Some(bias) = bias {
            y.par_chunks_mut(bias.len() * TILE).for_each(|tile| {
                tile.chunks_mut(bias.len()).for_each(|row| row.copy_from_slice(bias));
            });
        }
        large_blocks(y, rows, heads, outer, bias.is_some(), x, inner, |head| {
            MatRef::new(&w[head * outer * inner..], outer, inner).t()
        });
        return;
    }
    let width = heads * outer;
    let start = |y: &mut [T]| match bias {
        Some(bias) => y.copy_from_slice(bias),
        None => y.fill(T::ZERO),
    };
    if (outer, inner) == (SMALL, SMALL) {
        let diagonals = diagonals(w, false, space);
        y.par_chunks_mut(width * TILE).zip(x.par_chunks(width * TILE)).for_each(|(y, x)| {
            vectorize!(|| {
                for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    start(y);
                    add_products(y, x, diagonals);
                }
            });
        });
        return;
    }
    y.par_chunks_mut(width * TILE).zip(x.par_chunks(heads * inner * TILE)).for_each(|(y, x)| {
        vectorize!(|| {
            for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(heads * inner)) {
                start(y);
                let blocks = x.chunks_exact(inner).zip(w.chunks_exact(outer * inner));
                for (y, (x, w)) in y.chunks_exact_mut(outer).zip(blocks) {
                    for (y, w) in y.iter_mut().zip(w.chunks_exact(inner)) {
                        *y += dot(x, w);
                    }
                }
            }
        });
    });
}

/// dx_h += dy_h W_h, or = where nothing is to be added to.
fn input_gradient<T: Scalar>(
    rows: usize,
    (heads, outer, inner): (usize, usize, usize),
    (dx, accumulate): (&mut [T], bool),
    dy: &[T],
    w: &[T],
    space: &mut Vec<T>,
) {
    if outer >= LARGE && inner >= LARGE {
        large_blocks(dx, rows, heads, inner, accumulate, dy, outer, |head| {
            MatRef::new(&w[head * outer * inner..], outer, inner)
        });
        return;
    }
    let (out_width, in_width) = (heads * outer, heads * inner);
    let of_four = (outer, inner) == (SMALL, SMALL);
    let diagonals = if of_four { diagonals(w, true, space) } else { &[] };
    dx.par_chunks_mut(in_width * TILE).zip(dy.par_chunks(out_width * TILE)).for_each(|(dx, dy)| {
        vectorize!(|| {
            if !accumulate {
                dx.fill(T::ZERO);
            }
            for (dx, dy) in dx.chunks_exact_mut(in_width).zip(dy.chunks_exact(out_width)) {
                if of_four {
                    add_products(dx, dy, diagonals);
                    continue;
                }
                let blocks = dy.chunks_exact(outer).zip(w.chunks_exact(outer * inner));
                for (dx, (dy, w)) in dx.chunks_exact_mut(inner).zip(blocks) {
                    for (dy, w) in dy.iter().zip(w.chunks_exact(inner)) {
                        axpy(*dy, w, dx);
                    }
                }
            }
        });
    });
}

/// dW_h += dy_h^T x_h.
fn weights_gradient<T: Scalar>(
    rows: usize,
    (heads, outer, inner): (usize, usize, usize),
    dw: &mut [T],
    dy: &[T],
    x: &[T],
    space: &mut Vec<T>,
) {
    let (out_width, in_width) = (heads * outer, heads * inner);
    if outer >= LARGE && inner >= LARGE {
        // A thread a head, or all of them on the only one.
        let threads = if heads == 1 { Threads::All } else { Threads::One };
        dw.par_chunks_mut(outer * inner).enumerate().for_each(|(head, dw)| {
            let dy = MatRef::new(dy, rows, out_width).columns_at(head * outer, outer);
            let x = MatRef::new(x, rows, in_width).columns_at(head * inner, inner);
            product(MatMut::new(dw, outer, inner), T::ONE, dy.t(), x, true, threads);
        });
        return;
    }
    reduce_tiles(
        rows,
        dw.len(),
        dw,
        space,
        #[inline(always)]
        |rows, partial| {
            let dy = &dy[rows.start * out_width..rows.end * out_width];
            let x = &x[rows.start * in_width..rows.end * in_width];
            if (outer, inner) == (SMALL, SMALL) {
                weight_gradient::<T, SMALL>(dy, x, out_width, partial);
                return;
            }
            for (dy, x) in dy.chunks_exact(out_width).zip(x.chunks_exact(in_width)) {
                let blocks = dy.chunks_exact(outer).zip(x.chunks_exact(inner));
                for (dw, (dy, x)) in partial.chunks_exact_mut(outer * inner).zip(blocks) {
                    for (dw, dy) in dw.chunks_exact_mut(inner).zip(dy) {
                        axpy(*dy, x, dw);
                    }
                }
            }
        },
    );
}

/// c_h = a_h B_h, or c_h += a_h B_h with `accumulate`, for every head h of c (rows,
/// heads · `n`) and a (rows, heads · `k`).
#[allow(clippy::too_many_arguments)]
fn large_blocks<'a, T: Scalar>(
    c: &mut [T],
    rows: usize,
    heads: usize,
    n: usize,
    accumulate: bool,
    a: &'a [T],
    k: usize,
    b: impl Fn(usize) -> MatRef<'a, T> + Sync,
) {
    if rows == 0 {
        return;
    }
    // Cut rows, too, so that few heads still occupy many threads.
    let cut = 1 << rows.trailing_zeros().min(8);
    let tile = if cut < TILE { rows } else { cut };
    let a = MatRef::new(a, rows, heads * k);
    MatMut::new(c, rows, heads * n).blocks(tile, n).into_par_iter().enumerate().for_each(|(i, c)| {
        let (first, head) = (i / heads * tile, i % heads);
        let a = a.rows_at(first, tile).columns_at(head * k, k);
        product(c, T::ONE, a, b(head), accumulate, Threads::One);
    });
}

/// The weight (NH, 4, 4), or its transpose, as diagonals: of [`COLUMNS`] columns at a time,
/// seven rows. Column c = 4 h + j of row s holds W[h, j, j + s - 3], or 0 outside the block,
/// so that the product of a row of x is y[c] = Σ_s diagonal_s[c] x[c + s - 3]: whole vectors
/// of columns. Shuffling x within blocks takes fewer products, but the compiler makes
/// gathers and scatters of it.
fn diagonals<'a, T: Scalar>(w: &[T], transposed: bool, space: &'a mut Vec<T>) -> &'a [Diagonals<T>] {
    let width = w.len() / SMALL;
    let space = scratch(space, width.div_ceil(COLUMNS) * DIAGONALS * COLUMNS);
    space.fill(T::ZERO);
    for (h, block) in w.chunks_exact(SMALL * SMALL).enumerate() {
        for j in 0..SMALL {
            for i in 0..SMALL {
                let (c, s) = (h * SMALL + j, i + SMALL - 1 - j);
                let at = (c / COLUMNS * DIAGONALS + s) * COLUMNS + c % COLUMNS;
                space[at] = if transposed { block[i * SMALL + j] } else { block[j * SMALL + i] };
            }
        }
    }
    space.as_chunks().0.as_chunks().0
}

/// y[c] += Σ_s diagonal_s[c] x[c + s - 3], for one row; x is 0 outside. All loops run over
/// arrays: a length known only at run time would cost a scalar rest.
#[inline(always)]
fn add_products<T: Scalar>(y: &mut [T], x: &[T], diagonals: &[Diagonals<T>]) {
    const EDGE: usize = SMALL - 1;
    const SEEN: usize = COLUMNS + 2 * EDGE;
    let width = y.len();
    for (first, diagonals) in (0..).step_by(COLUMNS).zip(diagonals) {
        let n = COLUMNS.min(width - first);
        let seen = first.saturating_sub(EDGE)..width.min(first + n + EDGE);
        let mut padded = [T::ZERO; SEEN];
        let x = match x[seen.clone()].first_chunk::<SEEN>() {
            Some(x) => x,
            None => {
                padded[EDGE + seen.start - first..][..seen.len()].copy_from_slice(&x[seen]);
                &padded
            }
        };
        let mut sums = [T::ZERO; COLUMNS];
        let y = &mut y[first..][..n];
        match <&mut [T; COLUMNS]>::try_from(&mut *y) {
            Ok(y) => {
                add_block(y, x, diagonals, &mut sums);
                *y = sums;
            }
            Err(_) => {
                let mut whole = [T::ZERO; COLUMNS];
                whole[..n].copy_from_slice(y);
                add_block(&whole, x, diagonals, &mut sums);
                y.copy_from_slice(&sums[..n]);
            }
        }
    }
}

/// sums = y + [`COLUMNS`] columns of the products of x.
#[inline(always)]
fn add_block<T: Scalar, const SEEN: usize>(
    y: &[T; COLUMNS],
    x: &[T; SEEN],
    diagonals: &Diagonals<T>,
    sums: &mut [T; COLUMNS],
) {
    for c in 0..COLUMNS {
        let mut sum = y[c];
        for s in 0..DIAGONALS {
            sum = diagonals[s][c].mul_add(x[c + s], sum);
        }
        sums[c] = sum;
    }
}

/// dw[h, o, i] = Σ over rows of dy[h N + o] x[h N + i], heads outermost so that the sums
/// stay in registers, each a vector over the outputs.
#[inline(always)]
fn weight_gradient<T: Scalar, const N: usize>(dy: &[T], x: &[T], width: usize, dw: &mut [T]) {
    for (h, dw) in dw.chunks_exact_mut(N * N).enumerate() {
        let mut sums = [[T::ZERO; N]; N];
        for (dy, x) in dy.chunks_exact(width).zip(x.chunks_exact(width)) {
            let (Some(dy), Some(x)) = (dy[h * N..].first_chunk::<N>(), x[h * N..].first_chunk::<N>()) else {
                return;
            };
            for (i, sums) in sums.iter_mut().enumerate() {
                for o in 0..N {
                    sums[o] = dy[o].mul_add(x[i], sums[o]);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (o, sum) in sums.iter().enumerate() {
                dw[o * N + i] = *sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Mode;
    use crate::ops::check::Check;

    fn check(rows: usize, heads: usize, outer: usize, inner: usize) {
        Check::new().input([2, rows, heads * inner]).input([heads, outer, inner]).input([heads * outer]).run(
            |tape, v, _| Ok(vec![headwise(tape, v[0], v[1], Some(v[2]))?, headwise(tape, v[0], v[1], None)?]),
        );
    }

    #[test]
    fn gradients_of_four_by_four() {
        check(35, 9, 4, 4);
        check(3, 1, 4, 4);
    }

    #[test]
    fn gradients_of_several_maps() {
        for (heads, outer, inner) in [(9, 4, 4), (2, 3, 5), (2, 17, 16)] {
            let check = Check::new().input([2, 35, heads * inner]).input([heads * outer]);
            let check = [(); 3].iter().fold(check, |check, ()| check.input([heads, outer, inner]));
            check.run(|tape, v, _| {
                let maps = [(v[2], None), (v[3], Some(v[1])), (v[4], None)];
                Ok(headwises(tape, v[0], maps)?.to_vec())
            });
        }
    }

    #[test]
    fn gradients_of_small_blocks() {
        check(35, 3, 2, 5);
        check(5, 2, 20, 3);
    }

    #[test]
    fn gradients_of_large_blocks() {
        check(9, 2, 16, 17);
        check(32, 2, 17, 16);
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let mut tape = Tape::new(Mode::Train);
        let (x, w) = (tape.input([2, 10]), tape.input([3, 4, 4]));
        let message = headwise(&mut tape, x, w, None).unwrap_err().to_string();
        assert!(message.contains("[2, 10]") && message.contains("[3, 4, 4]"), "{message}");
    }
}
