//! Number formats of activations.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What activations, their gradients, and weights in matrix products are stored in. Gate
/// pre-activations, states, statistics, losses, parameter gradients, moments, the parameters
/// themselves and all arithmetic are f32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
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

    /// `f32` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
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

impl FromStr for Precision {
    type Err = Error;

    fn from_str(text: &str) -> Result<Precision> {
        [Precision::F32, Precision::Bf16].into_iter().find(|precision| precision.name() == text).ok_or_else(
            || Error::config(format!("{text:?} is no number format")).hint("there are f32 and bf16"),
        )
    }
}

/// The upper half of the nearest f32 whose lower half is zero.
#[inline(always)]
pub(super) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    // Rounding must not carry a NaN over into infinity, nor cut it down to one.
    let rounded = if x.is_nan() { bits | 0x0040_0000 } else { bits + 0x7fff + (bits >> 16 & 1) };
    (rounded >> 16) as u16
}

/// The f32 of which this is the upper half.
#[inline(always)]
pub(super) fn from_bf16(x: u16) -> f32 {
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

    #[test]
    fn formats_are_words() {
        for precision in [Precision::F32, Precision::Bf16] {
            assert_eq!(precision.name().parse::<Precision>().unwrap(), precision);
        }
        assert!("f16".parse::<Precision>().unwrap_err().hint_text().is_some());
    }
}
