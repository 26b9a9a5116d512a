//! The two element types of the engine, f32 and f64, and the functions that cells need.
//!
//! f64 goes through the standard library and is the truth that f32 is tested against.
//! f32 uses branch-free polynomials: a plain loop over them, run through
//! `vectorize!`, becomes SIMD code, which `f32::exp` (a call
//! per element) never does. They propagate NaN, so that a non-finite loss is seen.

use std::fmt::{Debug, Display};
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, DivAssign, Mul, MulAssign, Neg, Sub, SubAssign};

/// A floating-point element type.
pub trait Scalar:
    Copy
    + Default
    + Debug
    + Display
    + PartialOrd
    + Send
    + Sync
    + Sum
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + DivAssign
    + bytemuck::Pod
    + 'static
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// The weight of nothing: exp of it is exactly 0.
    const NEG_INFINITY: Self;
    /// The smallest positive normal number.
    const MIN_POSITIVE: Self;
    /// The quiet NaN that tests fill unwritten memory with.
    const NAN: Self;

    /// Nearest value of this type.
    fn from_f64(x: f64) -> Self;
    /// Exact in both types.
    fn to_f64(self) -> f64;
    /// Fused multiply-add: self * a + b, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// e^self.
    fn exp(self) -> Self;
    /// ln(1 + self) for self in [0, 1].
    fn ln_1p_unit(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Error function.
    fn erf(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Absolute value.
    fn abs(self) -> Self;
    /// Neither infinite nor NaN.
    fn is_finite(self) -> bool;

    /// The larger of two numbers (the other one where one is NaN).
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }

    /// The smaller of two numbers (the other one where one is NaN).
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        if self < other { self } else { other }
    }

    /// 1 / (1 + e^-x).
    #[inline(always)]
    fn sigmoid(self) -> Self {
        Self::ONE / (Self::ONE + (-self).exp())
    }

    /// ln sigmoid(x), exact in both tails.
    #[inline(always)]
    fn log_sigmoid(self) -> Self {
        self.min(Self::ZERO) - (-self.abs()).exp().ln_1p_unit()
    }
}

impl Scalar for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const NEG_INFINITY: f64 = f64::NEG_INFINITY;
    const MIN_POSITIVE: f64 = f64::MIN_POSITIVE;
    const NAN: f64 = f64::NAN;

    #[inline(always)]
    fn from_f64(x: f64) -> f64 {
        x
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn mul_add(self, a: f64, b: f64) -> f64 {
        f64::mul_add(self, a, b)
    }
    #[inline(always)]
    fn exp(self) -> f64 {
        f64::exp(self)
    }
    #[inline(always)]
    fn ln_1p_unit(self) -> f64 {
        f64::ln_1p(self)
    }
    #[inline(always)]
    fn ln(self) -> f64 {
        f64::ln(self)
    }
    #[inline(always)]
    fn tanh(self) -> f64 {
        f64::tanh(self)
    }
    #[inline(always)]
    fn erf(self) -> f64 {
        libm::erf(self)
    }
    #[inline(always)]
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> f64 {
        f64::abs(self)
    }
    #[inline(always)]
    fn is_finite(self) -> bool {
        f64::is_finite(self)
    }
}

/// Adding it to |x| < 2^22 leaves round(x) in the low mantissa bits.
const ROUND: f32 = 12_582_912.0;
const LN_2_HIGH: f32 = 0.693_145_75;
const LN_2_LOW: f32 = 1.428_606_8e-6;

