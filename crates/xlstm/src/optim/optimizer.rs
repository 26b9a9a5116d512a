//! What follows the gradients: clipping by their global norm, then Muon for weight matrices where that is
//! asked for, and AdamW for all else.
//!
//! ```text
//! g <- g min(1, clip / (|g| + 1e-6))      (|g| over all parameters)
//! ```

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::adamw::{self, AdamWOptions};
use super::muon::{self, MuonOptions};
use crate::engine::Scalar;
use crate::engine::vector::{sum_of, vectorize};
use crate::nn::{Parameters, Role};

/// Elements a task updates, and a partial sum of a norm covers.
pub(super) const TILE: usize = 8192;

/// How the weight matrices between embedding and head are updated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MatrixUpdate {
    /// As all else, by AdamW.
    #[default]
    AdamW,
    /// By Muon.
    Muon,
}

/// The constants of the optimizer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerOptions {
    /// Of what AdamW updates.
    pub adamw: AdamWOptions,
    /// Of what Muon updates, the parameters of [`Role::Matrices`]; None: AdamW updates them, too.
    pub muon: Option<MuonOptions>,
    /// Weight decay, times the learning rate a step.
    pub weight_decay: f64,
    /// Largest global norm of the gradients.
    pub clip: Option<f64>,
    /// The learning rate of [`Role::Border`], embedding and head, as a multiple of that of all else.
    pub border_rate: f64,
}

impl OptimizerOptions {
    /// What trains most models: AdamW with betas of 0.9 and 0.95 for all, weight decay 0.1, gradients clipped
    /// at a norm of 1.
    pub const DEFAULT: OptimizerOptions = OptimizerOptions {
        adamw: AdamWOptions { betas: [0.9, 0.95], eps: 1e-8 },
        muon: None,
        weight_decay: 0.1,
        clip: Some(1.0),
        border_rate: 1.0,
    };

    /// The learning rate of a parameter where that of most is `rate`, and what decay leaves of its weights.
    pub(super) fn rate_and_rest(&self, role: &Role, decay: bool, rate: f64) -> [f64; 2] {
        let rate = if *role == Role::Border { rate * self.border_rate } else { rate };
        [rate, if decay { 1.0 - rate * self.weight_decay } else { 1.0 }]
    }
}

/// A parameter with its gradient and moments.
pub(super) struct Tensor<'a, T> {
    pub(super) w: &'a mut [T],
    pub(super) g: &'a [T],
    pub(super) first: &'a mut [T],
    pub(super) second: &'a mut [T],
}

/// The optimizer's state: two moments a parameter, and the number of steps taken.
#[derive(Clone, Debug)]
pub struct Optimizer<T> {
    options: OptimizerOptions,
    /// First moments; of what Muon updates, its momentum.
    pub first: Vec<Vec<T>>,
    /// Second moments; of what Muon updates, zeros.
    pub second: Vec<Vec<T>>,
    /// Steps taken.
    pub steps: u64,
}

impl<T: Scalar> Optimizer<T> {
    /// No step taken yet.
    pub fn new(options: OptimizerOptions, parameters: &Parameters<T>) -> Optimizer<T> {
        Optimizer { options, first: parameters.zeros_like(), second: parameters.zeros_like(), steps: 0 }
    }

    /// One step at learning rate `rate`, the gradients having this global `norm`.
    pub fn update(&mut self, parameters: &mut Parameters<T>, gradients: &[Vec<T>], norm: f64, rate: f64) {
        self.steps += 1;
        let options = &self.options;
        let scale = options.clip.map_or(1.0, |clip| (clip / (norm + 1e-6)).min(1.0));
        let specs = parameters.specs().clone();
        let moments = self.first.iter_mut().zip(&mut self.second);
        let tensors = parameters.values.iter_mut().zip(gradients).zip(moments);
        for (spec, ((w, g), (first, second))) in specs.iter().zip(tensors) {
            let [rate, rest] = options.rate_and_rest(&spec.role, spec.decay, rate);
            let tensor = Tensor { w, g, first, second };
            match (&options.muon, &spec.role) {
                (Some(muon), Role::Matrices(sizes)) => {
                    muon::update(muon, tensor, sizes, [scale, rate, rest]);
                }
                _ => adamw::update(&options.adamw, tensor, self.steps, [scale, rate, rest]),
            }
        }
    }
}

/// The Euclidean norm of all gradients together: partial sums over fixed tiles, added in
/// order in f64.
pub fn global_norm<T: Scalar>(gradients: &[Vec<T>]) -> f64 {
    gradients.iter().map(|g| square_sum(g)).sum::<f64>().sqrt()
}

