//! AdamW with decoupled weight decay (Loshchilov and Hutter 2019), of gradients that are clipped.
//!
//! ```text
//! w <- w (1 - rate decay)                 (weights in the decay group)
//! m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g²
//! w <- w - rate / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
//! ```

use rayon::prelude::*;

use super::optimizer::{TILE, Tensor};
use crate::engine::Scalar;
use crate::engine::vector::vectorize;

/// The constants of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
}

/// Step number `step`, counted from 1, of a tensor at learning rate `rate`; `scale` clips its gradient,
/// `keep` is what decay leaves of the weights.
pub(super) fn update<T: Scalar>(
    options: &AdamWOptions,
    tensor: Tensor<'_, T>,
    step: u64,
    [scale, rate, keep]: [f64; 3],
) {
    let AdamWOptions { betas: [b1, b2], eps } = *options;
    let step = step as f64;
    let rate_1 = T::from_f64(rate / (1.0 - b1.powf(step)));
    let root_2 = T::from_f64(1.0 / (1.0 - b2.powf(step)).sqrt());
    let [b1, b2, rest_1, rest_2] = [b1, b2, 1.0 - b1, 1.0 - b2].map(T::from_f64);
    let [eps, scale, keep] = [eps, scale, keep].map(T::from_f64);
    let Tensor { w, g, first, second } = tensor;
    let tiles = w.par_chunks_mut(TILE).zip(g.par_chunks(TILE));
    tiles.zip(first.par_chunks_mut(TILE).zip(second.par_chunks_mut(TILE))).for_each(|((w, g), (m, v))| {
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
