//! The operations, one a file: forward directly above backward, tests below.
//!
//! Activations are token-major: (batch, length, features), features contiguous, so that
//! every projection is one matrix product over all tokens and a head is a column block.
//! Work is cut into fixed tiles of rows, whatever the number of threads, so that results
//! do not depend on it.

pub mod linear;

#[cfg(test)]
pub(crate) mod check;

/// Rows a parallel task works on. Small enough to balance, large enough to amortise.
pub(crate) const TILE: usize = 32;

/// This token starts a new document: every state before it is cleared.
pub const RESET: u32 = 1;
/// Not a token: states pass through unchanged, its output means nothing.
pub const PAD: u32 = 2;