/// The sum of squares, as [`global_norm`] takes it.
pub(super) fn square_sum<T: Scalar>(x: &[T]) -> f64 {
    let square = |tile: &[T]| vectorize!(|| sum_of(tile.len(), |i| tile[i] * tile[i])).to_f64();
    x.par_chunks(TILE).map(square).collect::<Vec<f64>>().iter().sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Builder, Init};
    use crate::rng::Rng;

    const OPTIONS: OptimizerOptions = OptimizerOptions {
        muon: Some(MuonOptions { momentum: 0.9 }),
        clip: Some(2.0),
        border_rate: 3.0,
        ..OptimizerOptions::DEFAULT
    };

    /// A model of every role: its head, two matrices and a bias.
    fn parameters() -> Parameters<f64> {
        let mut builder = Builder::new();
        let head = builder.parameter("head.weight", &[5, 7], Init::Normal(1.0));
        builder.at_border(head);
        builder.matrices("up.weight", &[2 * 20, 16], Init::Normal(1.0), [20; 2]);
        builder.parameter("up.bias", &[40], Init::Normal(1.0));
        Parameters::initialize(&builder.finish(), 1)
    }

    /// X of (20, 16) after the iterations, from the definition, sums written out: X <- a X + b X X^T X +
    /// c X X^T X X^T X.
    fn plainly(u: &[f64]) -> Vec<f64> {
        let [rows, columns] = [20, 16];
        let norm = u.iter().map(|x| x * x).sum::<f64>().sqrt();
        let mut x: Vec<f64> = u.iter().map(|u| u / (norm + 1e-7)).collect();
        for _ in 0..5 {
            // y X^T X.
            let through = |y: &[f64]| -> Vec<f64> {
                let mut z = vec![0.0; rows * columns];
                for i in 0..rows {
                    for k in 0..rows {
                        let dot: f64 = (0..columns).map(|j| y[i * columns + j] * x[k * columns + j]).sum();
                        (0..columns).for_each(|j| z[i * columns + j] += dot * x[k * columns + j]);
                    }
                }
                z
            };
            let cube = through(&x);
            let fifth = through(&cube);
            x = (0..x.len()).map(|i| 3.4445 * x[i] - 4.7750 * cube[i] + 2.0315 * fifth[i]).collect();
        }
        x
    }

    #[test]
    fn steps_are_those_written_out() {
        let mut parameters = parameters();
        let mut optimizer = Optimizer::new(OPTIONS, &parameters);
        let mut wanted = parameters.values.clone();
        let (mut first, mut second) = (parameters.zeros_like(), parameters.zeros_like());
        let mut rng = Rng::new(3, 0);
        for step in 1..=4 {
            let rate = 0.01 * f64::from(step);
            let gradients: Vec<Vec<f64>> =
                wanted.iter().map(|w| w.iter().map(|_| rng.normal()).collect()).collect();
            let norm = gradients.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
            let clip = 2.0 / (norm + 1e-6);
            assert!(clip < 1.0);
            optimizer.update(&mut parameters, &gradients, norm, rate);
            // The head decays and moves at three times the rate; the bias does not decay.
            for (part, rate, keep) in [(0, 3.0 * rate, 1.0 - 3.0 * rate * 0.1), (2, rate, 1.0)] {
                for i in 0..wanted[part].len() {
                    let g = clip * gradients[part][i];
                    first[part][i] = 0.9 * first[part][i] + 0.1 * g;
                    second[part][i] = 0.95 * second[part][i] + 0.05 * g * g;
                    let m = first[part][i] / (1.0 - 0.9f64.powi(step));
                    let v = second[part][i] / (1.0 - 0.95f64.powi(step));
                    wanted[part][i] = keep * wanted[part][i] - rate * m / (v.sqrt() + 1e-8);
                }
            }
            for half in [0..320, 320..640] {
                let mut ahead = Vec::new();
                for i in half.clone() {
                    let g = clip * gradients[1][i];
                    first[1][i] = 0.9 * first[1][i] + g;
                    ahead.push(g + 0.9 * first[1][i]);
                }
                for (i, x) in half.zip(plainly(&ahead)) {
                    wanted[1][i] = (1.0 - rate * 0.1) * wanted[1][i] - rate * 0.2 * 20f64.sqrt() * x;
                }
            }
            let pairs =
                [(&parameters.values, &wanted), (&optimizer.first, &first), (&optimizer.second, &second)];
            for (got, wanted) in pairs {
                for (got, wanted) in got.iter().flatten().zip(wanted.iter().flatten()) {
                    assert!((got - wanted).abs() < 1e-11, "step {step}: {got} and {wanted}");
                }
            }
        }
        assert!(optimizer.second[1].iter().all(|v| *v == 0.0));
    }
}
