//! The loss of a classifying head: logits, minus the log of the probability of each target, and the
//! scaled sum.
//!
//! ```text
//! z = x W^T + b,   y = cap tanh(z / cap) or z,   nll_i = ln Σ_v e^(y_iv) - y_i,target
//! dz = scale (softmax(y) - e_target) (1 - (y / cap)²),   dx = dz W,   dW = dz^T x,   db = Σ_i dz_i
//! ```
//!
//! With a vocabulary the logits of all tokens are by far a step's largest value. They never exist at
//! once: forward takes a slice of rows from the product to the gradients while it is at hand, and
//! backward only scales these by the gradient of the loss.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::Precision;
use crate::engine::bf16_products::product_in;
#[cfg(feature = "cuda")]
use crate::engine::cuda::{
    CudaBackward, CudaForward, Source, blas::Operand, blas::Product, context::arguments, launch::Queue,
};
use crate::engine::matrix::{MatMut, MatRef};
use crate::engine::operation::{Backward, Forward, Gradient, Kernel, Slots, scratch};
use crate::engine::projection::{Projection, project};
use crate::engine::tape::{Ids, Mode, Tape, Var};
use crate::engine::vector::{sum, vectorize};
use crate::engine::{Scalar, Shape, Storable};
use crate::error::{Error, Result};
use crate::marks::IGNORE;
use crate::ops::TILE;
use crate::ops::linear::sum_rows;

/// x (…, D), W (V, D), optional b (V), scale (1), targets (rows) -> loss (), nll (rows); saved, to
/// train: the gradients of x, W and b for a loss with the gradient 1.
#[derive(Debug)]
struct HeadLoss {
    cap: Option<f64>,
    train: bool,
    /// Rows of a slice on the processor.
    slice: usize,
}

/// A head: W (V, D), b (V) where it has one, and the bound of its logits where they have one.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// W (V, D).
    pub weight: Var,
    /// b (V).
    pub bias: Option<Var>,
    /// Logits are cap tanh(z / cap).
    pub cap: Option<f64>,
}

/// Records the loss `scale` · Σ nll of the logits of x, and the nll of each row, in nats; 0 where
/// the target is [`IGNORE`]. With `scale` = 1 / (number of targets that count) the loss is their
/// mean. Only the loss has a gradient.
///
/// Targets are the caller's to validate: one outside the vocabulary makes its nll, the
/// loss and the gradient NaN.
///
/// # Errors
/// When the scale is not one number, or x and the weight do not fit.
pub fn head_loss(tape: &mut Tape, x: Var, head: Head, targets: Ids, scale: Var) -> Result<(Var, Var)> {
    let slice = slice_rows(tape.shape(head.weight).rows());
    let operation = HeadLoss { cap: head.cap, train: tape.mode() == Mode::Train, slice };
    let inputs = [Some(x), Some(head.weight), head.bias, Some(scale)];
    let outputs = tape.record(operation, &inputs, &[targets])?;
    Ok((outputs[0], outputs[1]))
}

/// Rows of a slice on the processor: logits that stay in its cache, but rows enough that reading W
/// for each slice does not count.
fn slice_rows(vocabulary: usize) -> usize {
    ((1 << 21) / vocabulary.max(1)).max(256)
}

/// Rows of a slice on a GPU: enough to fill it; adding to dW once a slice shall not count. Slices are
/// equal, but for whole thousands.
#[cfg(feature = "cuda")]
fn cuda_slice_rows(rows: usize, vocabulary: usize) -> usize {
    let most = ((1 << 28) / vocabulary / 1024 * 1024).max(1024);
    rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(1024)
}

