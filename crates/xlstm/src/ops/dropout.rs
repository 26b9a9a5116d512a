//! Inverted dropout whose mask is a function of the element, not of a generator's state.
//!
//! Element e is kept if hash(seed, step, micro-batch, site, e) is at least rate · 2^32.
//! Backward works the mask out again, so nothing is saved; a resumed run, another number
//! of threads and another device drop the same elements.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments, launch::Queue};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Ids, Mode, Tape, Var};
use crate::engine::vector::vectorize;
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};

/// x (…), seed (4 integers) -> y (…).
#[derive(Debug)]
struct Dropout {
    rate: f64,
    site: u32,
}

/// Records dropout of x: in training each element is 0 with probability `rate`, else
/// divided by 1 - rate. Otherwise, and at rate 0, it is x itself.
///
/// `seed` holds the low and the high half of the run's seed, the step and the micro-batch;
/// `site` is the place in the model. Values have fewer than 2^32 elements.
///
/// # Errors
/// When the rate is not in [0, 1).
pub fn dropout(tape: &mut Tape, x: Var, rate: f64, seed: Ids, site: u32) -> Result<Var> {
    if !(0.0..1.0).contains(&rate) {
        return Err(Error::config(format!("a dropout rate is at least 0 and below 1, not {rate}")));
    }
    if rate == 0.0 || tape.mode() == Mode::Evaluate {
        return Ok(x);
    }
    Ok(tape.record(Dropout { rate, site }, &[Some(x)], &[seed])?[0])
}

/// Elements a parallel task works on.
const CHUNK: usize = 8192;

/// A bijection of the 32-bit integers in which every input bit moves every output bit with
/// probability near 1/2 (triple32, Wellons 2018), with a key added between its rounds.
#[inline(always)]
fn mix(mut x: u32, key: u32) -> u32 {
    x ^= x >> 17;
    x = x.wrapping_mul(0xed5a_d4bb);
    x ^= x >> 11;
    x = x.wrapping_add(key).wrapping_mul(0xac4c_1b51);
    x ^= x >> 15;
    x = x.wrapping_mul(0x3184_8bab);
    x ^ x >> 14
}

impl Dropout {
    /// What the elements are hashed with: two words in which all of the seed is mixed.
    fn keys(&self, seed: &[u32]) -> [u32; 2] {
        let [low, high, step, micro] = seed[..4] else { unreachable!("four integers were sliced") };
        let parts = [low, high, step, micro, self.site];
        let absorb = |key: u32| parts.iter().fold(key, |key, &part| mix(part ^ key, key));
        [absorb(0x243f_6a88), absorb(0x85a3_08d3)]
    }

    /// 1 / (1 - rate) where the element is kept, 0 where it is dropped.
    #[inline(always)]
    fn factor<T: Scalar>(element: u32, keys: [u32; 2], threshold: u32, kept: T) -> T {
        if mix(element ^ keys[0], keys[1]) < threshold { T::ZERO } else { kept }
    }

    /// `each`(to, from, factor) for every element.
    fn apply<T: Scalar>(&self, seed: &[u32], to: &mut [T], from: &[T], each: impl Fn(&mut T, T, T) + Sync) {
        let keys = self.keys(seed);
        let threshold = (self.rate * 2f64.powi(32)) as u32;
        let kept = T::from_f64(1.0 / (1.0 - self.rate));
        to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).enumerate().for_each(|(i, (to, from))| {
            vectorize!(|| {
                let first = (i * CHUNK) as u32;
                for ((to, from), element) in to.iter_mut().zip(from).zip(0u32..) {
                    let factor = Dropout::factor(first.wrapping_add(element), keys, threshold, kept);
                    each(to, *from, factor);
                }
            });
        });
    }
}

