//! The loss of regression: the squared distance of each row to its target, and its scaled sum.
//!
//! e_i = Σ_j (y_ij - t_ij)², over the targets that are asked for.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Ids, Tape, Var};
use crate::engine::vector::sum;
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::marks::IGNORE;
use crate::ops::TILE;

/// y (…, outputs), scale (1), targets (rows outputs), the bits of f32 -> loss (), errors (rows).
#[derive(Debug)]
struct SquaredError;

/// Records the loss `scale` · Σ e and the squared error e of each row. Targets are the bits of
/// f32; one of [`IGNORE`] is not asked for. With `scale` = 1 / (number of targets that count) the
/// loss is the mean squared error. A target that is not a number makes the loss and the gradient
/// NaN.
///
/// # Errors
/// When the scale is not one number.
pub fn squared_error(tape: &mut Tape, y: Var, targets: Ids, scale: Var) -> Result<(Var, Var)> {
    let outputs = tape.record(SquaredError, &[Some(y), Some(scale)], &[targets])?;
    Ok((outputs[0], outputs[1]))
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("squared_error", include_str!("squared_error.cu"));

/// y - t, or zero where t is not asked for.
#[inline(always)]
fn difference<T: Scalar>(y: T, target: u32) -> T {
    if target == IGNORE { T::ZERO } else { y - T::from_f64(f64::from(f32::from_bits(target))) }
}

impl Kernel for SquaredError {
    fn name(&self) -> &'static str {
        "squared_error"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let (Some(y), Some(scale)) = (inputs[0], inputs[1]) else {
            return Err(Error::shape("y and scale are needed"));
        };
        if scale.len() != 1 || y.last() == 0 {
            return Err(Error::shape(format!(
                "y is (…, outputs) and scale is one number, not {y:?} and {scale:?}"
            )));
        }
        Ok(vec![[].into(), [y.rows()].into()])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[0, 1], &[1])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[1], &[0, 1])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (loss, errors) = (io.output(0), io.output(1));
        let (y, scale, width) = (io.input(0), io.input(1)[0], io.shapes.input(0).last());
        let given = y.par_chunks(TILE * width).zip(io.ids[0].par_chunks(TILE * width));
        errors.par_chunks_mut(TILE).zip(given).for_each(|(errors, (y, targets))| {
            let rows = y.chunks_exact(width).zip(targets.chunks_exact(width));
            for (error, (y, targets)) in errors.iter_mut().zip(rows) {
                *error = y.iter().zip(targets).fold(T::ZERO, |total, (y, target)| {
                    let d = difference(*y, *target);
                    d.mul_add(d, total)
                });
            }
        });
        loss[0] = scale * sum(errors);
    }

    /// dy_ij += 2 (y_ij - t_ij) (scale dloss + de_i), dscale += dloss Σ e.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let (y, scale, errors) = (io.input(0), io.input(1)[0], io.output(1));
        let width = io.shapes.input(0).last();
        let dloss = io.output_gradients[0].map_or(T::ZERO, |d| d[0]);
        let derrors = io.output_gradients[1];
        if let Some(dy) = io.input_gradient(0) {
            let given = y.par_chunks(TILE * width).zip(io.ids[0].par_chunks(TILE * width));
            dy.tiles(TILE * width).zip(given).enumerate().for_each(|(i, (dy, (y, targets)))| {
                let rows = y.chunks_exact(width).zip(targets.chunks_exact(width));
                for (j, (dy, (y, targets))) in dy.chunks_exact_mut(width).zip(rows).enumerate() {
                    let weight = scale * dloss + derrors.map_or(T::ZERO, |d| d[i * TILE + j]);
                    let weight = weight + weight;
                    for (dy, (y, target)) in dy.iter_mut().zip(y.iter().zip(targets)) {
                        *dy = weight.mul_add(difference(*y, *target), *dy);
                    }
                }
            });
        }
        if let Some(dscale) = io.input_gradient(1) {
            dscale.cleared()[0] += dloss * sum(errors);
        }
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let (rows, width) = (io.shapes.input(0).rows(), io.shapes.input(0).last());
        let [loss, errors, ..] = io.outputs;
        let arguments = arguments![io.input(0), io.ids[0], errors, rows, width];
        io.queue.launch(&SOURCE, "squared_error_forward", [rows.div_ceil(8), 1, 1], 256, arguments)?;
        let arguments = arguments![errors, io.input(1), loss, rows, 0u32];
        io.queue.launch(&SOURCE, "squared_error_sum", [1, 1, 1], 256, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let (shape, [_, errors, ..]) = (io.shapes.input(0), io.outputs);
        let [dloss, derrors, ..] = io.output_gradients;
        if let Some(dy) = io.input_gradients[0] {
            let n = shape.len();
            let arguments =
                arguments![io.input(0), io.ids[0], io.input(1), dloss, derrors, dy, n as u64, shape.last()];
            io.queue.launch_each(&SOURCE, "squared_error_backward", n, arguments)?;
        }
        let (Some(dscale), Some(dloss)) = (io.input_gradients[1], dloss) else { return Ok(()) };
        let arguments = arguments![errors, dloss, dscale, shape.rows(), 1u32];
        io.queue.launch(&SOURCE, "squared_error_sum", [1, 1, 1], 256, arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Executor, Mode};
    use crate::ops::check::{Check, noise};

    fn bits(values: &[f64]) -> Vec<u32> {
        values.iter().map(|x| (*x as f32).to_bits()).collect()
    }

    #[test]
    fn gradients() {
        let mut targets = bits(&noise(9, 3 * 13 * 7));
        targets.iter_mut().step_by(5).for_each(|t| *t = IGNORE);
        targets[14..21].fill(IGNORE);
        Check::new().input([3, 13, 7]).input_of([1], vec![0.3]).ids(&targets).run(|tape, v, ids| {
            let (loss, errors) = squared_error(tape, v[0], ids[0], v[1])?;
            Ok(vec![loss, errors])
        });
        Check::new()
            .input([70, 1])
            .input([1])
            .ids(&bits(&noise(10, 70)))
            .run(|tape, v, ids| Ok(vec![squared_error(tape, v[0], ids[0], v[1])?.0]));
    }

    #[test]
    fn targets_that_are_no_numbers_show_and_ignored_ones_do_not() {
        let run = |target: u32| {
            let mut tape = Tape::new(Mode::Train);
            let y = tape.input_with_gradient([1, 2]);
            let (scale, targets) = (tape.input([1]), tape.ids(2));
            let (loss, _) = squared_error(&mut tape, y, targets, scale).unwrap();
            tape.keep(loss);
            tape.seed_gradient(loss);
            let mut executor = Executor::<f32>::new(tape);
            executor.input_mut(y).copy_from_slice(&[3.0, 5.0]);
            executor.input_mut(scale).fill(0.5);
            executor.ids_mut(targets).copy_from_slice(&[1.0f32.to_bits(), target]);
            executor.seed_mut(loss).fill(1.0);
            executor.forward(&[]);
            executor.backward(&[], &mut []);
            (executor.value(loss)[0], executor.gradient(y).to_vec())
        };
        assert_eq!(run(8.0f32.to_bits()), (6.5, vec![2.0, -3.0]));
        assert_eq!(run(IGNORE), (2.0, vec![2.0, 0.0]));
        let (loss, gradient) = run(f32::NAN.to_bits());
        assert!(loss.is_nan() && gradient[1].is_nan());
    }
}