/// Rows a task works on: fewer where the vocabulary makes them long.
fn tile(vocabulary: usize) -> usize {
    if vocabulary < 4096 { TILE } else { TILE / 8 }
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("head_loss", include_str!("head_loss.cu"));

/// Saved gradients among the outputs, of the inputs before them in this order.
const SAVED: usize = 2;

impl Kernel for HeadLoss {
    fn name(&self) -> &'static str {
        "head_loss"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let (Some(x), Some(w), Some(scale)) = (inputs[0], inputs[1], inputs[3]) else {
            return Err(Error::shape("x, W and scale are needed"));
        };
        if x.last() != w.last() || w.rows() == 0 {
            return Err(Error::shape(format!("x {x:?} and W {w:?} differ in their last dimension")));
        }
        if scale.len() != 1 {
            return Err(Error::shape(format!("scale is one number, not {scale:?}")));
        }
        let mut outputs = vec![[].into(), Shape::from([x.rows()])];
        if self.train {
            outputs.extend([x, w]);
            outputs.extend(inputs[2]);
        }
        Ok(outputs)
    }

    fn reads(&self) -> Slots {
        let saved = if self.train { 0b111 << SAVED } else { 0 };
        Slots { inputs: 0, outputs: 1 << 1 | saved }
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[2, 3], &[0, 1, SAVED + 1, SAVED + 2])
    }

    fn weights(&self) -> u32 {
        1 << 1
    }

    fn storable(&self, slot: usize) -> Storable {
        if slot == 1 { Storable::Quantized } else { Storable::Wide }
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (loss, nll) = (io.output(0), io.output(1));
        let (x, bias, scale) = (io.input(0), io.inputs[2], io.input(3)[0]);
        let [inner, vocabulary] = [io.shapes.input(1).last(), io.shapes.input(1).rows()];
        let (rows, step, tile) = (nll.len(), self.slice, tile(vocabulary));
        let mut saved = self.train.then(|| (io.output(SAVED), io.output(SAVED + 1)));
        let mut db = bias.filter(|_| self.train).map(|_| io.output(SAVED + 2));
        if let Some(db) = &mut db {
            db.fill(T::ZERO);
        }
        // Products that widen stored weights need work space too.
        let mut space = std::mem::take(io.scratch);
        let slice = scratch(&mut space, step.min(rows) * vocabulary);
        for start in (0..rows).step_by(step) {
            let count = step.min(rows - start);
            let z = &mut slice[..count * vocabulary];
            let x = &x[start * inner..][..count * inner];
            if let Some(bias) = bias {
                z.par_chunks_exact_mut(vocabulary).for_each(|row| row.copy_from_slice(bias));
            }
            let w = io.weight(1);
            let map = Projection { y: &mut *z, w, outer: vocabulary, accumulate: bias.is_some() };
            project(&mut [map], x, [count, inner], [0, inner], io.precision, io.scratch);
            let results = nll[start..start + count].par_chunks_mut(tile);
            let targets = io.ids[0][start..start + count].par_chunks(tile);
            results.zip(targets).zip(z.par_chunks_mut(tile * vocabulary)).for_each(|((nll, targets), z)| {
                for ((nll, &target), z) in nll.iter_mut().zip(targets).zip(z.chunks_exact_mut(vocabulary)) {
                    *nll = vectorize!(|| self.row(z, target, scale));
                }
            });
            let Some((dx, dw)) = &mut saved else { continue };
            let (dz, x) = (MatRef::new(z, count, vocabulary), MatRef::new(x, count, inner));
            let w = MatRef::new(io.input(1), vocabulary, inner);
            let dx = MatMut::new(&mut dx[start * inner..], count, inner);
            product_in(io.precision, dx, dz, w, false);
            product_in(io.precision, MatMut::new(dw, vocabulary, inner), dz.t(), x, start > 0);
            if let Some(db) = &mut db {
                sum_rows(z, vocabulary, db, io.scratch);
            }
        }
        *io.scratch = space;
        loss[0] = scale * sum(nll);
    }

    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let Some(dloss) = io.output_gradients[0].map(|d| d[0]) else { return };
        for input in 0..3 {
            if let Some(gradient) = io.input_gradient(input) {
                add_scaled(gradient, dloss, io.output(SAVED + input));
            }
        }
        if let Some(dscale) = io.input_gradient(3) {
            dscale.cleared()[0] += dloss * sum(io.output(1));
        }
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::of(&[0, 1, 2], &[])
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let (x, w, scale) = (io.input(0), io.input(1), io.input(3));
        let [loss, nll, dx, dw, db, ..] = io.outputs;
        let [inner, vocabulary] = [io.shapes.input(1).last(), io.shapes.input(1).rows()];
        let rows = io.shapes.input(0).rows();
        let step = cuda_slice_rows(rows, vocabulary);
        let (element, cap) = (io.queue.precision().bytes(), self.cap.unwrap_or(0.0));
        let bias = io.inputs[2];
        let z = io.queue.scratch((step.min(rows) * vocabulary * element).div_ceil(4))?;
        if bias.is_some() && self.train {
            io.queue.zero(db, vocabulary)?;
        }
        for start in (0..rows).step_by(step) {
            let count = step.min(rows - start);
            let row_of = |matrix: u64, bytes: usize| matrix + (start * bytes) as u64;
            let x = Operand::new(row_of(x, inner * element), inner);
            if let Some(bias) = bias {
                io.queue.fill_rows(bias, z, false, count, vocabulary)?;
            }
            io.queue.product(&Product {
                size: [count, vocabulary, inner],
                a: x,
                b: Operand::new(w, inner).t(),
                c: Operand::new(z, vocabulary),
                batch: 1,
                accumulate: bias.is_some(),
            })?;
            let (targets, nll) = (row_of(io.ids[0], 4), row_of(nll, 4));
            if let Some((name, shared)) = self.kept(vocabulary, io.queue)? {
                let arguments = arguments![z, targets, scale, nll, vocabulary, cap];
                io.queue.launch_shared(&SOURCE, name, [count, 1, 1], 512, shared, arguments)?;
            } else {
                let arguments = arguments![z, targets, scale, nll, vocabulary, cap, u32::from(self.train)];
                io.queue.launch(&SOURCE, "head_loss_rows", [count, 1, 1], 256, arguments)?;
            }
            if !self.train {
                continue;
            }
            io.queue.fork()?;
            io.queue.product(&Product {
                size: [count, inner, vocabulary],
                a: Operand::new(z, vocabulary),
                b: Operand::new(w, inner),
                c: Operand::new(row_of(dx, inner * element), inner),
                batch: 1,
                accumulate: false,
            })?;
            io.queue.product_aside(&Product {
                size: [vocabulary, inner, count],
                a: Operand::new(z, vocabulary).t(),
                b: x,
                c: Operand::new(dw, inner).full(),
                batch: 1,
                accumulate: start > 0,
            })?;
            io.queue.join()?;
            if bias.is_some() {
                io.queue.add_rows(z, false, count, vocabulary, db)?;
            }
        }
        let arguments = arguments![nll, scale, loss, rows, 0u32];
        io.queue.launch(&SOURCE, "head_loss_sum", [1, 1, 1], 256, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let dloss = match io.output_gradients[0] {
            Some(dloss) => dloss,
            // Nobody asks for the loss: a gradient of zero.
            None => {
                let zero = io.queue.scratch(1)?;
                io.queue.zero(zero, 1)?;
                zero
            }
        };
        for (input, kernel) in ["add_scaled", "add_scaled_full", "add_scaled_full"].into_iter().enumerate() {
            if let Some(gradient) = io.input_gradients[input] {
                let n = io.shapes.input(input).len();
                let fresh = u32::from(io.is_fresh(input));
                let arguments = arguments![io.outputs[SAVED + input], dloss, gradient, n as u64, fresh];
                io.queue.launch_wide(&SOURCE, kernel, n, arguments)?;
            }
        }
        let Some(dscale) = io.input_gradients[3] else { return Ok(()) };
        let arguments = arguments![io.outputs[1], dloss, dscale, io.shapes.input(0).rows(), 1u32];
        io.queue.launch(&SOURCE, "head_loss_sum", [1, 1, 1], 256, arguments)
    }
}

