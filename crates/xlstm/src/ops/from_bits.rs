//! y = the numbers whose bits are given as integers: how features enter a tape.
//!
//! All that changes between replays is integers, which a step uploads in one piece; features are
//! no exception. They are f32, whatever the tape computes in.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Ids, Tape, Var};
use crate::engine::{Scalar, Shape};
use crate::error::Result;

/// bits (elements of the shape) -> y (shape).
#[derive(Debug)]
struct FromBits {
    shape: Shape,
}

/// Records the f32 numbers that have these bits, as a value of `shape`. No gradient flows.
///
/// # Errors
/// None: the caller gives as many integers as the shape has elements.
pub fn from_bits(tape: &mut Tape, bits: Ids, shape: impl Into<Shape>) -> Result<Var> {
    Ok(tape.record(FromBits { shape: shape.into() }, &[], &[bits])?[0])
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("from_bits", include_str!("from_bits.cu"));

impl Kernel for FromBits {
    fn name(&self) -> &'static str {
        "from_bits"
    }

    fn outputs(&self, _: &[Option<Shape>]) -> Result<Vec<Shape>> {
        Ok(vec![self.shape])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (y, bits) = (io.output(0), io.ids[0]);
        y.par_chunks_mut(1 << 12).zip(bits.par_chunks(1 << 12)).for_each(|(y, bits)| {
            y.iter_mut().zip(bits).for_each(|(y, bits)| *y = T::from_f64(f64::from(f32::from_bits(*bits))));
        });
    }

    fn backward<T: Scalar>(&self, _: &mut Backward<'_, T>) {}

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let n = self.shape.len();
        io.queue.launch_each(&SOURCE, "from_bits", n, arguments![io.ids[0], io.outputs[0], n as u64])
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, _: &mut CudaBackward<'_>) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::add::add;
    use crate::ops::check::{Check, noise};

    /// The numbers arrive, and a gradient passes by.
    #[test]
    fn numbers_and_no_gradient() {
        let numbers = noise(5, 5000);
        let bits: Vec<u32> = numbers.iter().map(|x| (*x as f32).to_bits()).collect();
        Check::new().input([2, 50, 50]).ids(&bits).run(|tape, v, ids| {
            let x = from_bits(tape, ids[0], [2, 50, 50])?;
            Ok(vec![add(tape, v[0], x)?, x])
        });
        let mut tape = Tape::new(crate::engine::Mode::Evaluate);
        let ids = tape.ids(5000);
        let x = from_bits(&mut tape, ids, [5000]).unwrap();
        tape.keep(x);
        let mut executor = crate::engine::Executor::<f64>::new(tape);
        executor.ids_mut(ids).copy_from_slice(&bits);
        executor.forward(&[]);
        assert!(executor.value(x).iter().zip(&numbers).all(|(a, b)| *a == f64::from(*b as f32)));
    }
}
