//! Activation functions: act(x), and the gated feed-forward's act(gate) ∘ up.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use crate::engine::cuda::{
    CudaBackward, CudaForward, Next, Source, context::arguments, few_rows::Kind, few_rows::Preparation,
};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Tape, Var};
use crate::engine::vector::vectorize;
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::{TILE, gradient_tiles};

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// x Φ(x), with the exact normal distribution function (erf).
    #[serde(rename = "gelu")]
    Gelu,
    /// max(x, 0).
    #[serde(rename = "relu")]
    Relu,
    /// max(x, 0)².
    #[serde(rename = "relu^2")]
    ReluSquared,
    /// 1 / (1 + e^-x).
    #[serde(rename = "sigmoid")]
    Sigmoid,
    /// x sigmoid(x), also known as SiLU.
    #[serde(rename = "swish")]
    Swish,
    /// λ x above 0, λ α (e^x - 1) below (Klambauer et al. 2017).
    #[serde(rename = "selu")]
    Selu,
}

const SELU_SCALE: f64 = 1.050_700_987_355_480_5;
const SELU_ALPHA: f64 = 1.673_263_242_354_377_2;

impl Activation {
    /// The function at x.
    #[inline(always)]
    pub fn value<T: Scalar>(self, x: T) -> T {
        self.value_and_derivative(x).0
    }

    /// The function and its derivative at x; the derivative at a kink is that below it.
    #[inline(always)]
    pub fn value_and_derivative<T: Scalar>(self, x: T) -> (T, T) {
        match self {
            Activation::Gelu => {
                let half = T::from_f64(0.5);
                let below = (x * T::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf().mul_add(half, half);
                let density = T::from_f64(0.398_942_280_401_432_7) * (-half * x * x).exp();
                (x * below, x.mul_add(density, below))
            }
            // Written so that NaN goes through.
            Activation::Relu if x <= T::ZERO => (T::ZERO, T::ZERO),
            Activation::Relu => (x, T::ONE),
            Activation::ReluSquared if x <= T::ZERO => (T::ZERO, T::ZERO),
            Activation::ReluSquared => (x * x, x + x),
            Activation::Sigmoid => {
                let s = x.sigmoid();
                (s, s * (T::ONE - s))
            }
            Activation::Swish => {
                let s = x.sigmoid();
                let y = x * s;
                (y, y.mul_add(T::ONE - s, s))
            }
            Activation::Selu => {
                let scale = T::from_f64(SELU_SCALE);
                let slope =
                    T::from_f64(SELU_SCALE * SELU_ALPHA) * (if x > T::ZERO { T::ZERO } else { x }).exp();
                let below = slope - T::from_f64(SELU_SCALE * SELU_ALPHA);
                if x > T::ZERO { (scale * x, scale) } else { (below, slope) }
            }
        }
    }
}

/// Runs `$body` with `$fixed` a constant, so that its loops know the function.
macro_rules! with_fixed {
    ($activation:expr, $fixed:ident => $body:expr) => {
        with_fixed!(@arms $activation, $fixed, $body, Gelu Relu ReluSquared Sigmoid Swish Selu)
    };
    (@arms $activation:expr, $fixed:ident, $body:expr, $($name:ident)*) => {
        match $activation {
            $(Activation::$name => {
                const $fixed: Activation = Activation::$name;
                $body
            })*
        }
    };
}

/// gate (…), up (…) -> y (…), all of one shape.
#[derive(Debug)]
struct Gated(Activation);

/// Records act(gate) ∘ up, two different values of one shape.
///
/// # Errors
/// When the shapes differ.
pub fn gated(tape: &mut Tape, gate: Var, up: Var, activation: Activation) -> Result<Var> {
    Ok(tape.record(Gated(activation), &[Some(gate), Some(up)], &[])?[0])
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("activation", include_str!("activation.cu"));

impl Kernel for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        match (inputs[0], inputs[1]) {
            (Some(gate), Some(up)) if gate == up => Ok(vec![gate]),
            (gate, up) => Err(Error::shape(format!("gate {gate:?} and up {up:?} are not of one shape"))),
        }
    }