#[cfg(feature = "cuda")]
impl HeadLoss {
    /// The kernel of training that keeps a row in shared memory, and the bytes of that; None where rows are
    /// too long, no multiple of eight, or not of 16 bits.
    fn kept(&self, vocabulary: usize, queue: &Queue) -> Result<Option<(&'static str, usize)>> {
        /// What the kernel has besides.
        const STATIC: usize = 1 << 10;
        let shared = vocabulary * Precision::Bf16.bytes();
        let fits = shared + STATIC <= queue.gpu().shared_memory()? && vocabulary.is_multiple_of(8);
        let name = if self.cap.is_some() { "head_loss_kept_capped" } else { "head_loss_kept" };
        Ok((fits && self.train && queue.precision() == Precision::Bf16).then_some((name, shared)))
    }
}

impl HeadLoss {
    /// z -> the nll of its target; z becomes its gradient where there is training.
    #[inline(always)]
    fn row<T: Scalar>(&self, z: &mut [T], target: u32, scale: T) -> T {
        if target == IGNORE {
            if self.train {
                z.fill(T::ZERO);
            }
            return T::ZERO;
        }
        let inverse = T::from_f64(self.cap.map_or(0.0, |cap| 1.0 / cap));
        if let Some(cap) = self.cap.map(T::from_f64) {
            for z in z.iter_mut() {
                *z = cap * (*z * inverse).tanh();
            }
        }
        let log_sum = log_sum_exp(z);
        let chosen = z.get(target as usize).copied();
        if self.train {
            // Without a cap the factor is 1.
            let slope = |y: T| (y * inverse).mul_add(-(y * inverse), T::ONE);
            let weight = if chosen.is_some() { scale } else { T::NAN };
            for y in z.iter_mut() {
                *y = weight * (*y - log_sum).exp() * slope(*y);
            }
            if let (Some(y), Some(dz)) = (chosen, z.get_mut(target as usize)) {
                *dz -= weight * slope(y);
            }
        }
        log_sum - chosen.unwrap_or(T::NAN)
    }
}

