//! AdamW with decoupled weight decay (Loshchilov and Hutter 2019), and clipping by the
//! global norm of the gradients.
//!
//! ```text
//! g <- g min(1, clip / (|g| + 1e-6))
//! w <- w (1 - rate decay)                 (weights in the decay group)
//! m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g²
//! w <- w - rate / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
//! ```

use rayon::prelude::*;

use crate::engine::Scalar;
use crate::engine::vector::{sum_of, vectorize};
use crate::nn::Parameters;

/// Elements a task updates, and a partial sum of the norm covers.
const TILE: usize = 8192;

/// The constants of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay, times the learning rate a step.
    pub weight_decay: f64,
    /// Largest global norm of the gradients.
    pub clip: Option<f64>,
}

/// The optimizer's state: two moments a parameter, and the number of steps taken.
#[derive(Clone, Debug)]
pub struct AdamW<T> {
    options: AdamWOptions,
    /// First moments.
    pub first: Vec<Vec<T>>,
    /// Second moments.
    pub second: Vec<Vec<T>>,
    /// Steps taken.
    pub steps: u64,
}

impl<T: Scalar> AdamW<T> {
    /// No step taken yet.
    pub fn new(options: AdamWOptions, parameters: &Parameters<T>) -> AdamW<T> {
        AdamW { options, first: parameters.zeros_like(), second: parameters.zeros_like(), steps: 0 }
    }

    /// One step at learning rate `rate`, the gradients having this global `norm`.
    pub fn update(&mut self, parameters: &mut Parameters<T>, gradients: &[Vec<T>], norm: f64, rate: f64) {
        self.steps += 1;
        let AdamWOptions { betas: [b1, b2], eps, weight_decay, clip } = self.options;
        let step = self.steps as f64;
        let clip = clip.map_or(1.0, |clip| (clip / (norm + 1e-6)).min(1.0));
        let scale = T::from_f64(clip);
        let rate_1 = T::from_f64(rate / (1.0 - b1.powf(step)));
        let root_2 = T::from_f64(1.0 / (1.0 - b2.powf(step)).sqrt());
        let [b1, b2, rest_1, rest_2] = [b1, b2, 1.0 - b1, 1.0 - b2].map(T::from_f64);
        let eps = T::from_f64(eps);
        let specs = parameters.specs().clone();
        let tensors =
            parameters.values.iter_mut().zip(gradients).zip(self.first.iter_mut().zip(&mut self.second));
        for (spec, ((w, g), (m, v))) in specs.iter().zip(tensors) {
            let keep = T::from_f64(if spec.decay { 1.0 - rate * weight_decay } else { 1.0 });
            let tiles = w.par_chunks_mut(TILE).zip(g.par_chunks(TILE));
            tiles.zip(m.par_chunks_mut(TILE).zip(v.par_chunks_mut(TILE))).for_each(|((w, g), (m, v))| {
                vectorize!(|| {
                    for ((w, g), (m, v)) in w.iter_mut().zip(g).zip(m.iter_mut().zip(v.iter_mut())) {
                        let g = *g * scale;
                        *m = b1 * *m + rest_1 * g;
                        *v = b2 * *v + rest_2 * g * g;
                        *w = *w * keep - rate_1 * *m / (v.sqrt() * root_2 + eps);
                    }
                });
            });
        }
    }
}

/// The Euclidean norm of all gradients together: partial sums over fixed tiles, added in
/// order in f64.
pub fn global_norm<T: Scalar>(gradients: &[Vec<T>]) -> f64 {
    let square = |tile: &[T]| vectorize!(|| sum_of(tile.len(), |i| tile[i] * tile[i])).to_f64();
    let total: f64 = gradients
        .iter()
        .map(|g| g.par_chunks(TILE).map(square).collect::<Vec<f64>>().iter().sum::<f64>())
        .sum();
    total.sqrt()
}
