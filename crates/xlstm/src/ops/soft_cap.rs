//! y = cap tanh(x / cap): keeps logits within ±cap.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::vectorize;
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::TILE;

/// x (…) -> y (…).
#[derive(Debug)]
struct SoftCap {
    cap: f64,
}

/// Records cap tanh(x / cap).
///
/// # Errors
/// None but those of the tape.
pub fn soft_cap(tape: &mut Tape, x: Var, cap: f64) -> Result<Var> {
    Ok(tape.record(SoftCap { cap }, &[Some(x)], &[])?[0])
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("soft_cap", include_str!("soft_cap.cu"));

impl Kernel for SoftCap {
    fn name(&self) -> &'static str {
        "soft_cap"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        inputs[0].map(|x| vec![x]).ok_or_else(|| Error::shape("x is needed"))
    }

    fn reads(&self) -> Slots {
        Slots::of(&[], &[0])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let tile = (TILE * io.shapes.outputs[0].last()).max(1);
        let (cap, inverse) = (T::from_f64(self.cap), T::from_f64(1.0 / self.cap));
        let y = io.output(0);
        y.par_chunks_mut(tile).zip(io.input(0).par_chunks(tile)).for_each(|(y, x)| {
            vectorize!(|| {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = cap * (*x * inverse).tanh();
                }
            });
        });
    }

    /// dx += dy (1 - (y / cap)²).
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let tile = (TILE * io.shapes.outputs[0].last()).max(1);
        let inverse = T::from_f64(1.0 / self.cap);
        let (dy, y) = (io.gradient(), io.output(0));
        let Some(dx) = io.input_gradient(0) else { return };
        dx.tiles(tile).zip(dy.par_chunks(tile).zip(y.par_chunks(tile))).for_each(|(dx, (dy, y))| {
            vectorize!(|| {
                for (dx, (dy, y)) in dx.iter_mut().zip(dy.iter().zip(y)) {
                    let t = *y * inverse;
                    *dx = dy.mul_add(T::ONE - t * t, *dx);
                }
            });
        });
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::of(&[0], &[])
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let n = io.shapes.outputs[0].len();
        let arguments = arguments![io.input(0), io.outputs[0], n as u64, self.cap];
        io.queue.launch_wide(&SOURCE, "soft_cap_forward", n, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let n = io.shapes.outputs[0].len();
        let Some(dx) = io.input_gradients[0] else { return Ok(()) };
        let fresh = u32::from(io.is_fresh(0));
        let arguments = arguments![io.gradient(), io.outputs[0], dx, n as u64, self.cap, fresh];
        io.queue.launch_wide(&SOURCE, "soft_cap_backward", n, arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{Check, noise};

    #[test]
    fn gradients() {
        for cap in [0.5, 15.0] {
            let values = noise(1, 3 * 37 * 5).iter().map(|x| 3.0 * cap * x).collect();
            Check::new().input_of([3, 37, 5], values).run(|tape, v, _| Ok(vec![soft_cap(tape, v[0], cap)?]));
        }
    }
}
