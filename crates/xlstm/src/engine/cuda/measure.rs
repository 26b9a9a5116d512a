//! How fast a GPU multiplies matrices and copies memory: its own floor.

use std::sync::Arc;

use super::blas::{Operand, Product};
use super::context::{Buffer, Gpu};
use super::event::milliseconds;
use super::launch::Queue;
use super::{Precision, to_bf16};
use crate::error::Result;
use crate::rng::Rng;

/// Numbers of the noise, which repeats.
const DRAWN: usize = (1 << 20) - 3;

/// Seconds of each of `repeats` products of two square matrices of width `n`, of noise: zeros take
/// less power and would be faster.
pub(crate) fn product_seconds(
    gpu: &Arc<Gpu>,
    precision: Precision,
    n: usize,
    repeats: usize,
) -> Result<Vec<f64>> {
    let queue = Queue::new(gpu, precision)?;
    let mut buffers = Vec::new();
    for _ in 0..3 {
        buffers.push(Buffer::zeros(gpu, n * n * precision.bytes())?);
    }
    let mut rng = Rng::new(1, 0);
    let drawn: Vec<f32> = (0..DRAWN).map(|_| (2.0 * rng.uniform() - 1.0) as f32).collect();
    for buffer in &buffers[..2] {
        let numbers = drawn.iter().copied().cycle().take(n * n);
        match precision {
            Precision::F32 => gpu.upload(buffer.pointer(), &numbers.collect::<Vec<f32>>())?,
            Precision::Bf16 => gpu.upload(buffer.pointer(), &numbers.map(to_bf16).collect::<Vec<u16>>())?,
        }
    }
    gpu.synchronize()?;
    let product = Product {
        size: [n; 3],
        a: Operand::new(buffers[0].pointer(), n),
        b: Operand::new(buffers[1].pointer(), n).t(),
        c: Operand::new(buffers[2].pointer(), n),
        batch: 1,
        accumulate: false,
    };
    seconds(gpu, repeats, || queue.product(&product))
}

/// Seconds of each of `repeats` copies of so many bytes.
pub(crate) fn copy_seconds(gpu: &Arc<Gpu>, bytes: usize, repeats: usize) -> Result<Vec<f64>> {
    let (from, to) = (Buffer::zeros(gpu, bytes)?, Buffer::zeros(gpu, bytes)?);
    seconds(gpu, repeats, || gpu.copy(to.pointer(), from.pointer(), bytes))
}

/// The first time is left out: it starts libraries and loads code.
fn seconds(gpu: &Gpu, repeats: usize, work: impl Fn() -> Result<()>) -> Result<Vec<f64>> {
    work()?;
    (0..repeats).map(|_| Ok(f64::from(milliseconds(gpu, &work)?) / 1e3)).collect()
}