    fn reads(&self) -> Slots {
        Slots::of(&[0, 1], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let tile = (TILE * io.shapes.outputs[0].last()).max(1);
        let y = io.output(0);
        let inputs = io.input(0).par_chunks(tile).zip(io.input(1).par_chunks(tile));
        y.par_chunks_mut(tile).zip(inputs).for_each(|(y, (gate, up))| {
            with_fixed!(self.0, ACT => vectorize!(|| {
                for (y, (gate, up)) in y.iter_mut().zip(gate.iter().zip(up)) {
                    *y = ACT.value(*gate) * *up;
                }
            }));
        });
    }

    /// dgate += dy ∘ up ∘ act'(gate), dup += dy ∘ act(gate).
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let tile = (TILE * io.shapes.outputs[0].last()).max(1);
        let (dy, gate, up) = (io.gradient(), io.input(0), io.input(1));
        let count = dy.len().div_ceil(tile);
        let dgate = gradient_tiles(io.input_gradient(0), tile, count);
        let dup = gradient_tiles(io.input_gradient(1), tile, count);
        let given = dy.par_chunks(tile).zip(gate.par_chunks(tile)).zip(up.par_chunks(tile));
        dgate.zip(dup).zip(given).for_each(|((dgate, dup), ((dy, gate), up))| {
            let mut nobody = [T::ZERO; 0];
            let dgate = dgate.unwrap_or(&mut nobody);
            let mut nobody = [T::ZERO; 0];
            let dup = dup.unwrap_or(&mut nobody);
            with_fixed!(self.0, ACT => vectorize!(|| {
                if dgate.len() == dup.len() {
                    let gradients = dgate.iter_mut().zip(dup);
                    for ((dgate, dup), ((dy, gate), up)) in gradients.zip(dy.iter().zip(gate).zip(up)) {
                        let (value, slope) = ACT.value_and_derivative(*gate);
                        *dgate = (*dy * *up).mul_add(slope, *dgate);
                        *dup = dy.mul_add(value, *dup);
                    }
                    return;
                }
                for (dgate, ((dy, gate), up)) in dgate.iter_mut().zip(dy.iter().zip(gate).zip(up)) {
                    *dgate = (*dy * *up).mul_add(ACT.value_and_derivative(*gate).1, *dgate);
                }
                for (dup, (dy, gate)) in dup.iter_mut().zip(dy.iter().zip(gate)) {
                    *dup = dy.mul_add(ACT.value(*gate), *dup);
                }
            }));
        });
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::of(&[0, 1], &[])
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let shape = io.shapes.outputs[0];
        let n = shape.len();
        let left = (io.next, self.0) == (Next::MultipliesOutput, Activation::Swish)
            && io.queue.prepare(Preparation {
                kind: Kind::Swiglu,
                gate: io.inputs[0],
                rows_out: Some(io.outputs[0]),
                ..Preparation::plain(io.input(1), [shape.rows(), shape.last()])
            });
        if left {
            return Ok(());
        }
        let arguments = arguments![io.input(0), io.input(1), io.outputs[0], n as u64, self.0 as u32];
        io.queue.launch_wide(&SOURCE, "gated_forward", n, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let n = io.shapes.outputs[0].len();
        let [dgate, dup, ..] = io.input_gradients;
        let fresh = u32::from(io.is_fresh(0)) | u32::from(io.is_fresh(1)) << 1;
        let arguments =
            arguments![io.gradient(), io.input(0), io.input(1), dgate, dup, n as u64, self.0 as u32, fresh];
        io.queue.launch_wide(&SOURCE, "gated_backward", n, arguments)
    }
}

/// x (…) -> y (…).
#[derive(Debug)]
struct Activated(Activation);

/// Records act(x), element by element.
///
/// # Errors
/// None: every shape fits.
pub fn activated(tape: &mut Tape, x: Var, activation: Activation) -> Result<Var> {
    Ok(tape.record(Activated(activation), &[Some(x)], &[])?[0])
}

impl Kernel for Activated {
    fn name(&self) -> &'static str {
        "activated"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        Ok(vec![inputs[0].ok_or_else(|| Error::shape("x is needed"))?])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[0], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let tile = (TILE * io.shapes.outputs[0].last()).max(1);
        let y = io.output(0);
        y.par_chunks_mut(tile).zip(io.input(0).par_chunks(tile)).for_each(|(y, x)| {
            with_fixed!(self.0, ACT => vectorize!(|| {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = ACT.value(*x);
                }
            }));
        });
    }

    /// dx += dy ∘ act'(x).
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let tile = (TILE * io.shapes.outputs[0].last()).max(1);
        let Some(dx) = io.input_gradient(0) else { return };
        let given = io.gradient().par_chunks(tile).zip(io.input(0).par_chunks(tile));
        dx.tiles(tile).zip(given).for_each(|(dx, (dy, x))| {
            with_fixed!(self.0, ACT => vectorize!(|| {
                for (dx, (dy, x)) in dx.iter_mut().zip(dy.iter().zip(x)) {
                    *dx = dy.mul_add(ACT.value_and_derivative(*x).1, *dx);
                }
            }));
        });
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::of(&[0], &[])
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let n = io.shapes.outputs[0].len();
        let arguments = arguments![io.input(0), io.outputs[0], n as u64, self.0 as u32];
        io.queue.launch_wide(&SOURCE, "activated_forward", n, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let Some(dx) = io.input_gradients[0] else { return Ok(()) };
        let n = io.shapes.outputs[0].len();
        let fresh = u32::from(io.is_fresh(0));
        let arguments = arguments![io.gradient(), io.input(0), dx, n as u64, self.0 as u32, fresh];
        io.queue.launch_wide(&SOURCE, "activated_backward", n, arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::Check;

    const ALL: [Activation; 6] = [
        Activation::Gelu,
        Activation::Relu,
        Activation::ReluSquared,
        Activation::Sigmoid,
        Activation::Swish,
        Activation::Selu,
    ];

    #[test]
    fn gradients() {
        for activation in ALL {
            Check::new()
                .input([2, 35, 5])
                .input([2, 35, 5])
                .run(|tape, v, _| Ok(vec![gated(tape, v[0], v[1], activation)?]));
            let check = Check::new().input([2, 35, 5]);
            check.run(|tape, v, _| Ok(vec![activated(tape, v[0], activation)?]));
        }
    }

    /// Where only one of the two gradients is asked for, it is the same.
    #[test]
    fn gradients_of_one_input() {
        for activation in ALL {
            Check::new().input([3, 5]).run(|tape, v, _| {
                let constant = tape.input([3, 5]);
                Ok(vec![gated(tape, v[0], constant, activation)?, gated(tape, constant, v[0], activation)?])
            });
        }
    }

    #[test]
    fn values() {
        let close = |activation: Activation, x: f64, y: f64| {
            assert!((activation.value(x) - y).abs() < 1e-12, "{activation:?}({x})");
        };
        close(Activation::Gelu, 1.0, 0.841_344_746_068_542_9);
        close(Activation::Relu, -1.0, 0.0);
        close(Activation::ReluSquared, 3.0, 9.0);
        close(Activation::Sigmoid, 0.0, 0.5);
        close(Activation::Swish, 1.0, 0.731_058_578_630_004_9);
        close(Activation::Selu, -1.0, -1.111_330_737_812_562_6);
        for activation in ALL {
            assert!(activation.value(f32::NAN).is_nan());
        }
    }

    #[test]
    fn names() {
        let names: Vec<String> = ALL.iter().map(|a| serde_json::to_string(a).unwrap()).collect();
        assert_eq!(names.join(" "), r#""gelu" "relu" "relu^2" "sigmoid" "swish" "selu""#);
        assert_eq!(serde_json::from_str::<Activation>(r#""relu^2""#).unwrap(), Activation::ReluSquared);
    }
}
