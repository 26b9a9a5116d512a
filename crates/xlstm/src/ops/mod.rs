//! The operations, one a file: forward directly above backward, tests below.
//!
//! Activations are token-major: (batch, length, features), features contiguous, so that
//! every projection is one matrix product over all tokens and a head is a column block.
//! Work is cut into fixed tiles of rows, whatever the number of threads, so that results
//! do not depend on it.

use rayon::iter::Either;
use rayon::prelude::*;

use crate::engine::{Gradient, Scalar};

pub mod activation;
pub mod add;
pub mod attention;
pub mod causal_conv;
pub mod draw;
pub mod dropout;
pub mod embedding;
pub mod from_bits;
pub mod gates;
pub mod head_loss;
pub mod headwise;
pub mod last_token;
pub mod learned_positions;
pub mod linear;
pub mod mean_tokens;
pub mod norm;
pub mod positions;
pub mod qkv;
pub mod reverse;
pub mod rotary;
pub mod skip_norm;
pub mod soft_cap;
pub mod squared_error;
pub mod window;

#[cfg(test)]
pub(crate) mod check;

/// Rows a parallel task works on. Small enough to balance, large enough to amortise.
pub(crate) const TILE: usize = 32;

pub use crate::marks::{IGNORE, PAD, RESET};

/// The tiles of a gradient, `count` in all; where nobody asks for it, `count` times None.
/// Operations that work out several gradients at once zip these.
pub(crate) fn gradient_tiles<T: Scalar>(
    gradient: Option<Gradient<'_, T>>,
    tile: usize,
    count: usize,
) -> impl IndexedParallelIterator<Item = Option<&mut [T]>> {
    match gradient {
        Some(gradient) => Either::Left(gradient.tiles(tile).map(Some)),
        None => Either::Right((0..count).into_par_iter().map(|_| None)),
    }
}
