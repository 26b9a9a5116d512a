//! The engine on an NVIDIA GPU: the same tape, replayed by kernels.
//!
//! Memory: the plan's slots lie in one arena; parameters, their gradients and the optimizer's
//! moments are flat f32 buffers of one [`Layout`], beside which bf16 has a copy of the parameters
//! that matrix products read. Every reduction has a fixed order and no
//! float is added atomically, so a step gives the same bits every time. Everything that
//! changes between steps lies in device memory, so a step is captured once as a CUDA graph.

mod algorithms;
pub(crate) mod blas;
pub mod compiler;
pub(crate) mod context;
pub mod executor;
pub(crate) mod launch;
pub mod parameters;

pub use compiler::Source;
pub use context::Gpu;
pub use executor::CudaExecutor;
pub use launch::{CudaBackward, CudaForward};
pub use parameters::{CudaParameters, CudaTensors, Layout};

/// What activations, their gradients, and weights in matrix products are stored in. Gate
/// pre-activations, states, statistics, losses, parameter gradients, moments, the parameters
/// themselves and all arithmetic are f32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32 throughout, without TF32.
    F32,
    /// bf16: f32 without its last 16 bits, so of its range and of 3 digits.
    Bf16,
}

impl Precision {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        }
    }

    /// The nearest number that can be stored, ties to even, as kernels round.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Precision::F32 => x,
            Precision::Bf16 => from_bf16(to_bf16(x)),
        }
    }
}

/// The upper half of the nearest f32 whose lower half is zero.
fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    // Rounding must not carry a NaN over into infinity, nor cut it down to one.
    let rounded = if x.is_nan() { bits | 0x0040_0000 } else { bits + 0x7fff + (bits >> 16 & 1) };
    (rounded >> 16) as u16
}

fn from_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_the_nearest_and_ties_to_even() {
        let round = |x| Precision::Bf16.round(x);
        for exact in [0.0, -0.0, 1.0, -1.5, 256.0, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(round(exact).to_bits(), f32::to_bits(exact));
        }
        let step = 1.0 / 128.0;
        assert_eq!(round(1.0 + 0.49 * step), 1.0);
        assert_eq!(round(1.0 + 0.5 * step), 1.0);
        assert_eq!(round(1.0 + 1.5 * step), 1.0 + 2.0 * step);
        assert_eq!(round(f32::MAX), f32::INFINITY);
        assert!(round(f32::NAN).is_nan() && round(f32::from_bits(0x7f80_0001)).is_nan());
    }
}