#[cfg(feature = "cuda")]
impl Dropout {
    /// Backward is forward, added.
    fn launch(&self, queue: &Queue, seed: u64, x: u64, y: u64, n: usize, accumulate: bool) -> Result<()> {
        let threshold = (self.rate * 2f64.powi(32)) as u32;
        let kept = 1.0 / (1.0 - self.rate);
        let arguments = arguments![seed, x, y, n as u64, self.site, threshold, kept, u32::from(accumulate)];
        queue.launch_wide(&SOURCE, "dropout", n, arguments)
    }
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("dropout", include_str!("dropout.cu"));

impl Kernel for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        Ok(vec![inputs[0].ok_or_else(|| Error::shape("x is needed"))?])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let y = io.output(0);
        self.apply(
            io.ids[0],
            y,
            io.input(0),
            #[inline(always)]
            |y, x, factor| *y = x * factor,
        );
    }

    /// dx += dy ∘ mask.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let Some(dx) = io.input_gradient(0) else { return };
        let dx = dx.cleared();
        self.apply(
            io.ids[0],
            dx,
            io.gradient(),
            #[inline(always)]
            |dx, dy, factor| *dx = dy.mul_add(factor, *dx),
        );
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        self.launch(io.queue, io.ids[0], io.input(0), io.outputs[0], io.shapes.outputs[0].len(), false)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let Some(dx) = io.input_gradients[0] else { return Ok(()) };
        self.launch(io.queue, io.ids[0], io.gradient(), dx, io.shapes.outputs[0].len(), true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Executor;
    use crate::ops::check::Check;

    /// The outcome for an input of ones.
    fn mask(n: usize, rate: f64, seed: [u32; 4], site: u32) -> Vec<f32> {
        let mut tape = Tape::new(Mode::Train);
        let x = tape.input([n]);
        let ids = tape.ids(4);
        let y = dropout(&mut tape, x, rate, ids, site).unwrap();
        tape.keep(y);
        let mut executor = Executor::<f32>::new(tape);
        executor.input_mut(x).fill(1.0);
        executor.ids_mut(ids).copy_from_slice(&seed);
        executor.forward(&[]);
        executor.value(y).to_vec()
    }

    /// The share of elements on which two masks differ.
    fn distance(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).filter(|(a, b)| a != b).count() as f64 / a.len() as f64
    }

    /// The gradient is the mask, and neither depends on the threads.
    #[test]
    fn gradients() {
        for rate in [0.0, 0.3] {
            Check::new()
                .input([3, 5000])
                .ids(&[1, 2, 3, 4])
                .run(|tape, v, ids| Ok(vec![dropout(tape, v[0], rate, ids[0], 7)?]));
        }
    }

    #[test]
    fn the_kept_share_is_right_and_its_sum_unbiased() {
        let n = 1 << 20;
        for rate in [0.1, 0.5, 0.9] {
            let mask = mask(n, rate, [1, 2, 3, 4], 5);
            let dropped = mask.iter().filter(|&&m| m == 0.0).count() as f64 / n as f64;
            let spread = (rate * (1.0 - rate) / n as f64).sqrt();
            assert!((dropped - rate).abs() < 4.0 * spread, "rate {rate}, dropped {dropped}");
            assert!(mask.iter().all(|&m| m == 0.0 || (f64::from(m) * (1.0 - rate) - 1.0).abs() < 1e-6));
        }
    }

    #[test]
    fn every_part_of_the_seed_gives_another_mask() {
        let n = 1 << 16;
        let first = mask(n, 0.5, [1, 2, 3, 4], 5);
        assert_eq!(first, mask(n, 0.5, [1, 2, 3, 4], 5));
        let mut others = vec![mask(n, 0.5, [1, 2, 3, 4], 6), mask(n, 0.5, [2, 1, 3, 4], 5)];
        for part in 0..4 {
            let mut seed = [1, 2, 3, 4];
            seed[part] += 1;
            others.push(mask(n, 0.5, seed, 5));
        }
        // Masks are independent: of each other and of each other's neighbours.
        for i in 0..others.len() {
            assert!((distance(&first, &others[i]) - 0.5).abs() < 0.01);
            for j in 0..i {
                assert!((distance(&others[j], &others[i]) - 0.5).abs() < 0.01);
            }
        }
        for shift in [1, 2, 3, 16, 1024] {
            assert!((distance(&first[shift..], &first) - 0.5).abs() < 0.01);
            assert!((distance(&first[shift..], &others[0]) - 0.5).abs() < 0.01);
        }
    }

    #[test]
    fn nothing_is_recorded_where_nothing_is_dropped() {
        let mut tape = Tape::new(Mode::Evaluate);
        let (x, seed) = (tape.input([3]), tape.ids(4));
        assert_eq!(dropout(&mut tape, x, 0.5, seed, 0).unwrap(), x);
        let mut tape = Tape::new(Mode::Train);
        let (x, seed) = (tape.input([3]), tape.ids(4));
        assert_eq!(dropout(&mut tape, x, 0.0, seed, 0).unwrap(), x);
        assert!(dropout(&mut tape, x, 1.0, seed, 0).is_err());
    }
}