/// gradient += factor x.
fn add_scaled<T: Scalar>(gradient: Gradient<'_, T>, factor: T, x: &[T]) {
    const CHUNK: usize = 1 << 14;
    let (gradient, accumulate) = gradient.into_parts();
    gradient.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(gradient, x)| {
        vectorize!(|| {
            for (gradient, x) in gradient.iter_mut().zip(x) {
                *gradient = factor.mul_add(*x, if accumulate { *gradient } else { T::ZERO });
            }
        });
    });
}

/// Independent partial results: wide, to keep several exponentials in flight.
const LANES: usize = 16;

/// ln Σ e^x = max + ln Σ e^(x - max).
#[inline(always)]
fn log_sum_exp<T: Scalar>(x: &[T]) -> T {
    let mut lanes = [T::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = *x;
    }
    for x in chunks.clone() {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane = lane.max(*x);
        }
    }
    let max = lanes.iter().fold(T::NEG_INFINITY, |max, x| max.max(*x));
    lanes = [T::ZERO; LANES];
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = (*x - max).exp();
    }
    for x in chunks {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane += (*x - max).exp();
        }
    }
    max + sum(&lanes).ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Executor, Mode};
    use crate::ops::check::Check;

    fn targets(rows: u32, vocabulary: u32) -> Vec<u32> {
        (0..rows).map(|i| if i % 5 == 2 { IGNORE } else { i * 7 % vocabulary }).collect()
    }

    #[test]
    fn gradients() {
        for cap in [None, Some(2.5)] {
            Check::new()
                .input([3, 13, 6])
                .input([70, 6])
                .input([70])
                .input_of([1], vec![0.3])
                .ids(&targets(39, 70))
                .run(|tape, v, ids| {
                    let head = Head { weight: v[1], bias: Some(v[2]), cap };
                    Ok(vec![head_loss(tape, v[0], head, ids[0], v[3])?.0])
                });
        }
        // Several slices, the last one short; long rows.
        Check::new().input([21, 2]).input([5000, 2]).input([5000]).input([1]).ids(&targets(21, 5000)).run(
            |tape, v, ids| {
                let operation = HeadLoss { cap: None, train: true, slice: 8 };
                Ok(vec![
                    tape.record(operation, &v[..4].iter().map(|v| Some(*v)).collect::<Vec<_>>(), ids)?[0],
                ])
            },
        );
    }

    /// Loss, nll and gradient of the logits of one row.
    fn row(mode: Mode, x: &[f32], target: u32) -> (f32, f32, Vec<f32>) {
        let mut tape = Tape::new(mode);
        let (one, weight) = (tape.input([1, 1]), tape.input_with_gradient([x.len(), 1]));
        let (scale, targets) = (tape.input([1]), tape.ids(1));
        let head = Head { weight, bias: None, cap: None };
        let (loss, nll) = head_loss(&mut tape, one, head, targets, scale).unwrap();
        tape.keep(loss);
        tape.keep(nll);
        tape.seed_gradient(loss);
        let mut executor = Executor::<f32>::new(tape);
        executor.input_mut(weight).copy_from_slice(x);
        executor.input_mut(one).fill(1.0);
        executor.input_mut(scale).fill(1.0);
        executor.ids_mut(targets).fill(target);
        executor.poison();
        executor.forward(&[]);
        if mode == Mode::Train {
            executor.seed_mut(loss).fill(1.0);
            executor.backward(&[], &mut []);
        }
        (executor.value(loss)[0], executor.value(nll)[0], executor.gradient(weight).to_vec())
    }

    #[test]
    fn large_logits_are_stable_and_bad_ones_show() {
        let train = |x: &[f32], target| row(Mode::Train, x, target);
        let (loss, nll, gradient) = train(&[1000.0, 0.0, -1000.0], 0);
        assert_eq!((loss, nll, gradient), (0.0, 0.0, vec![0.0, 0.0, 0.0]));
        assert_eq!(train(&[1000.0, 0.0, -1000.0], 2).0, 2000.0);
        let (loss, _, gradient) = train(&[1.0, 2.0, 3.0], 3);
        assert!(loss.is_nan() && gradient.iter().all(|g| g.is_nan()));
        assert!(train(&[1.0, f32::NAN, 3.0], 0).0.is_nan());
        assert_eq!(train(&[1.0, f32::NAN, 3.0], IGNORE), (0.0, 0.0, vec![0.0, 0.0, 0.0]));
    }

    #[test]
    fn scoring_gives_the_loss_of_training() {
        let x = [0.5, -2.0, 1.5, 0.25];
        let (loss, nll, gradient) = row(Mode::Evaluate, &x, 1);
        let (same, each, _) = row(Mode::Train, &x, 1);
        assert_eq!((loss, nll), (same, each));
        assert!(gradient.is_empty());
    }
}
