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
