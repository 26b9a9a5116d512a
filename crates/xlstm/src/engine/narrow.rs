//! Weights stored in fewer bits than they are computed with.

use super::precision::from_bf16;
use super::quantized::Quantized;
use super::scalar::Scalar;
use super::vector::vectorize;

/// The number formats of 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// The upper half of f32.
    Bf16,
    /// IEEE 754's half precision.
    F16,
}

/// Weights in fewer bits than 32.
#[derive(Clone, Copy, Debug)]
pub enum Narrow<'a> {
    /// Numbers of 16 bits.
    Half(Half, &'a [u16]),
    /// Numbers in groups with a scale.
    Quantized(Quantized<'a>),
}

impl Narrow<'_> {
    /// Writes the same numbers to `wide`.
    pub fn widen<T: Scalar>(self, wide: &mut [T]) {
        match self {
            Narrow::Half(Half::Bf16, bits) => vectorize!(|| widen::<T, Bf16>(wide, bits)),
            Narrow::Half(Half::F16, bits) => vectorize!(|| widen::<T, F16>(wide, bits)),
            Narrow::Quantized(weights) => weights.widen(wide),
        }
    }

    /// `count` of the numbers from `first`: in whole groups, where there are groups.
    pub fn at(self, first: usize, count: usize) -> Self {
        match self {
            Narrow::Half(half, bits) => Narrow::Half(half, &bits[first..first + count]),
            Narrow::Quantized(weights) => Narrow::Quantized(weights.at(first, count)),
        }
    }
}

/// How a weight becomes a number. A type, not a closure: whatever the standard library would
/// call a closure from may stay a function of its own, which is then no SIMD code.
pub(super) trait Widen<T> {
    /// What is stored.
    type Bits: Copy + Sync;
    /// The number.
    fn number(bits: Self::Bits) -> T;
}

/// bf16.
pub(super) struct Bf16;
/// f16.
pub(super) struct F16;

impl<T: Scalar> Widen<T> for Bf16 {
    type Bits = u16;
    #[inline(always)]
    fn number(bits: u16) -> T {
        // Folded away for f32.
        T::from_f64(f64::from(from_bf16(bits)))
    }
}

impl<T: Scalar> Widen<T> for F16 {
    type Bits = u16;
    #[inline(always)]
    fn number(bits: u16) -> T {
        T::from_f64(f64::from(from_f16(bits)))
    }
}

/// The f32 that is this f16. Without branches, so that loops over it become SIMD code.
#[inline(always)]
pub(super) fn from_f16(x: u16) -> f32 {
    const SMALLEST_NORMAL: u32 = 113 << 23;
    let magnitude = u32::from(x & 0x7fff) << 13;
    let exponent = magnitude & 0x0f80_0000;
    // From the bias of 15 to that of 127; infinities and NaNs go to the top.
    let normal = magnitude + if exponent == 0x0f80_0000 { 224 << 23 } else { 112 << 23 };
    // A subnormal is the mantissa of a number with a hidden one, less that one.
    let subnormal = f32::from_bits(magnitude + SMALLEST_NORMAL) - f32::from_bits(SMALLEST_NORMAL);
    let bits = if exponent == 0 { subnormal.to_bits() } else { normal };
    f32::from_bits(bits | u32::from(x & 0x8000) << 16)
}

/// The nearest f16, ties to even.
pub(super) fn to_f16(x: f32) -> u16 {
    let sign = (x.to_bits() >> 16 & 0x8000) as u16;
    let magnitude = f32::from_bits(x.to_bits() & 0x7fff_ffff);
    let bits = if x.is_nan() {
        0x7e00
    } else if magnitude >= 65520.0 {
        0x7c00
    } else if magnitude < 6.103_515_6e-5 {
        // The sum's last place is worth 2^-24, f16's smallest step, so that the addition rounds.
        ((magnitude + 0.5).to_bits() - 0.5_f32.to_bits()) as u16
    } else {
        let bits = magnitude.to_bits() - (112 << 23);
        ((bits + 0xfff + (bits >> 13 & 1)) >> 13) as u16
    };
    sign | bits
}

#[inline(always)]
fn widen<T: Scalar, W: Widen<T>>(wide: &mut [T], bits: &[W::Bits]) {
    for (wide, bits) in wide.iter_mut().zip(bits) {
        *wide = W::number(*bits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_widened_exactly_and_comes_back() {
        for bits in 0..=u16::MAX {
            let (exponent, mantissa) = (i32::from(bits >> 10 & 0x1f), f64::from(bits & 0x3ff));
            let magnitude = match exponent {
                0 => mantissa * 2_f64.powi(-24),
                31 if mantissa == 0.0 => f64::INFINITY,
                31 => f64::NAN,
                _ => (1.0 + mantissa / 1024.0) * 2_f64.powi(exponent - 15),
            };
            let want = if bits >> 15 == 1 { -magnitude } else { magnitude };
            let got = from_f16(bits);
            if want.is_nan() {
                assert!(got.is_nan() && from_f16(to_f16(got)).is_nan(), "{bits:04x}");
            } else {
                assert_eq!(f64::from(got), want, "{bits:04x}");
                assert_eq!(to_f16(got), bits, "{bits:04x}");
            }
        }
    }

    #[test]
    fn f16_rounds_to_the_nearest_and_ties_to_even() {
        // Between any two neighbours: just below the middle, the middle, just above it.
        for low in 0..0x7bff_u16 {
            let (a, b) = (f64::from(from_f16(low)), f64::from(from_f16(low + 1)));
            let middle = ((a + b) / 2.0) as f32;
            assert_eq!(f64::from(middle), (a + b) / 2.0);
            assert_eq!(to_f16(f32::from_bits(middle.to_bits() - 1)), low);
            assert_eq!(to_f16(middle), low + (low & 1));
            assert_eq!(to_f16(f32::from_bits(middle.to_bits() + 1)), low + 1);
        }
        assert_eq!(to_f16(65519.99), 0x7bff);
        assert_eq!((to_f16(65520.0), to_f16(f32::MAX), to_f16(-1e9)), (0x7c00, 0x7c00, 0xfc00));
    }
}