impl Scalar for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const NEG_INFINITY: f32 = f32::NEG_INFINITY;
    const MIN_POSITIVE: f32 = f32::MIN_POSITIVE;
    const NAN: f32 = f32::NAN;

    #[inline(always)]
    fn from_f64(x: f64) -> f32 {
        x as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn mul_add(self, a: f32, b: f32) -> f32 {
        f32::mul_add(self, a, b)
    }

    /// e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2; the Taylor polynomial
    /// of degree 7 is exact to 6e-9 there. Below 2^-126 the result is 0, not denormal.
    #[inline(always)]
    fn exp(self) -> f32 {
        let shifted = self.mul_add(std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, self));
        let mut p = (1.0f32 / 5040.0).mul_add(r, 1.0 / 720.0);
        p = p.mul_add(r, 1.0 / 120.0);
        p = p.mul_add(r, 1.0 / 24.0);
        p = p.mul_add(r, 1.0 / 6.0);
        p = p.mul_add(r, 0.5);
        p = p.mul_add(r, 1.0);
        p = p.mul_add(r, 1.0);
        // ROUND has zero low bits, so the shift leaves n + 127 in the exponent field.
        let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
        let value = p * scale;
        let value = if self < -87.33 { 0.0 } else { value };
        if self > 88.37 { f32::INFINITY } else { value }
    }

    /// ln(1 + y) = 2 artanh(y / (2 + y)); the argument is at most 1/3.
    #[inline(always)]
    fn ln_1p_unit(self) -> f32 {
        let z = self / (2.0 + self);
        let z2 = z * z;
        let mut p = (1.0f32 / 13.0).mul_add(z2, 1.0 / 11.0);
        p = p.mul_add(z2, 1.0 / 9.0);
        p = p.mul_add(z2, 1.0 / 7.0);
        p = p.mul_add(z2, 1.0 / 5.0);
        p = p.mul_add(z2, 1.0 / 3.0);
        p = p.mul_add(z2, 1.0);
        2.0 * z * p
    }
    #[inline(always)]
    fn ln(self) -> f32 {
        f32::ln(self)
    }

    /// The Taylor polynomial near 0, where 1 - 2 / (e^2x + 1) cancels.
    #[inline(always)]
    fn tanh(self) -> f32 {
        let far = 1.0 - 2.0 / (Scalar::exp(2.0 * self) + 1.0);
        let x2 = self * self;
        let mut p = (21_844.0f32 / 6_081_075.0).mul_add(x2, -1_382.0 / 155_925.0);
        p = p.mul_add(x2, 62.0 / 2_835.0);
        p = p.mul_add(x2, -17.0 / 315.0);
        p = p.mul_add(x2, 2.0 / 15.0);
        p = p.mul_add(x2, -1.0 / 3.0);
        p = p.mul_add(x2, 1.0);
        if f32::abs(self) < 0.4 { self * p } else { far }
    }

    /// Abramowitz and Stegun 7.1.26: absolute error at most 1.5e-7.
    #[inline(always)]
    fn erf(self) -> f32 {
        let x = f32::abs(self);
        let t = 1.0 / x.mul_add(0.327_591_1, 1.0);
        let mut p = 1.061_405_4f32.mul_add(t, -1.453_152);
        p = p.mul_add(t, 1.421_413_7);
        p = p.mul_add(t, -0.284_496_74);
        p = p.mul_add(t, 0.254_829_6);
        let y = 1.0 - p * t * Scalar::exp(-x * x);
        if self < 0.0 { -y } else { y }
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> f32 {
        f32::abs(self)
    }
    #[inline(always)]
    fn is_finite(self) -> bool {
        f32::is_finite(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest error of `fast` against `exact` over a dense grid, relative where the value
    /// is large and absolute where it is below `floor`.
    fn worst(range: std::ops::Range<f64>, floor: f64, fast: fn(f32) -> f32, exact: fn(f64) -> f64) -> f64 {
        (0..200_001)
            .map(|i| (range.start + (range.end - range.start) * f64::from(i) / 200_000.0) as f32)
            .map(|x| {
                let truth = exact(f64::from(x));
                (f64::from(fast(x)) - truth).abs() / truth.abs().max(floor)
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn polynomials_match_the_standard_library() {
        assert!(worst(-87.0..88.0, 0.0, <f32 as Scalar>::exp, f64::exp) < 2e-7);
        assert!(worst(0.0..1.0, 1e-30, <f32 as Scalar>::ln_1p_unit, f64::ln_1p) < 4e-7);
        assert!(worst(-12.0..12.0, 1e-30, <f32 as Scalar>::tanh, f64::tanh) < 6e-7);
        assert!(worst(-6.0..6.0, 1.0, <f32 as Scalar>::erf, libm::erf) < 6e-7);
        assert!(worst(-80.0..80.0, 1e-30, Scalar::sigmoid, Scalar::sigmoid) < 4e-7);
        assert!(worst(-80.0..80.0, 1e-30, Scalar::log_sigmoid, Scalar::log_sigmoid) < 4e-7);
    }

    #[test]
    fn extremes_are_exact_and_nan_survives() {
        assert_eq!(Scalar::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Scalar::exp(-1000.0f32), 0.0);
        assert_eq!(Scalar::exp(1000.0f32), f32::INFINITY);
        assert_eq!(Scalar::exp(0.0f32), 1.0);
        assert_eq!(Scalar::sigmoid(-200.0f32), 0.0);
        assert_eq!(Scalar::sigmoid(200.0f32), 1.0);
        assert_eq!(Scalar::log_sigmoid(-200.0f32), -200.0);
        assert_eq!(Scalar::tanh(100.0f32), 1.0);
        assert!(Scalar::exp(f32::NAN).is_nan());
        assert!(Scalar::tanh(f32::NAN).is_nan());
    }
}
