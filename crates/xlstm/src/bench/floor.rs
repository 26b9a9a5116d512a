//! The machine's own floor: how fast it multiplies matrices and how fast it reads memory. On a GPU
//! the products are of the precision in use, and memory is copied, its bytes read and written counted.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use super::median;
use crate::engine::bf16_products::product_in;
#[cfg(feature = "cuda")]
use crate::engine::cuda::measure;
use crate::engine::matrix::{MatMut, MatRef};
use crate::engine::vector::{dot, vectorize};
use crate::engine::{Device, Precision};
use crate::error::Result;

/// What a processor or a GPU can do at the most, measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Floor {
    /// 10^9 operations a second of a matrix product of f32 numbers, in the device's precision.
    pub product_gigaflops: f64,
    /// 10^9 bytes a second that are read from memory.
    pub bandwidth_gigabytes: f64,
}

/// Rows, columns and inner width of the product: a projection of a batch of 8 x 256 tokens.
const PRODUCT: [usize; 3] = [2048, 768, 256];

/// Rows, columns and inner width of a GPU's product.
#[cfg(feature = "cuda")]
const SQUARE: usize = 8192;

/// Bytes that a GPU copies.
#[cfg(feature = "cuda")]
const COPIED: usize = 1 << 30;

/// Numbers that are read: 256 MiB, many times what caches hold.
const NUMBERS: usize = 64 << 20;

/// Numbers that a thread reads in a row.
const PIECE: usize = 1 << 16;

/// Medians are of this many repetitions.
const REPEATS: usize = 11;

/// Repetitions before those: frequencies and pages have settled by then.
const WARM_UP: usize = 2;

impl Floor {
    /// Measures the processor, with the threads of `device`, or the GPU, in a second or two.
    ///
    /// # Errors
    /// When a GPU fails or has no room for the matrices.
    pub fn measure(device: &Device) -> Result<Floor> {
        match device {
            Device::Cpu(..) => Ok(device.install(|| Floor {
                product_gigaflops: product_gigaflops(PRODUCT, device.precision()),
                bandwidth_gigabytes: bandwidth_gigabytes(NUMBERS),
            })),
            #[cfg(feature = "cuda")]
            Device::Cuda(gpu, precision) => {
                let products = measure::product_seconds(gpu, *precision, SQUARE, REPEATS)?;
                let copies = measure::copy_seconds(gpu, COPIED, REPEATS)?;
                Ok(Floor {
                    product_gigaflops: 2.0 * (SQUARE as f64).powi(3) / median(&products) / 1e9,
                    bandwidth_gigabytes: 2.0 * COPIED as f64 / median(&copies) / 1e9,
                })
            }
        }
    }
}

/// The median time of `work`.
fn seconds(mut work: impl FnMut()) -> f64 {
    let mut times = Vec::with_capacity(REPEATS);
    for repeat in 0..REPEATS + WARM_UP {
        let start = Instant::now();
        work();
        if repeat >= WARM_UP {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    median(&times)
}

/// x W^T as a linear layer has it, on all threads.
fn product_gigaflops([rows, columns, inner]: [usize; 3], precision: Precision) -> f64 {
    let numbers = |count: usize| -> Vec<f32> { (0..count).map(|i| (i % 7) as f32 - 3.0).collect() };
    let (x, weights) = (numbers(rows * inner), numbers(columns * inner));
    let mut y = vec![0.0; rows * columns];
    let seconds = seconds(|| {
        let (x, weights) = (MatRef::new(&x, rows, inner), MatRef::new(&weights, columns, inner));
        product_in(precision, MatMut::new(&mut y, rows, columns), x, weights.t(), false);
        black_box(&mut y);
    });
    2.0 * (rows * columns * inner) as f64 / seconds / 1e9
}

/// A sum over numbers that lie in memory, on all threads.
fn bandwidth_gigabytes(count: usize) -> f64 {
    // Written by the threads that read, so that each page is there.
    let mut numbers = vec![0f32; count];
    numbers.par_chunks_mut(PIECE).for_each(|piece| piece.fill(1.0));
    let seconds = seconds(|| {
        let sums = numbers.par_chunks(PIECE).map(|piece| vectorize!(|| dot(piece, piece)));
        black_box(sums.sum::<f32>());
    });
    (count * size_of::<f32>()) as f64 / seconds / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_numbers() {
        let device = Device::cpu(2).unwrap();
        let (products, bandwidth) = device
            .install(|| (product_gigaflops([64, 48, 32], Precision::F32), bandwidth_gigabytes(1 << 20)));
        // No processor that runs this is slower than 10 MFLOP/s, none reads a terabyte in a ms.
        assert!((0.01..1e5).contains(&products), "{products}");
        assert!((0.01..1e6).contains(&bandwidth), "{bandwidth}");
    }
}
