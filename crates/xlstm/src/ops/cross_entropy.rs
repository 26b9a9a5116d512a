//! The loss: minus the log of the probability of each target, and its scaled sum.
//!
//! nll_i = ln Σ_v e^(x_iv) - x_i,target, with the maximum taken out of the sum.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Ids, Tape, Var};
use crate::engine::vector::{sum, vectorize};
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::marks::IGNORE;
use crate::ops::TILE;

/// logits (…, V), scale (1), targets (rows) -> loss (), nll (rows); saved: ln Σ e^x (rows).
#[derive(Debug)]
struct CrossEntropy;

/// Records the loss `scale` · Σ nll and the nll of each row, in nats; 0 where the target is
/// [`IGNORE`]. With `scale` = 1 / (number of targets that count) the loss is their mean.
///
/// Targets are the caller's to validate: one outside the vocabulary makes its nll, the
/// loss and the gradient NaN.
///
/// # Errors
/// When the scale is not one number.
pub fn cross_entropy(tape: &mut Tape, logits: Var, targets: Ids, scale: Var) -> Result<(Var, Var)> {
    let outputs = tape.record(CrossEntropy, &[Some(logits), Some(scale)], &[targets])?;
    Ok((outputs[0], outputs[1]))
}

/// Rows a task works on: fewer where the vocabulary makes them long.
fn tile(vocabulary: usize) -> usize {
    if vocabulary < 4096 { TILE } else { TILE / 8 }
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("cross_entropy", include_str!("cross_entropy.cu"));

impl Kernel for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let (Some(logits), Some(scale)) = (inputs[0], inputs[1]) else {
            return Err(Error::shape("logits and scale are needed"));
        };
        if scale.len() != 1 || logits.last() == 0 {
            return Err(Error::shape(format!(
                "logits are (…, vocabulary) and scale is one number, not {logits:?} and {scale:?}"
            )));
        }
        let rows = Shape::from([logits.rows()]);
        Ok(vec![[].into(), rows, rows])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[0, 1], &[1, 2])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[1], &[0, 1, 2])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (loss, nll, log_sum) = (io.output(0), io.output(1), io.output(2));
        let (x, scale) = (io.input(0), io.input(1)[0]);
        let (rows, vocabulary) = (io.shapes.input(0).rows(), io.shapes.input(0).last());
        let tile = tile(vocabulary);
        let targets = io.ids[0][..rows].par_chunks(tile);
        let results = nll.par_chunks_mut(tile).zip(log_sum.par_chunks_mut(tile));
        results.zip(targets).zip(x.par_chunks(tile * vocabulary)).for_each(
            |(((nll, log_sum), targets), x)| {
                let results = nll.iter_mut().zip(log_sum);
                for (((nll, log_sum), &target), x) in results.zip(targets).zip(x.chunks_exact(vocabulary)) {
                    if target == IGNORE {
                        (*nll, *log_sum) = (T::ZERO, T::ZERO);
                        continue;
                    }
                    *log_sum = vectorize!(|| log_sum_exp(x));
                    *nll = *log_sum - x.get(target as usize).copied().unwrap_or(T::NAN);
                }
            },
        );
        loss[0] = scale * sum(nll);
    }

    /// dx_i += (softmax(x_i) - e_target) (scale dloss + dnll_i), dscale += dloss Σ nll.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let (x, scale, nll, log_sum) = (io.input(0), io.input(1)[0], io.output(1), io.output(2));
        let (rows, vocabulary) = (io.shapes.input(0).rows(), io.shapes.input(0).last());
        let dloss = io.output_gradients[0].map_or(T::ZERO, |d| d[0]);
        let dnll = io.output_gradients[1];
        if let Some(dx) = io.input_gradient(0) {
            let tile = tile(vocabulary);
            let targets = io.ids[0][..rows].par_chunks(tile);
            let given = x.par_chunks(tile * vocabulary).zip(log_sum.par_chunks(tile)).zip(targets);
            dx.tiles(tile * vocabulary).zip(given).enumerate().for_each(
                |(i, (dx, ((x, log_sum), targets)))| {
                    let given = x.chunks_exact(vocabulary).zip(log_sum).zip(targets);
                    for (j, (dx, ((x, &log_sum), &target))) in
                        dx.chunks_exact_mut(vocabulary).zip(given).enumerate()
                    {
                        if target == IGNORE {
                            continue;
                        }
                        let mut weight = scale * dloss + dnll.map_or(T::ZERO, |d| d[i * tile + j]);
                        match dx.get_mut(target as usize) {
                            Some(dx) => *dx -= weight,
                            None => weight = T::NAN,
                        }
                        vectorize!(|| {
                            for (dx, x) in dx.iter_mut().zip(x) {
                                *dx = weight.mul_add((*x - log_sum).exp(), *dx);
                            }
                        });
                    }
                },
            );
        }
        if let Some(dscale) = io.input_gradient(1) {
            dscale.cleared()[0] += dloss * sum(nll);
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let (rows, vocabulary) = (io.shapes.input(0).rows(), io.shapes.input(0).last());
        let [loss, nll, log_sum, ..] = io.outputs;
        let arguments = arguments![io.input(0), io.ids[0], nll, log_sum, vocabulary];
        io.queue.launch(&SOURCE, "cross_entropy_forward", [rows, 1, 1], 256, arguments)?;
        let arguments = arguments![nll, io.input(1), loss, rows, 0u32];
        io.queue.launch(&SOURCE, "cross_entropy_sum", [1, 1, 1], 256, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let (rows, vocabulary) = (io.shapes.input(0).rows(), io.shapes.input(0).last());
        let ([_, nll, log_sum, ..], [dloss, dnll, ..]) = (io.outputs, io.output_gradients);
        if let Some(dx) = io.input_gradients[0] {
            let arguments =
                arguments![io.input(0), io.ids[0], io.input(1), log_sum, dloss, dnll, dx, vocabulary];
            io.queue.launch(&SOURCE, "cross_entropy_backward", [rows, 1, 1], 256, arguments)?;
        }
        let (Some(dscale), Some(dloss)) = (io.input_gradients[1], dloss) else { return Ok(()) };
        let arguments = arguments![nll, dloss, dscale, rows, 1u32];
        io.queue.launch(&SOURCE, "cross_entropy_sum", [1, 1, 1], 256, arguments)
    }
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

    #[test]
    fn gradients() {
        Check::new()
            .input([3, 13, 70])
            .input_of([1], vec![0.3])
            .ids(&(0..39).map(|i| if i % 5 == 2 { IGNORE } else { i * 7 % 70 }).collect::<Vec<u32>>())
            .run(|tape, v, ids| {
                let (loss, nll) = cross_entropy(tape, v[0], ids[0], v[1])?;
                Ok(vec![loss, nll])
            });
        Check::new()
            .input([6, 5000])
            .input([1])
            .ids(&[0, 4999, IGNORE, 17, 64, 4992])
            .run(|tape, v, ids| Ok(vec![cross_entropy(tape, v[0], ids[0], v[1])?.0]));
    }

    /// Loss, nll and gradient of one row.
    fn row(x: &[f32], target: u32) -> (f32, f32, Vec<f32>) {
        let mut tape = Tape::new(Mode::Train);
        let logits = tape.input_with_gradient([1, x.len()]);
        let (scale, targets) = (tape.input([1]), tape.ids(1));
        let (loss, nll) = cross_entropy(&mut tape, logits, targets, scale).unwrap();
        tape.keep(loss);
        tape.keep(nll);
        tape.seed_gradient(loss);
        let mut executor = Executor::<f32>::new(tape);
        executor.input_mut(logits).copy_from_slice(x);
        executor.input_mut(scale).fill(1.0);
        executor.ids_mut(targets).fill(target);
        executor.seed_mut(loss).fill(1.0);
        executor.forward(&[]);
        executor.backward(&[], &mut []);
        (executor.value(loss)[0], executor.value(nll)[0], executor.gradient(logits).to_vec())
    }

    #[test]
    fn large_logits_are_stable_and_bad_ones_show() {
        let (loss, nll, gradient) = row(&[1000.0, 0.0, -1000.0], 0);
        assert_eq!((loss, nll, gradient), (0.0, 0.0, vec![0.0, 0.0, 0.0]));
        assert_eq!(row(&[1000.0, 0.0, -1000.0], 2).0, 2000.0);
        let (loss, _, gradient) = row(&[1.0, 2.0, 3.0], 3);
        assert!(loss.is_nan() && gradient.iter().all(|g| g.is_nan()));
        assert!(row(&[1.0, f32::NAN, 3.0], 0).0.is_nan());
        assert_eq!(row(&[1.0, f32::NAN, 3.0], IGNORE), (0.0, 0.0, vec![0.0, 0.0, 0.0]));
    }
}
